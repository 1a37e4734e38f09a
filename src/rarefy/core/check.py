"""`check(model, sparsity)`: prove every promise, or name what is broken, with counts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rarefy.core import bits
from rarefy.core.choose import reachable
from rarefy.core.commit import reshard
from rarefy.core.held import Held, local
from rarefy.core.sites import Site
from rarefy.core.sparse.site import SparseSite
from rarefy.core.sparse.structure import Structure
from rarefy.core.sparsity import Sparsity


def check(model: nn.Module, sparsity: Sparsity) -> None:
    """`rarefy.check` of a model: raise RuntimeError that lists every broken promise, with names and counts."""
    reshard(model)
    broken = _parameters(model, sparsity)
    if not broken:
        for site in sparsity.sites:
            broken += _mask(site) + [p for held in (site.held, *site.followers) for p in _zeros(held)] + _master(site)
            broken += _structure(site) if isinstance(site, SparseSite) else []
    if "optimizer" in sparsity.method.needs and not sparsity.attached and not sparsity.ended:
        broken.append("no optimizer is attached, so nothing holds zeros while training: call attach(optimizer, steps)")
    if broken:
        noun, verb = ("promise", "is") if len(broken) == 1 else ("promises", "are")
        lines = "\n".join(f"  {line}" for line in broken)
        raise RuntimeError(f"{len(broken)} {noun} of {sparsity.method} {verb} broken:\n{lines}")


def _parameters(model: nn.Module, sparsity: Sparsity) -> list[str]:
    found = dict(model.named_parameters(remove_duplicate=False))
    broken: list[str] = []
    for held in sparsity.held():
        parameter = found.get(held.name)
        if parameter is None:
            broken.append(f"{held.name}: the model has no such parameter (another model, or it was replaced)")
        elif parameter is not held.parameter:
            broken.append(f"{held.name}: the parameter was replaced after sparsify: attach again")
    return broken


def _zeros(held: Held) -> list[str]:
    if held.keep is None:
        return []
    masked = held.keep.eq(0)
    wrong = bits.count(bits.as_bits(local(held.parameter)).ne(0) & masked)
    return [f"{held.name}: {wrong} of {bits.count(masked)} masked values are not +0.0"] if wrong else []


def _master(site: Site) -> list[str]:
    if site.master is None:
        return []
    differ = local(site.parameter).detach().ne(site.master)
    if site.held.keep is not None:
        differ &= site.held.keep.ne(0)
    wrong = bits.count(differ)
    if not wrong:
        return []
    return [
        f"{site.name}: {wrong} kept weights were written to and the next step will undo it: attach again to keep them"
    ]


def _mask(site: Site) -> list[str]:
    broken: list[str] = []
    mask = site.canonical(site.mask)
    full_mask = bool(mask.all())  # a soft phase: nothing is masked yet
    if not full_mask and not site.pattern.legal(mask):
        broken.append(f"{site.name}: the mask does not obey the pattern {site.pattern}")
    units = bits.count(site.pattern.gather(mask))
    if site.asked is not None and units != reachable(site, site.asked):
        broken.append(f"{site.name}: {units} units of {site.pattern} are kept, {site.asked} were asked for")
    if not _inside(site.held.keep, site.held.train):
        broken.append(f"{site.name}: gradients do not reach all kept weights")
    return broken


def _structure(site: SparseSite) -> list[str]:
    """Of a layer that runs sparse: zeros do not exist there, if its arrays are what they should be."""
    structure, rows = site.structure, site.structure.by_row
    try:
        expected = Structure.of_columns(rows.columns, rows.starts, *site.stored_shape)
    except ValueError as error:
        return [f"{site.name}: the structure is damaged: {error}"]
    broken: list[str] = []
    if len(site.values) != expected.nonzeros:
        broken.append(f"{site.name}: {len(site.values)} values for {expected.nonzeros} non-zeros")
    column = structure.by_column
    same = torch.equal(structure.order, expected.order) and torch.equal(column.columns, expected.by_column.columns)
    if not same or not torch.equal(column.starts, expected.by_column.starts):
        broken.append(f"{site.name}: the transposed structure is not that of the weight")
    if site.layer.waits:
        broken.append(f"{site.name}: the weights of the moment that was resumed have not been loaded")
    return broken


def _inside(keep: Tensor | None, train: Tensor | None) -> bool:
    return train is None or (keep is not None and not bool((keep.ne(0) & train.eq(0)).any()))
