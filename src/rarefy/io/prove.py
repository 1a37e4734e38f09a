"""`check_directory`: what `rarefy.json` says of a directory is what its tensors are. `check`: that, or a model's."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from rarefy.core import Sparsity, bits
from rarefy.core import check as check_model
from rarefy.io.record import Record, SiteRecord, digest, read_record
from rarefy.io.shards import Shards, refuse_infinite
from rarefy.io.weights import Weights


def check(model: nn.Module | str | os.PathLike[str], sparsity: Sparsity | None = None) -> None:
    """Prove every promise of a sparsified model and its handle, or of a pruned directory; raise RuntimeError else.

    model: a model, with the handle that `sparsify` returned, or the path of a directory, dense or packed. For a model:
    the masked weights (and followers) are all +0.0, every mask obeys its pattern and keeps exactly what was asked, kept
    weights are those of the master behind them, the parameters are those that are held, and a method that works during
    training is attached. For a directory, see `check_directory`. The error lists every broken promise with names and
    counts.

    >>> import torch
    >>> from rarefy import Magnitude, sparsify
    >>> layer = nn.Linear(8, 4)
    >>> handle = sparsify(layer, Magnitude(sparsity=0.5))
    >>> check(layer, handle)
    >>> layer.weight.data.fill_(1.0)[0, 0].item()
    1.0
    >>> check(layer, handle)
    Traceback (most recent call last):
    RuntimeError: 1 promise of Magnitude(sparsity=0.5) is broken:
      weight: 16 of 16 masked values are not +0.0
    """
    if not isinstance(model, nn.Module):
        if sparsity is not None:
            raise ValueError("a directory is proved by its own rarefy.json: check(path), without a handle")
        check_directory(model)
        return
    if sparsity is None:
        raise ValueError("check(model) needs the handle too: check(model, sparsity), as sparsify returned it")
    check_model(model, sparsity)


def check_directory(path: str | os.PathLike[str]) -> Record:
    """Prove a pruned directory, dense or packed, and return its record.

    Every site keeps exactly the recorded weights, at the recorded places, in the recorded pattern; what is not kept is
    +0.0; no tensor has NaN or infinite entries; config.json has no sparsity_config. A packed directory's tensors have
    the checksums that they were written with. Raises RuntimeError that lists every broken promise (site, asked, seen);
    ValueError where the directory or rarefy.json cannot be read.
    """
    folder = Path(path)
    shards = Shards(folder)
    record = read_record(folder)
    broken = broken_promises(shards, record)
    if broken:
        noun, verb = ("promise", "is") if len(broken) == 1 else ("promises", "are")
        lines = "\n".join(f"  {line}" for line in broken)
        raise RuntimeError(f"{len(broken)} {noun} of {folder} {verb} broken:\n{lines}")
    return record


def broken_promises(shards: Shards, record: Record) -> list[str]:
    """All that is wrong, a line each."""
    weights = Weights(shards)
    broken = record.problems() + weights.damaged()
    if "sparsity_config" in shards.config:
        broken.append("config.json: it has a sparsity_config, which loaders refuse")
    sites = {site.name: site for site in record.sites}
    for name in sites.keys() - set(weights):
        broken.append(f"{name}: there is no such tensor")
    for name in weights:
        tensor = weights[name]
        try:
            refuse_infinite(name, tensor)
        except ValueError as error:
            broken.append(str(error).partition(":")[0])
            continue
        if name in sites:
            broken += _site(sites[name], tensor)
    return broken


def _site(site: SiteRecord, weight: Tensor) -> Iterable[str]:
    if list(weight.shape) != site.shape:
        yield f"{site.name}: recorded shape {site.shape}, seen {list(weight.shape)}"
        return
    mask = site.mask_of(weight)
    kept = bits.count(mask)
    negative = bits.count(bits.as_bits(weight).ne(0) & ~mask)
    if negative:
        yield f"{site.name}: {negative} of {site.total - site.kept} weights that are not kept are −0.0, not +0.0"
    if (kept, mask.numel()) != (site.kept, site.total):
        yield f"{site.name}: {site.kept} of {site.total} weights were recorded as kept, {kept} of {mask.numel()} are"
    elif digest(mask) != site.mask:
        yield f"{site.name}: as many weights as recorded are kept, {kept}, but other ones"
    pattern = site.read_pattern()
    canonical = mask if pattern.elementwise else site.read_layout().canonical(mask)
    if kept != mask.numel() and not pattern.legal(canonical):
        yield f"{site.name}: the weights that are kept do not obey the pattern {pattern}"
