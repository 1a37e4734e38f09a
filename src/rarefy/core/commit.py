"""Staged masks take effect: weights, gradients, optimizer state, followers and the ledger move together."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rarefy.core import bits
from rarefy.core.held import Everywhere, Held, local, shard
from rarefy.core.optimizers import owner, reset_state
from rarefy.core.sites import Site
from rarefy.core.sparse.linear import SparseLinear
from rarefy.core.sparse.move import move
from rarefy.core.sparse.site import SparseSite

if TYPE_CHECKING:
    import rarefy.core.sparsity

Staged = tuple[Tensor, Tensor | Everywhere | None]
"""A mask, and where gradients reach the optimizer (None: where the mask is true). Of a site under sparse execution the
positions of the kept weights (int64, ascending) stand for the mask."""


def refuse_misfit(site: Site, mask: Tensor) -> None:
    """Raise ValueError for what cannot be staged as a mask of the site."""
    shape, device = site.stored_shape, site.parameter.device
    if isinstance(site, SparseSite) and mask.dtype == torch.int64:
        return  # positions
    if (mask.dtype, tuple(mask.shape), mask.device) != (torch.bool, shape, device):
        raise ValueError(
            f"mask of {site.name!r}: expected bool of shape {shape} on {device}, "
            f"got {mask.dtype} of {tuple(mask.shape)} on {mask.device}."
        )


def commit(s: rarefy.core.sparsity.Sparsity, staged: MutableMapping[int, Staged]) -> None:
    """Apply every staged mask, taken out of `staged` one by one, and note the counts in the ledger."""
    first = not s.ledger.entries
    kept = [s.kept(site) for site in s.sites]
    flips = 0
    for index in list(staged):
        site, (mask, trainable) = s.sites[index], staged.pop(index)
        if isinstance(site, SparseSite):
            flips += _apply_sparse(s, site, mask)
            kept[index] = len(mask)
        else:
            flips += _apply(s, site, mask, trainable)
            kept[index] = bits.count(mask)
    s.ledger.record(s.ledger.steps, kept, [_trained(site, kept[site.index]) for site in s.sites], 0 if first else flips)


def _apply(s: rarefy.core.sparsity.Sparsity, site: Site, mask: Tensor, trainable: Tensor | Everywhere | None) -> int:
    held = site.held
    flips = bits.count(bits.differ(site.mask, mask))
    before = held.train
    held.set(mask, trainable)
    if s.lean:
        held.move(s.spill)
    if site.master is not None:
        with torch.no_grad():
            local(site.parameter).copy_(site.master)
        _move_state(s, held, before)
        _clear(held)
    else:  # zeros first: state that copies the weight follows what it becomes
        _clear(held, weight=not s.lean)  # `move` has cleared it
        _move_state(s, held, before)
    for follower in site.followers:
        before = follower.train
        follow(site, follower, mask)
        _clear(follower)
        _move_state(s, follower, before)
    _note_explored(s, site, site.explored_bits(), s.spill(bits.pack(mask).cpu()))
    return flips


def _apply_sparse(s: rarefy.core.sparsity.Sparsity, site: SparseSite, positions: Tensor) -> int:
    explored = site.explored_bits()  # without a record, what is kept now
    flips = move(site, positions, s.optimizers)
    if flips:
        _note_explored(s, site, explored, site.structure.bits())
    return flips


def follow(site: Site, follower: Held, mask: Tensor) -> None:
    """A follower is kept where its output channel keeps any weight."""
    rows = site.canonical(mask).flatten(1).any(dim=1)
    follower.set(rows)


def _clear(held: Held, *, weight: bool = True) -> None:
    if weight:
        held.clear_weight()
    held.remask_gradient()


def _move_state(s: rarefy.core.sparsity.Sparsity, held: Held, before: Tensor | None) -> None:
    """Positions that became or ceased to be trainable start again from the optimizer's initial state."""
    if held.train is before:
        return
    optimizer = owner(s.optimizers, held.parameter)
    if optimizer is None:
        return
    changed = bits.differ(_bytes(before, held), _bytes(held.train, held))
    reset_state(optimizer, held, bits.encode(~changed, local(held.parameter)))


