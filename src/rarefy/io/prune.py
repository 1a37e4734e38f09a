"""From a model directory to a pruned one: `prune` reads, calibrates, chooses, writes, and tells what was kept.

Pruned are the weights of Linear layers (and what else `find_sites` chooses) inside the repeated blocks of the model:
embeddings, norms, routers' biases and the head stay as they are, unless `only` names them. A block-wise method notes
its finished blocks in a journal beside OUT: killed at any point, the same call continues at the block where it stopped.
From there too its weights and masks are mapped once a block is finished, and the source's files are mapped from the
beginning: what is in memory is the block at work, its statistics and the activations between two blocks. (Where
transformers copies weights as it loads them, fused experts, or where another dtype is asked for, it is the model too.)
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.axes import PerLayer
from rarefy.core.capture import default_sites
from rarefy.core.method import Method, Progress
from rarefy.core.sites import Selector, find_sites
from rarefy.core.sparsify import sparsify
from rarefy.io.calibration import SAMPLES, Bos, Calibration, default_length, windows
from rarefy.io.collect import collect
from rarefy.io.directory import read_model, write_model
from rarefy.io.folder import partial_of
from rarefy.io.full import is_full, said_when_full
from rarefy.io.journal import Journal
from rarefy.io.packed import write_packed
from rarefy.io.pretrained import context_length, read_config, read_tokenizer
from rarefy.io.pruned import Kind, Pruned, asked_of, by_kind, innermost, planned, used_of
from rarefy.io.record import CalibrationRecord, Record

__all__ = ["Kind", "Pruned", "prune"]

PathLike = str | os.PathLike[str]
Selectors = Selector | Iterable[Selector] | None


def prune(
    model_dir: PathLike,
    out: PathLike | None,
    method: Method,
    *,
    calibration: PathLike | Calibration | Iterable[Any] | None = None,
    length: int | None = None,
    samples: int = SAMPLES,
    field: str | None = None,
    bos: Bos = "window",
    only: Selectors = None,
    skip: Selectors = None,
    shares: Mapping[str, float] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    packed: bool = False,
    progress: Progress | None = None,
) -> Pruned:
    """Prune the model of a directory by a method that needs no training, and write it to another.

    Args:
        model_dir: as save_pretrained writes it. It is only read.
        out: an empty or new folder, which appears when it is complete; None: a dry run, that says what would be pruned.
        method: any that needs nothing or `data`: Magnitude, Wanda, ...
        calibration: a file of text or token batches, as `rarefy.io.calibration.windows` takes them, or its result;
            for methods that need `data`.
        length, samples, field, bos: of the windows; the length is by default the model's context, 2048 at most.
        only, skip: which weights, as in `rarefy.sparsify`; by default all sites in repeated blocks.
        shares: sparsities of "attention" and "mlp" that go before the method's own, for methods with an allocation.
        seed: of everything random here, the windows too.
        dtype: to compute in; what is written keeps the stored dtype.
        packed: write the packed format, which `import rarefy` lets transformers load.
        progress: called with (blocks done, blocks, name of the next).

    Raises ValueError for anything that cannot be, OSError for files that cannot be read or written; nothing is written.
    """
    begin = time.perf_counter()
    source, target = Path(model_dir), None if out is None else Path(out)
    config = read_config(source)
    _refuse(source, target, method)
    data = None
    if "data" in method.needs and target is not None:
        data = _calibrated(calibration, source, config, length, samples, seed, field, bos)
    model = read_model(source)
    if dtype is not None:
        model.to(dtype)
    names = chosen_sites(model, only, skip)
    method = _shared(method, names, shares)
    parameters = sum(p.numel() for p in model.parameters())

    def told(kinds: tuple[Kind, ...], parameters: int, nonzero: int | None, used: dict[str, Any] | None) -> Pruned:
        pattern, seconds = str(getattr(innermost(method), "pattern", "–")), time.perf_counter() - begin
        return Pruned(source, target, method.to_dict(), pattern, kinds, parameters, nonzero, used, seconds)

    if target is None:
        kinds = planned(find_sites(model, only=names), method)
        return told(kinds, parameters, None, None)
    said = {"model": _files_of(source), "method": method.to_dict(), "sites": names, "seed": seed, "dtype": str(dtype)}
    with said_when_full(target):
        with _journal(target, {**said, "calibration": None if data is None else data.sha256}) as journal:
            sparsity = sparsify(
                model, method, data=_batches(data, config), only=names, seed=seed, progress=progress, journal=journal
            )
            saw = None if data is None else CalibrationRecord(sha256=data.sha256, settings=data.settings)
            changes, record = collect(
                model, sparsity, source, calibration=saw, settings={"seed": seed}, spill=journal.spill
            )
        _write(source, target, changes, record, packed)
    nonzero = sum(int(torch.count_nonzero(p)) for p in model.parameters())  # without a mask of a model's size
    kinds = by_kind([(s, asked_of(s), sparsity.kept(s)) for s in sparsity.sites])
    return told(kinds, parameters, nonzero, used_of(data))


def chosen_sites(model: nn.Module, only: Selectors = None, skip: Selectors = None) -> list[str]:
    """Names of the sites that are pruned: those inside repeated blocks where there are some, unless `only` says which.

    Raises ValueError as `find_sites`.
    """
    sites = find_sites(model, only=only, skip=skip)
    return [site.name for site in (sites if only is not None else default_sites(model, sites))]


# --- before anything is read -----------------------------------------------------------------------------------------


def _refuse(source: Path, out: Path | None, method: Method) -> None:
    """What cannot be, as far as it is known without the weights."""
    missing = method.needs - {"data"}
    if missing:
        raise ValueError(
            f"{method} needs {', '.join(sorted(missing))}: a directory is pruned without training, by methods that "
            "need no more than data, such as magnitude or wanda"
        )
    first = innermost(method)
    pattern = getattr(first, "pattern", None)
    if pattern is not None and not pattern.fixed and first.sparsity is None:
        raise ValueError(
            f"the pattern {pattern} does not say how many weights to keep: give a sparsity, or an n:m pattern"
        )
    if out is None:
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: give a new one, or empty it first")
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{out} lies in {source}, which is only read: give a folder elsewhere")


def _calibrated(
    calibration: Any,
    source: Path,
    config: Any,
    length: int | None,
    samples: int,
    seed: int,
    field: str | None,
    bos: Bos,
) -> Calibration:
    if calibration is None:
        raise ValueError(
            "this method needs calibration data: give a file of text, JSON lines or parquet (--calibration)"
        )
    if isinstance(calibration, Calibration):
        return calibration
    context = context_length(config)
    if length is not None and context is not None and length > context:
        raise ValueError(
            f"windows of {length} tokens are longer than the model's context of {context}: --length {context}"
        )
    tokenizer = read_tokenizer(source) if isinstance(calibration, str | os.PathLike) else None
    return windows(calibration, tokenizer, length or default_length(context), samples, seed, field=field, bos=bos)


# --- what is asked of the model --------------------------------------------------------------------------------------


def _batches(data: Calibration | None, config: Any) -> list[dict[str, Tensor]] | None:
    """With what a decoder is fed where there is one: the same tokens."""
    if data is None:
        return None
    if not getattr(config, "is_encoder_decoder", False):
        return data.batches
    return [{"decoder_input_ids": batch["input_ids"], **batch} for batch in data]


def _shared(method: Method, names: list[str], shares: Mapping[str, float] | None) -> Method:
    """The method with sparsities of its own for attention and MLP."""
    if not shares:
        return method
    first = innermost(method)
    if not hasattr(first, "allocation") or first.pattern.fixed:
        raise ValueError(
            f"{method} takes no shares for attention and MLP apart: its pattern or method fixes the counts"
        )
    by_name = {name: shares[part] for name in names if (part := part_of(name)) in shares}
    for part in shares:
        if not any(part_of(name) == part for name in names):
            raise ValueError(f"--{part} {shares[part]}: no weight of {part} is among {', '.join(names[:6])}, …")
    return _allocated(method, PerLayer(by_name))


def _allocated(method: Any, allocation: PerLayer) -> Any:
    if innermost(method) is method:
        return dataclasses.replace(method, allocation=allocation)
    return dataclasses.replace(method, method=_allocated(method.method, allocation))


def part_of(name: str) -> str:
    """Whether a weight is of "attention" or "mlp", by the names of the modules that it is in.

    >>> part_of("model.layers.0.self_attn.q_proj.weight"), part_of("h.3.mlp.c_fc.weight")
    ('attention', 'mlp')
    """
    return "attention" if any("attn" in p or "attention" in p for p in name.lower().split(".")) else "mlp"


@contextmanager
def _journal(out: Path, settings: Mapping[str, Any]) -> Iterator[Journal]:
    """Kept, if a block is in it, where the run is interrupted and where the disk is full; else nothing stays behind."""
    journal = Journal.of(out, settings, lean=True)  # the model is this call's own
    try:
        yield journal
    except BaseException as error:
        if journal.done() and (is_full(error) or not isinstance(error, Exception)):
            raise
        journal.remove()
        with suppress(OSError):  # something else lies there
            partial_of(out).rmdir()
        raise


def _files_of(source: Path) -> dict[str, list[int]]:
    """Sizes and times of the weights' files: whether it is still the model that an interrupted run read."""
    return {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(source.glob("*.safetensors"))}


# --- what is written -------------------------------------------------------------------------------------------------


def _write(source: Path, out: Path, changes: Mapping[str, Tensor], record: Record, packed: bool) -> None:
    if not packed:
        write_model(source, out, changes, record)
        return
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as folder:
        dense = Path(folder) / "dense"
        write_model(source, dense, changes, record)
        write_packed(dense, out)
