"""mask = pattern.project(score, budget(allocation, schedule(step))): the one formula behind nearly every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.axes import Allocation, Global, Layer
from rarefy.core.sites import Site


def allocate(
    sites: Sequence[Site], allocation: Allocation, sparsity: float | None, units: Mapping[Site, Tensor] | None
) -> dict[Site, int]:
    """Units of its pattern that each site keeps. `units`: pooled scores by site, for allocations that need them.

    Patterns that fix their own count (n:m) ignore sparsity and allocation. Raises ValueError when sparsity is missing.
    """
    free = [s for s in sites if not s.pattern.fixed]
    found = {s: s.pattern.asked(s.pattern_shape, None) for s in sites if s.pattern.fixed}
    if free:
        if sparsity is None:
            raise ValueError(
                f"sparsity=None, but the pattern {free[0].pattern} of {free[0].name!r} does not say how many weights to "
                'keep: give sparsity=0.9, say, or an n:m pattern such as pattern="2:4".'
            )
        layers = [Layer(s.name, s.shape, s.pattern.units(s.pattern_shape), s.pattern) for s in free]
        scores = [units[s] for s in free] if units is not None and allocation.needs_scores else None
        found.update(zip(free, allocation.counts(layers, sparsity, scores), strict=True))
    for site in sites:
        site.asked = found[site]
    return found


def pooled(site: Site, score: Tensor, how: Any) -> Tensor:
    """Scores of the site's units, after a check that they are finite. Raises ValueError naming the site."""
    refuse_infinite(site.name, score, "scores")
    return site.pattern.pool(site.canonical(score), how)


def project(
    scores: Mapping[Site, Tensor],
    how: Any,
    allocation: Allocation,
    sparsity: float | None,
    *,
    nested: Mapping[Site, Tensor] | None = None,
) -> dict[Site, Tensor]:
    """Masks in the weights' shapes for scores in the weights' shapes. nested: masks whose false units stay masked."""
    sites = list(scores)
    units = {site: pooled(site, scores[site], how) for site in sites}
    ranked = units if nested is None else {site: _masked_last(site, units[site], nested[site]) for site in sites}
    counts = allocate(sites, allocation, sparsity, ranked if _only_ranks(allocation) else units)
    return {site: fill(site, None, ranked[site], counts[site]) for site in sites}


def _only_ranks(allocation: Allocation) -> bool:
    """Whether only the order of scores matters (LAMP needs their size, and zero for what is masked)."""
    return isinstance(getattr(allocation, "allocation", allocation), Global)


def fill(site: Site, keep: Tensor | None, units: Tensor, count: int) -> Tensor:
    """The mask, in the weight's shape, that keeps the units `keep` and the best others up to `count` in all."""
    chosen = site.pattern.fill(keep, units, count, site.pattern_shape)
    return site.restore(site.pattern.spread(chosen, site.pattern_shape))


def units_of(site: Site, mask: Tensor) -> Tensor:
    """Boolean: the units of the site's pattern that a mask keeps."""
    return site.pattern.gather(site.canonical(mask))


def _masked_last(site: Site, units: Tensor, mask: Tensor) -> Tensor:
    """Masked units rank below all others, even below kept ones that score zero too."""
    lowest = units.min() if units.numel() else units.new_zeros(())
    return torch.where(units_of(site, mask), units, lowest - lowest.abs() - 1)


def refuse_infinite(name: str, tensor: Tensor, what: str) -> None:
    """Raise ValueError, with counts, unless every entry is finite."""
    if tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor)  # NaN wins in both; two vectorised passes instead of a boolean tensor
    if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
        return
    nan, infinite = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    raise ValueError(
        f"{what} of {name!r} hold {nan} NaN and {infinite} infinite values of {tensor.numel()}; masks are chosen from "
        "finite numbers only. Nothing was changed: look for a diverged run, a damaged checkpoint or an overflow."
    )