def reset_masked_state(s: rarefy.core.sparsity.Sparsity) -> None:
    """Initial optimizer state wherever gradients do not reach (an optimizer with a past was attached or loaded).

    Nothing moves if that past is this handle's own. Behind a master, weight decay gives state to weights that gradients
    do not reach; it moves none of them, and is left.
    """
    for held in (h for site in s.sites if site.master is None for h in (site.held, *site.followers)):
        optimizer = owner(s.optimizers, held.parameter)
        if optimizer is not None and held.train is not None:
            reset_state(optimizer, held, held.train)


def _note_explored(s: rarefy.core.sparsity.Sparsity, site: Site, before: Tensor | None, packed: Tensor) -> None:
    counts = s.ledger.explored_counts or [0] * len(s.sites)
    counts[site.index] = site.explore(packed if before is None else before | packed)
    s.ledger.explored_counts = counts


def _bytes(keep: Tensor | None, held: Held) -> Tensor:
    return keep if keep is not None else torch.full_like(local(held.parameter), -1, dtype=torch.int8)


def _trained(site: Site, kept: int) -> int:
    if site.held.train is site.held.keep:
        return kept
    return site.numel if site.held.train is None else bits.count(site.trainable)


# -- attaching -------------------------------------------------------------------------------------------------------


def find_parameters(s: rarefy.core.sparsity.Sparsity, model: nn.Module) -> dict[str, nn.Parameter]:
    """Every held parameter anew by its name (wrappers replace parameters). Raises ValueError naming what is missing."""
    reshard(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for held in s.held():
        found = parameters.get(held.name)
        if found is None or found.shape != held.parameter.shape:
            seen = "none" if found is None else f"one of shape {tuple(found.shape)}"
            raise ValueError(
                f"the model has no parameter {held.name!r} of shape {tuple(held.parameter.shape)} any more (found "
                f"{seen}): attach to the model that was sparsified, or sparsify the new one."
            )
    return {held.name: parameters[held.name] for held in s.held()}


def reshard(model: nn.Module) -> None:
    """Put the shards of a sharded model back in their place.

    Its root keeps gathered copies as its parameters after a forward pass without a backward one, and those are neither
    trained nor gathered anew.
    """
    for module in model.modules():
        if hasattr(module, "unshard") and hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def rebind(s: rarefy.core.sparsity.Sparsity, parameters: Mapping[str, nn.Parameter]) -> None:
    """Bind the handle to these parameters; masks and masters follow, to another device, dtype or sharding too."""
    for site in s.sites:
        _rebind_site(site, parameters)


def _rebind_site(site: Site, parameters: Mapping[str, nn.Parameter]) -> None:
    held, new = site.held, parameters[site.held.name]
    if isinstance(site, SparseSite):
        _refuse_other_layer(site, new)
        return
    if new is held.parameter and _beside(held.keep, new) and _beside(site.master, new, typed=True):
        return
    mask, trainable, master = site.mask.to(new.device), site.trainable.to(new.device), site.weight
    same = held.train is held.keep
    held.parameter = new
    held.set(mask, None if same else trainable)
    if site.master is not None:
        site.master = shard(master.to(new.device, new.dtype), new).clone()
    for follower in site.followers:
        follower.parameter = parameters[follower.name]
        follow(site, follower, mask)


def _refuse_other_layer(site: SparseSite, new: nn.Parameter) -> None:
    if new is not site.parameter or site.layer.values is not new or type(site.layer) is not SparseLinear:
        raise ValueError(
            f"the layer of {site.name!r} runs sparse, and its values were replaced by another parameter: the structure "
            "belongs to the layer that was sparsified. Sparsify the new model."
        )


def _beside(tensor: Tensor | None, parameter: nn.Parameter, *, typed: bool = False) -> bool:
    if tensor is None:
        return True
    return tensor.device == parameter.device and (not typed or tensor.dtype == parameter.dtype)


def settle(s: rarefy.core.sparsity.Sparsity) -> None:
    """What was written to weights while nobody watched: masters take it over, masked entries go back to +0.0."""
    with torch.no_grad():
        for site in s.sites:
            if site.master is not None:
                _adopt(site, site.master)
        for held in s.held():
            held.clear_weight()


def _adopt(site: Site, master: Tensor) -> None:
    projected = master.clone()
    if site.held.keep is not None:
        bits.clear_(projected, site.held.keep)
    weight = local(site.parameter)
    master.copy_(torch.where(weight.ne(projected), weight, master))
