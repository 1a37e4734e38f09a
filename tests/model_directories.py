"""Tiny models of transformers, saved as directories, and how to prune one, for the tests of files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

import rarefy
from rarefy.axes import Layout
from rarefy.axes.pattern import parse_pattern
from rarefy.io import Record, SiteRecord, collect, read_model, write_model
from rarefy.runtime import PackedLinear

transformers.utils.logging.disable_progress_bar()

IDS = torch.tensor([[1, 5, 7, 90, 3]])

_SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64,
}  # fmt: skip


def llama(**changes: Any) -> Any:
    return transformers.LlamaConfig(**_SIZES | {"tie_word_embeddings": True} | changes)


def mixtral() -> Any:
    return transformers.MixtralConfig(**_SIZES | {"num_local_experts": 4, "intermediate_size": 40})


def gpt2() -> Any:
    return transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64)


def bert() -> Any:
    sizes = {name: size for name, size in _SIZES.items() if name != "num_key_value_heads"}
    return transformers.BertConfig(**sizes)


KINDS = {"llama": llama, "mixtral": mixtral, "gpt2": gpt2, "bert": bert}


def build(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights, wide enough that its tokens depend on them."""
    kind = transformers.AutoModelForMaskedLM if config.model_type == "bert" else transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.to(dtype).eval()


def saved(folder: Path, config: Any, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
    """A directory as people have them: weights, configs, a tokenizer, and files of other tools."""
    build(config, dtype).save_pretrained(folder, **how)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"old weights")
    return folder


def pruned(source: Path, pattern: str = "2:4", sparsity: float = 0.5, **which: Any) -> tuple[nn.Module, Any, Record]:
    """The model, its Linear layers pruned by magnitude, and what `write_model` takes."""
    model = read_model(source)
    which = which or {"only": [name for name, module in model.named_modules() if is_free_linear(model, module)]}
    handle = rarefy.sparsify(model, rarefy.Magnitude(sparsity=sparsity, pattern=pattern), **which)
    return model, *collect(model, handle, source)


def is_free_linear(model: nn.Module, module: nn.Module) -> bool:
    """Whether a layer is a Linear that shares its weight with no embedding."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return type(module) is nn.Linear and id(module.weight) not in embeddings


def pruned_files(source: Path, layouts: dict[str, Layout], pattern: str = "2:4") -> tuple[dict[str, Any], Record]:
    """What `write_model` takes, made from the files alone: these tensors, stored so."""
    shape = parse_pattern(pattern)
    changes: dict[str, torch.Tensor] = {}
    sites: list[SiteRecord] = []
    for name, layout in layouts.items():
        weight = tensors(source)[name]
        scores = layout.canonical(weight).abs().contiguous()
        mask = layout.restore(shape.project(scores, shape.asked(scores.shape, 0.5))).contiguous()
        changes[name] = weight.masked_fill(~mask, 0)
        sites.append(SiteRecord.of(name, changes[name], mask, shape, layout))
    return changes, Record.of({"kind": "by hand"}, sites)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that the safetensors files of a directory hold, read by another library."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "pt"
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor.dtype, tensor.shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(tensor.view(-1).view(torch.uint8), b[name].view(-1).view(torch.uint8)), name


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def nothing_left(out: Path) -> bool:
    return not out.exists() and not list(out.parent.glob(".*"))


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for name, data in files_of(source).items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(data)
    return target


def taken_apart(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_together(path: Path, table: dict[str, Any], body: bytes) -> None:
    header = json.dumps(table).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)


def refused(source: Path, change: Any, out: Path, says: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=says):
        write_model(source, out, *change)
    assert nothing_left(out)


def sparse(
    folder: Path, config: Any, dtype: torch.dtype = torch.float32, pattern: str = "unstructured", **how: Any
) -> Path:
    """A pruned directory, three quarters zeros unless the pattern says otherwise."""
    source = saved(folder / "source", config, dtype, **how)
    _, changes, record = pruned(source, pattern, 0.75)
    write_model(source, folder / "sparse", changes, record)
    return folder / "sparse"


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def packed_layers(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]


def generated(model: Any) -> list[int]:
    return model.generate(IDS, max_new_tokens=24, do_sample=False, pad_token_id=0)[0].tolist()
