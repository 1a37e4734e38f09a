"""Model directories: read one as a model, and write a pruned one that loads wherever the source did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.io.folder import copy_others, refuse_taken, staged
from rarefy.io.prove import broken_promises
from rarefy.io.record import Record
from rarefy.io.shards import INDEX, Shards, refuse_infinite, write_like

METHOD = "rarefy"
"""The quant_method of a packed directory."""


@dataclass(frozen=True)
class Written:
    """A directory that was written. left_out: files of the source that hold weights as they were, and do not fit."""

    path: Path
    nbytes: int
    changed: int
    copied: tuple[str, ...]
    left_out: tuple[str, ...]


def read_model(path: Path | str, *, check: bool = True) -> nn.Module:
    """The model of a directory: the class that config.json names, on the CPU, in the dtype that it is stored in.

    check: look for NaN and infinities, which reads every tensor once. A packed directory comes with packed layers.
    Raises FileNotFoundError or NotADirectoryError where there is no directory; ValueError where it is not one of a
    model, a shard is missing or cut short, weights are not finite, transformers has no such class, or the files lack
    tensors of the model; ModuleNotFoundError without transformers.
    """
    shards = Shards(Path(path))
    if check:
        for name in shards:
            refuse_infinite(name, shards[name], shards.folder)
    return loader().load(shards)


def write_model(source: Path | str, out: Path | str, changes: Mapping[str, Tensor], record: Record) -> Written:
    """Write the source's directory with some tensors changed; it loads without rarefy, as the source does.

    Same names, dtypes, shards, headers and index; config.json byte for byte; the tokenizer and all other files copied,
    but weights in other formats; `rarefy.json` added. changes: by the names in the source's files (`collect` makes
    them); they are asked for one at a time, so that a mapping may read them from a disk. Tensors of the source are read
    from its map, one at a time: memory is that of the largest. OUT appears when it is complete and has been proved as
    `check_directory` does.
    Raises ValueError, with nothing written, for everything that `Shards` refuses, names, shapes and dtypes that the
    source has not, weights that are not finite, and a record that the tensors contradict; FileExistsError where OUT is
    there and not empty; OSError where it cannot be written.
    """
    source, out = Path(source), Path(out)
    shards = Shards(source)
    refuse_packed(shards)
    refuse_taken(out, source)
    _refuse_others(shards, changes)

    def tensor(name: str) -> Tensor:
        found = changes[name] if name in changes else shards[name]
        if name in changes:
            _refuse_misfit(shards, name, found)
        refuse_infinite(name, found, "" if name in changes else source)
        return found

    with staged(out) as files:
        nbytes = sum(write_like(shard, files / name, tensor) for name, shard in shards.files.items())
        copied, left_out = copy_others(source, files, frozenset({*shards.files, INDEX}))
        if shards.index is not None:
            (files / INDEX).write_bytes(shards.index)
        record.write(files)
        broken = broken_promises(Shards(files), record)
        if broken:
            raise ValueError("the record and the tensors contradict each other:\n  " + "\n  ".join(broken))
    return Written(out, nbytes, len(changes), tuple(copied), tuple(left_out))


def is_packed(shards: Shards) -> bool:
    """Whether config.json says that the directory is packed by rarefy."""
    said: Any = shards.config.get("quantization_config")
    return isinstance(said, dict) and said.get("quant_method") == METHOD


def refuse_packed(shards: Shards) -> None:
    """Raises ValueError for a packed directory."""
    if is_packed(shards):
        raise ValueError(f"{shards.folder} is packed already; `rarefy unpack {shards.folder} -o DENSE` makes it dense")


def _refuse_others(shards: Shards, changes: Mapping[str, Tensor]) -> None:
    """Raises ValueError for names that the source has not."""
    unknown = sorted(name for name in changes if name not in shards)
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(changes)} changed tensors are not in {shards.folder}: {', '.join(unknown[:3])}"
            f"{', …' if len(unknown) > 3 else ''}. Names are those of its files (tied weights are there once): "
            "rarefy.io.collect finds them for a model."
        )


def _refuse_misfit(shards: Shards, name: str, tensor: Tensor) -> None:
    dtype, shape = shards.kind(name)
    if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
        raise ValueError(
            f"{name!r} is {dtype} {tuple(shape)} in {shards.folder}; changed to {tensor.dtype} {tuple(tensor.shape)}. "
            "Dtypes and shapes stay as they are: cast it back first."
        )


def loader() -> Any:
    """`rarefy.io.transformers`, which imports transformers."""
    try:
        from rarefy.io import transformers
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"reading a model needs {missing.name}: pip install 'rarefy[hf]'", name=missing.name
        ) from missing
    return transformers


def stored_dtype(shards: Shards) -> torch.dtype:
    """The dtype to load a directory in: that of most weights."""
    return shards.dtype or torch.get_default_dtype()
