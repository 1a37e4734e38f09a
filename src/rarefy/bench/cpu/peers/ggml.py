"""llama.cpp's products in this process: `ggml_mul_mat` of the libraries that llama-cpp-python brings.

One graph holds one product, y = x Wᵀ with x in fp32, and is computed by ggml's processor backend, as llama.cpp computes
its layers. Where llama.cpp would rearrange a weight when it loads a model (Q4_0 with rows in eights), so is it here.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["TYPES", "Product", "fits"]

TYPES = {"BF16": 30, "Q8_0": 8, "Q4_0": 2}
_F32 = 0
_BLOCK = 32  # entries of a row that share a scale in Q8_0 and Q4_0
_REPACK_ROWS = 8


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SILENT = _Log(lambda level, text, data: None)


class _Parameters(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def fits(kind: str, rows: int, cols: int) -> str | None:
    """None if a weight [rows, cols] can be of this type, else the reason."""
    if kind != "BF16" and cols % _BLOCK:
        return f"{kind} needs inputs in multiples of {_BLOCK}, not {cols}"
    return None


class Product:
    """Products of one x [tokens, cols] with each of the weights [rows, cols] (fp32 tensors, converted to `kind`).

    calls: one per weight. y: what the last call has made, [tokens, rows]. To be used as a context: memory outside of
    Python's is freed at its end.
    """

    def __init__(self, weights: Sequence[Tensor], x: Tensor, kind: str, threads: int) -> None:
        self._g = g = _ggml()
        rows, cols = weights[0].shape
        self._backend = g.ggml_backend_cpu_init()
        g.ggml_backend_cpu_set_n_threads(self._backend, threads)
        # Tensors here are descriptions; their data comes from the backend's buffers.
        overhead = int(g.ggml_tensor_overhead()) * (3 * len(weights) + 8)
        overhead += int(g.ggml_graph_overhead_custom(4, False)) * len(weights)
        self._weights_context = g.ggml_init(_Parameters(overhead, None, True))
        self._context = g.ggml_init(_Parameters(overhead, None, True))
        held = [g.ggml_new_tensor_2d(self._weights_context, TYPES[kind], cols, rows) for _ in weights]
        given = g.ggml_new_tensor_2d(self._context, _F32, cols, len(x))
        self._outputs = [g.ggml_mul_mat(self._context, w, given) for w in held]
        self._graphs = []
        for y in self._outputs:
            graph = g.ggml_new_graph_custom(self._context, 4, False)
            g.ggml_build_forward_expand(graph, y)
            self._graphs.append(graph)
        kind_of_buffer = _repack(g) if kind == "Q4_0" and rows % _REPACK_ROWS == 0 else None
        self._buffers = [
            g.ggml_backend_alloc_ctx_tensors_from_buft(
                self._weights_context, kind_of_buffer or g.ggml_backend_cpu_buffer_type()
            ),
            g.ggml_backend_alloc_ctx_tensors(self._context, self._backend),
        ]
        for tensor, weight in zip(held, weights, strict=True):
            _fill(g, tensor, _converted(g, weight, kind))
        _fill(g, given, np.ascontiguousarray(x.numpy()))
        self._shape = (len(x), rows)
        self.calls = [self._call(graph) for graph in self._graphs]

    def _call(self, graph: int) -> Callable[[], object]:
        compute, backend = self._g.ggml_backend_graph_compute, self._backend

        def call() -> object:
            return compute(backend, graph)

        return call

    def y(self, index: int = 0) -> Tensor:
        """What call `index` has made last."""
        out = np.empty(self._shape, np.float32)
        self._g.ggml_backend_tensor_get(self._outputs[index], out.ctypes.data, 0, out.nbytes)
        return torch.from_numpy(out)

    def __enter__(self) -> "Product":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free what this holds; the calls must not be used again."""
        for buffer in self._buffers:
            self._g.ggml_backend_buffer_free(buffer)
        self._g.ggml_free(self._context)
        self._g.ggml_free(self._weights_context)
        self._g.ggml_backend_free(self._backend)
        self._buffers, self.calls = [], []


