"""llama.cpp on a whole decoder: a GGUF file of the Llama shape with random weights, and its time per token.

Weights of one block are drawn and written for every block: each has its own place in the file and in memory. Q8_0 and
Q4_0 are quantised from them; embedding and head are of the same type as the rest.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rarefy.bench.cpu.peers.environments import need

__all__ = ["Decoder", "write_gguf"]


@dataclass(frozen=True)
class Shape:
    """The shape of rarefy.bench.cpu.networks.llama."""

    vocabulary: int = 32000
    width: int = 2048
    inner: int = 5632
    depth: int = 22
    heads: int = 32
    shared: int = 4


def write_gguf(path: Path, kind: str, shape: Shape | None = None) -> Path:
    """Write the file, unless it is there. kind: BF16, Q8_0 or Q4_0."""
    gguf = need("gguf")
    shape = shape or Shape()
    if path.exists():
        return path
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(str(part), "llama")
    _describe(writer, shape, gguf.LlamaFileType[f"MOSTLY_{kind}"])
    source, quantised = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]

    def add(name: str, data: np.ndarray) -> None:
        writer.add_tensor(name, data, raw_dtype=quantised)

    def drawn(*size: int) -> np.ndarray:
        values = source.standard_normal(size, dtype=np.float32) / np.float32(np.sqrt(size[-1]))
        return gguf.quants.quantize(values, quantised)

    ones = np.ones(shape.width, np.float32)
    add("token_embd.weight", drawn(shape.vocabulary, shape.width))
    block = {name: drawn(*size) for name, size in _sizes(shape).items()}
    for layer in range(shape.depth):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", ones)
        for name, data in block.items():
            add(f"blk.{layer}.{name}.weight", data)
    writer.add_tensor("output_norm.weight", ones)
    add("output.weight", drawn(shape.vocabulary, shape.width))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)
    return path


def _sizes(s: Shape) -> dict[str, tuple[int, int]]:
    keys = s.shared * s.width // s.heads
    return {
        "attn_q": (s.width, s.width), "attn_k": (keys, s.width), "attn_v": (keys, s.width),
        "attn_output": (s.width, s.width), "ffn_gate": (s.inner, s.width), "ffn_up": (s.inner, s.width),
        "ffn_down": (s.width, s.inner),
    }  # fmt: skip


def _describe(writer: Any, s: Shape, kind: Any) -> None:
    writer.add_context_length(2048)
    writer.add_embedding_length(s.width)
    writer.add_block_count(s.depth)
    writer.add_feed_forward_length(s.inner)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(s.shared)
    writer.add_rope_dimension_count(s.width // s.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(s.vocabulary)
    writer.add_file_type(kind)
    writer.add_tokenizer_model("no_vocab")


class Decoder:
    """llama.cpp with that file. `step` decodes one token behind `behind` others, `read` reads a prompt of so many.

    To be used as a context: memory outside of Python's is freed at its end.
    """

    def __init__(self, path: Path, threads: int, behind: int = 127, prompt: int = 128) -> None:
        self._c = c = need("llama_cpp")
        self._silent = c.llama_log_callback(lambda level, text, data: None)
        c.llama_log_set(self._silent, ctypes.c_void_p(0))
        c.llama_backend_init()
        parameters = c.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = c.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path.name}")
        options = c.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = 256, prompt, prompt
        options.n_threads = options.n_threads_batch = threads
        self._context = c.llama_init_from_model(self._model, options)
        self._memory = c.llama_get_memory(self._context)
        self._behind, self._prompt = behind, prompt
        self._tokens = (c.llama_token * max(prompt, behind))(*range(100, 100 + max(prompt, behind)))
        self._one = (c.llama_token * 1)(100)
        self._decode(self._tokens, behind)

    def _decode(self, tokens: Any, count: int) -> None:
        code = self._c.llama_decode(self._context, self._c.llama_batch_get_one(tokens, count))
        if code:
            raise RuntimeError(f"llama.cpp's decode returned {code}")

    def step(self) -> None:
        """One token behind the others, which is then forgotten."""
        self._c.llama_memory_seq_rm(self._memory, 0, self._behind, -1)
        self._decode(self._one, 1)

    def read(self) -> None:
        """A prompt from the beginning."""
        self._c.llama_memory_clear(self._memory, False)
        self._decode(self._tokens, self._prompt)

    def calls(self, tokens: int) -> list[Callable[[], object]]:
        """`step` for one token, else `read`; a decoder does only one of the two."""
        return [self.step if tokens == 1 else self.read]

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free what this holds."""
        self._c.llama_free(self._context)
        self._c.llama_model_free(self._model)
