"""Packed directories: smaller files that load as packed layers, and the way back, bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from rarefy.io.container import NAMES, Table
from rarefy.io.directory import METHOD, Written, is_packed, loader, refuse_packed
from rarefy.io.folder import copy_others, refuse_taken, staged
from rarefy.io.packing import pack_weight, reason_against
from rarefy.io.record import RECORD
from rarefy.io.shards import CONFIG, INDEX, Shard, Shards, Stream, header_of, refuse_infinite, write_raw
from rarefy.io.weights import PACKED_BIAS, PACKED_WEIGHT, VERSION, PackedEntry, Said, Weights

_KEY: Final = "quantization_config"
_VALUE: Final = {"quant_method": METHOD, "version": VERSION}
_ADDED: Final = re.compile(
    r',?\n  "quantization_config": \{\n    "quant_method": "rarefy",\n    "version": \d+\n  \}(?=\s*\}\s*\Z)'
)


@dataclass(frozen=True)
class PackedFiles:
    """A packed directory that was written. dense: weights that stay dense, with the reason."""

    path: Path
    bytes_before: int
    bytes_after: int
    packed: tuple[str, ...]
    dense: Mapping[str, str]
    left_out: tuple[str, ...] = ()


def write_packed(source: Path | str | nn.Module, out: Path | str) -> PackedFiles:
    """Write a sparse model as a packed directory: losslessly, and with one key more in config.json.

    source: a model directory, or a model of transformers, packed or not. With rarefy imported,
    `AutoModelForCausalLM.from_pretrained(OUT)` and its like load it with packed layers, which run by their usual
    kernels. What is fastest on a machine has to be measured there: `rarefy.pack(rarefy.unpack(model), example=x)`.
    nn.Linear layers are packed where that takes fewer bytes than the dense tensor. Others stay dense: embeddings and
    what is tied to them, convolutions, transformers' Conv1D (GPT-2) and fused experts, for which there is no packed
    layer; float16 weights of less than about half zeros, since kernels hold them in float32; weights with a −0.0, which
    packed forms store as +0.0. Of a directory everything else is copied as `write_model` does; of a model, config and
    generation config are saved, not the tokenizer.
    Raises what `write_model` raises, and ValueError where nothing would be packed.
    """
    out = Path(out)
    if isinstance(source, nn.Module):
        return loader().save_packed(source, out)
    shards = Shards(Path(source))
    refuse_packed(shards)
    refuse_taken(out, shards.folder)
    plan = _plan(shards)
    with staged(out) as files:
        sizes = {name: _write_packed(plan, name, files / name) for name in shards.files}
        _, left_out = copy_others(shards.folder, files, frozenset({*shards.files, INDEX, CONFIG}))
        if (shards.folder / RECORD).is_file():
            (files / RECORD).write_bytes((shards.folder / RECORD).read_bytes())
        (files / CONFIG).write_bytes(with_key((shards.folder / CONFIG).read_bytes()))
        if shards.index is not None:
            where = {tensor: name for name in shards.files for tensor in _names(plan, shards.files[name])}
            (files / INDEX).write_text(_index(where, sum(sizes.values())), "utf-8")
    before = sum((shards.folder / name).stat().st_size for name in shards.files)
    return PackedFiles(out, before, sum(sizes.values()), tuple(plan.layers), plan.dense, tuple(left_out))


def unpack_directory(path: Path | str, out: Path | str) -> Written:
    """Write a packed directory as a dense one: the tensors and files that it was made from, byte for byte.

    config.json loses the key that packing added. What transformers saved anew (`model.save_pretrained`) gives the same
    tensors, in transformers' own order and with its config.json. Raises ValueError, with nothing written, where the
    directory is not packed or its bytes are not those that were written; else as `write_model` does.
    """
    path, out = Path(path), Path(out)
    shards = Shards(path)
    if not is_packed(shards):
        raise ValueError(f"{path} is not packed: its config.json has no {_KEY} of quant_method {METHOD!r}")
    refuse_taken(out, path)
    weights = Weights(shards)
    damaged = weights.damaged()
    if damaged:
        raise ValueError(f"{path} is damaged:\n  " + "\n  ".join(damaged))
    with staged(out) as files:
        nbytes = sum(_write_dense(weights, name, files / name) for name in shards.files)
        copied, left_out = copy_others(path, files, frozenset({*shards.files, INDEX, CONFIG}))
        if (path / RECORD).is_file():
            (files / RECORD).write_bytes((path / RECORD).read_bytes())
        (files / CONFIG).write_bytes(without_key((path / CONFIG).read_bytes()))
        if shards.index is not None:
            (files / INDEX).write_text(_dense_index(weights), "utf-8", newline="")
    return Written(out, nbytes, len(weights.layers), tuple(copied), tuple(left_out))


# --- config.json -----------------------------------------------------------------------------------------------------


def with_key(config: bytes) -> bytes:
    """config.json with the one key that makes transformers ask for rarefy, its other bytes as they are.

    >>> with_key(b'{"a": 1}')
    b'{"a": 1,\\n  "quantization_config": {\\n    "quant_method": "rarefy",\\n    "version": 1\\n  }}'
    >>> without_key(with_key(b'{"a": 1}'))
    b'{"a": 1}'
    """
    said = json.loads(config)
    if said.get(_KEY) is not None:
        raise ValueError(f"config.json has a {_KEY} already: {said[_KEY]}. A quantised model cannot be packed as well.")
    text = config.decode()
    end = text.rindex("}")
    body = text[:end].rstrip()
    value = json.dumps(_VALUE, indent=2).replace("\n", "\n  ")
    added = f'{"" if body.endswith("{") else ","}\n  "{_KEY}": {value}'
    return (body + added + text[len(body) :]).encode()


def without_key(config: bytes) -> bytes:
    """The inverse of `with_key`; a config.json that was written anew since is written without the key."""
    text = config.decode()
    found = _ADDED.search(text)
    if found is not None:
        return (text[: found.start()] + text[found.end() :]).encode()
    said = json.loads(text)
    said.pop(_KEY, None)
    return (json.dumps(said, indent=2, sort_keys=True) + "\n").encode()


# --- the weights -----------------------------------------------------------------------------------------------------


@dataclass
class _Plan:
    """layers: those that are packed, by their names in the files, with the dtype of their bias. modules: what the model
    calls them."""

    shards: Shards
    modules: dict[str, str]
    layers: dict[str, torch.dtype | None] = field(default_factory=dict[str, torch.dtype | None])
    dense: dict[str, str] = field(default_factory=dict[str, str])


def _plan(shards: Shards) -> _Plan:
    """Which layers are packed. Every tensor is read once, so that nothing is written where one is not finite."""
    found, others = loader().linear_layers(shards)
    plan = _Plan(shards, found, dense=dict(others))
    for name in shards:
        refuse_infinite(name, shards[name], shards.folder)
        layer = name.removesuffix(".weight")
        if layer == name or layer not in found:
            continue
        bias = f"{layer}.bias"
        kind = shards.kind(bias)[0] if bias in shards else None
        against = reason_against(shards[name])
        if against is None and kind is not None and kind not in (torch.float32, torch.bfloat16, torch.float16):
            against = f"its bias is of {kind}"
        if against is None:
            plan.layers[layer] = kind
        else:
            plan.dense[layer] = against
    if not plan.layers:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(plan.dense.items())[:3])
        raise ValueError(f"{shards.folder}: no layer gains by being packed ({why or 'it has no nn.Linear layer'})")
    return plan


def _parts(plan: _Plan, shard: Shard) -> tuple[list[str], list[str], list[str]]:
    """Of a shard: layers whose weight it holds and that are packed, those whose bias, and the other tensors."""
    weights = [name.removesuffix(".weight") for name in shard.table if name.endswith(".weight")]
    weights = [layer for layer in weights if layer in plan.layers]
    biases = [name.removesuffix(".bias") for name in shard.table if name.endswith(".bias")]
    biases = [layer for layer in biases if layer in plan.layers]
    gone = {f"{layer}.weight" for layer in weights} | {f"{layer}.bias" for layer in biases}
    return weights, biases, [name for name in shard.table if name not in gone]


def _names(plan: _Plan, shard: Shard) -> list[str]:
    """The tensors of the packed file: packed weights first, whose lengths are multiples of 64 bytes, then by width."""
    weights, biases, others = _parts(plan, shard)
    others.sort(key=lambda name: -plan.shards.kind(name)[0].itemsize)
    return [*(layer + PACKED_WEIGHT for layer in weights), *others, *(layer + PACKED_BIAS for layer in biases)]


def _longest(module: str) -> PackedEntry:
    """What takes most room in a header."""
    kind: Any = "bfloat16"
    return PackedEntry(
        module=module, in_features=2**40, out_features=2**40, weight_dtype=kind, bias_dtype=kind, form=999, block=999
    )


def _write_packed(plan: _Plan, file: str, path: Path) -> int:
    """One file, a tensor at a time; returns its bytes."""
    shard = plan.shards.files[file]
    header = shard.header[8:].decode()
    first = next(iter(plan.shards.files)) == file
    index = None if plan.shards.index is None or not first else plan.shards.index.decode()
    layers: dict[str, PackedEntry] = {}
    sides = {name: len(plan.shards.kind(name)[1]) if name in plan.shards else 1 for name in _names(plan, shard)}
    draft = Said(
        layers={layer: _longest(plan.modules[layer]) for layer in _parts(plan, shard)[0]},
        checksums=dict.fromkeys(sides, 2**32), header=header, index=index,
    )  # fmt: skip
    with Stream(path, sides, draft.metadata()) as stream:
        for name in sides:
            layer = name.removesuffix(PACKED_WEIGHT)
            if layer != name and layer in plan.layers and name not in plan.shards:
                weight, bias = shard.tensor(f"{layer}.weight"), plan.layers[layer]
                stored, layers[layer] = pack_weight(plan.modules[layer], weight, bias)
                stream.add(name, stored.bytes)
            elif name in plan.shards:
                stream.add(name, shard.tensor(name))
            else:
                values = shard.tensor(name.removesuffix(PACKED_BIAS) + ".bias")
                stream.add(name, values.contiguous().view(torch.uint8))
        said = Said(layers=layers, checksums=stream.sums, header=header, index=index)
        return stream.finish(said.metadata())


def _write_dense(weights: Weights, file: str, path: Path) -> int:
    """One file as it was before it was packed; returns its bytes."""
    shard, said = weights.shards.files[file], weights.said.get(file)
    if said is not None and said.header is not None:
        text = said.header.encode()
        return write_raw(path, len(text).to_bytes(8, "little") + text, _in_order(weights, json.loads(said.header)))
    names = [_dense_name(weights, name) for name in shard.table]
    table: Table = {}
    end = 0
    for name in names:
        each = weights[name]
        last = end + each.numel() * each.element_size()
        table[name] = {"dtype": NAMES[each.dtype], "shape": list(each.shape), "data_offsets": [end, last]}
        end = last
    return write_raw(path, header_of(table, {"format": "pt"}), (weights[name] for name in names))


def _in_order(weights: Weights, table: dict[str, Any]) -> Iterator[Tensor]:
    table.pop("__metadata__", None)
    for name in sorted(table, key=lambda name: table[name]["data_offsets"]):
        if name not in weights:
            raise ValueError(f"{weights.shards.folder}: there is no tensor {name!r}: the directory is damaged")
        yield weights[name]


def _dense_name(weights: Weights, name: str) -> str:
    for leaf, dense in ((PACKED_WEIGHT, ".weight"), (PACKED_BIAS, ".bias")):
        if name.endswith(leaf) and name.removesuffix(leaf) in weights.layers:
            return name.removesuffix(leaf) + dense
    return name


def _index(where: Mapping[str, str], size: int) -> str:
    """As transformers writes it."""
    index = {"metadata": {"total_size": size}, "weight_map": dict(where)}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _dense_index(weights: Weights) -> str:
    """The index that the dense directory had, or one made anew."""
    kept = [said.index for said in weights.said.values() if said.index is not None]
    if kept:
        return kept[0]
    files = weights.shards.files
    where = {_dense_name(weights, name): file for file, shard in files.items() for name in shard.table}
    return _index(where, sum(each.numel() * each.element_size() for each in weights.values()))