def _fill(g: Any, tensor: int, array: np.ndarray) -> None:
    g.ggml_backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)


def _converted(g: Any, weight: Tensor, kind: str) -> np.ndarray:
    if kind == "BF16":
        return np.ascontiguousarray(weight.bfloat16().view(torch.int16).numpy())
    rows, cols = weight.shape
    source = np.ascontiguousarray(weight.numpy())
    per_block = 34 if kind == "Q8_0" else 18  # a 16-bit scale, then 32 values of 8 or 4 bits
    out = np.empty(rows * cols // _BLOCK * per_block, np.uint8)
    written = g.ggml_quantize_chunk(TYPES[kind], source.ctypes.data, out.ctypes.data, 0, rows, cols, None)
    if written != out.nbytes:
        raise RuntimeError(f"ggml made {written} bytes of a {rows}×{cols} {kind} weight, expected {out.nbytes}")
    return out


def _repack(g: Any) -> int | None:
    """The buffer type whose weights are rearranged for the processor, None if this build has none."""
    registry = g.ggml_backend_cpu_reg()
    address = g.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    listed = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(
        g.ggml_backend_reg_dev_get(registry, 0)
    )
    for i in range(16):
        if not listed or not listed[i]:
            break
        if g.ggml_backend_buft_name(listed[i]) == b"CPU_REPACK":
            return listed[i]
    return None


class _Libraries:
    """The functions of several shared libraries under one roof, with their signatures."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._libraries = [ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in paths]

    def declare(self, name: str, result: Any, *arguments: Any) -> None:
        """Find a function and set its signature."""
        for library in self._libraries:
            if hasattr(library, name):
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name, function)
                return
        raise RuntimeError(f"{name} is in none of the libraries of llama-cpp-python")


@cache
def _ggml() -> Any:
    """The libraries of the installed llama-cpp-python; importing that package is not needed for them."""
    from importlib import metadata

    package = Path(str(metadata.distribution("llama-cpp-python").locate_file("llama_cpp"))) / "lib"
    g: Any = _Libraries([package / f"lib{name}.so" for name in ("ggml-base", "ggml-cpu", "ggml")])
    p, size, i32, i64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
    g.declare("ggml_log_set", None, _Log, p)
    g.ggml_log_set(_SILENT, None)
    g.declare("ggml_init", p, _Parameters)
    g.declare("ggml_free", None, p)
    g.declare("ggml_tensor_overhead", size)
    g.declare("ggml_graph_overhead_custom", size, size, ctypes.c_bool)
    g.declare("ggml_new_tensor_2d", p, p, i32, i64, i64)
    g.declare("ggml_mul_mat", p, p, p, p)
    g.declare("ggml_new_graph_custom", p, p, size, ctypes.c_bool)
    g.declare("ggml_build_forward_expand", None, p, p)
    g.declare("ggml_quantize_chunk", size, i32, p, p, i64, i64, i64, p)
    g.declare("ggml_backend_cpu_init", p)
    g.declare("ggml_backend_free", None, p)
    g.declare("ggml_backend_cpu_set_n_threads", None, p, i32)
    g.declare("ggml_backend_cpu_buffer_type", p)
    g.declare("ggml_backend_cpu_reg", p)
    g.declare("ggml_backend_reg_dev_get", p, p, size)
    g.declare("ggml_backend_reg_get_proc_address", p, p, ctypes.c_char_p)
    g.declare("ggml_backend_buft_name", ctypes.c_char_p, p)
    g.declare("ggml_backend_alloc_ctx_tensors", p, p, p)
    g.declare("ggml_backend_alloc_ctx_tensors_from_buft", p, p, p)
    g.declare("ggml_backend_buffer_free", None, p)
    g.declare("ggml_backend_tensor_set", None, p, p, size, size)
    g.declare("ggml_backend_tensor_get", None, p, p, size, size)
    g.declare("ggml_backend_graph_compute", i32, p, p)
    return g
