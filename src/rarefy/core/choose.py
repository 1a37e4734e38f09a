"""mask = pattern.project(score, budget(allocation, schedule(step))): the one formula behind nearly every method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from rarefy.axes import Allocation, Global, Layer, Pool
from rarefy.core.sites import Site
from rarefy.core.sparse.site import SparseSite

How = Pool | Literal["first"]
"""How the scores in a unit become one; "first" takes that of its first weight (one random draw stands for the unit)."""


def allocate(
    sites: Sequence[Site], allocation: Allocation, sparsity: float | None, units: Mapping[Site, Tensor] | None
) -> dict[Site, int]:
    """Units of its pattern that each site keeps. `units`: pooled scores by site, for allocations that need them.

    Patterns that fix their own count (n:m) ignore sparsity and allocation. Raises ValueError when sparsity is missing,
    and for an allocation that follows inputs, which are not known here.
    """
    free = [s for s in sites if not s.pattern.fixed]
    found = {s: s.pattern.asked(s.pattern_shape, None) for s in sites if s.pattern.fixed}
    if free:
        if sparsity is None:
            raise ValueError(
                f"sparsity=None, but the pattern {free[0].pattern} of {free[0].name!r} does not say how many weights "
                'to keep: give sparsity=0.9, say, or an n:m pattern such as pattern="2:4".'
            )
        layers = [Layer(s.name, s.shape, s.pattern.units(s.pattern_shape), s.pattern) for s in free]
        scores = [units[s] for s in free] if units is not None and allocation.needs_scores else None
        found.update(zip(free, allocation.counts(layers, sparsity, scores), strict=True))
    elif allocation.needs_inputs:
        allocation.counts([], 0.0)  # raises: n:m or not
    return {site: found[site] for site in sites}


def pooled(site: Site, score: Tensor, how: How = "mean_abs") -> Tensor:
    """Scores of the site's units, after a check that they are finite. Raises ValueError naming the site."""
    refuse_infinite(site.name, score, "scores")
    canonical = site.canonical(score)
    return site.pattern.members(canonical)[:, 0] if how == "first" else site.pattern.pool(canonical, how)


def project(
    scores: Mapping[Site, Tensor],
    how: How,
    allocation: Allocation,
    sparsity: float | None,
    *,
    nested: Mapping[Site, Tensor] | None = None,
    into: Callable[[Tensor], Tensor] = lambda mask: mask,
) -> dict[Site, Tensor]:
    """Masks in the weights' shapes for scores in the weights' shapes. nested: masks whose false units stay masked.
    into: given each mask as soon as it is made; returns the same one, elsewhere.

    Each site remembers as `asked` how many units it was to keep. Scores are asked for once, in their order, and let go
    one after the other where the allocation does not compare them.
    """
    sites = list(scores)
    together = sites if nested is not None or _compares(sites, allocation) else []
    units = {site: pooled(site, scores[site], how) for site in together}
    if nested is None:
        counts = allocate(sites, allocation, sparsity, units)
    else:
        kept = {site: units_of(site, nested[site]) for site in sites}
        ranked = {site: _masked_last(units[site], kept[site]) for site in sites}
        # Only the order matters to `Global`; LAMP needs sizes, and what is masked has none.
        counts = allocate(sites, allocation, sparsity, ranked if _ranks(allocation) else units)
        counts = _within(counts, {site: int(kept[site].sum()) for site in sites})
        units = ranked
    masks = {s: into(fill(s, None, units[s] if together else pooled(s, scores[s], how), counts[s])) for s in sites}
    for site in sites:
        site.asked = counts[site]
    return masks


def fill(site: Site, keep: Tensor | None, units: Tensor, count: int) -> Tensor:
    """The mask, in the weight's shape, that keeps the units `keep` and the best others up to `count` in all."""
    chosen = site.pattern.fill(keep, units, count, site.pattern_shape)
    return site.restore(site.pattern.spread(chosen, site.pattern_shape))


def kept_weights(site: Site, mask: Tensor | None, how: How = "mean_abs") -> Tensor:
    """Pooled weights of the units that `mask` (None: the present one) keeps, 1-D, in the order of the units."""
    if isinstance(site, SparseSite):
        refuse_infinite(site.name, site.values, "weights")
        return site.pattern.pool(site.values.view(1, -1), "mean" if how == "first" else how)
    return pooled(site, site.weight, how)[units_of(site, site.mask if mask is None else mask)]


def exchanged(site: Site, mask: Tensor | None, stay: Tensor, scores: Iterable[Tensor], how: How = "mean_abs") -> Tensor:
    """What `s.keep` takes: of the units that `mask` (None: the present one) keeps those in `stay`, and the best others.

    stay: bool, for each kept unit. scores: of all weights in chunks of rows, from the first, as
    `s.dense_gradient_rows` and `scoring.random_rows` give them. As many units are kept as before.
    """
    if isinstance(site, SparseSite):
        return site.exchanged(stay, (pooled(site, part, how) for part in scores))
    active = units_of(site, site.mask if mask is None else mask)
    keep = torch.zeros_like(active)
    keep[active] = stay
    (score,) = scores
    return fill(site, keep, pooled(site, score, how), len(stay))


def units_of(site: Site, mask: Tensor) -> Tensor:
    """Boolean: the units of the site's pattern that a mask keeps."""
    return site.pattern.gather(site.canonical(mask))


def reachable(site: Site, asked: int) -> int:
    """Units that the pattern can keep of `asked` (constant fan-in: rows·⌊asked/rows⌋)."""
    scores = torch.zeros(site.pattern.units(site.pattern_shape))
    return int(site.pattern.fill(None, scores, asked, site.pattern_shape).sum())


def _compares(sites: Sequence[Site], allocation: Allocation) -> bool:
    """Whether the scores of all sites are needed to know how many units one of them keeps."""
    return allocation.needs_scores and not all(site.pattern.fixed for site in sites)


def _ranks(allocation: Allocation) -> bool:
    while (within := getattr(allocation, "allocation", None)) is not None:  # a floor under another allocation
        allocation = within
    return type(allocation) is Global


def _masked_last(units: Tensor, kept: Tensor) -> Tensor:
    """Masked units rank below all others, even below kept ones that score zero too."""
    lowest = units.min() if units.numel() else units.new_zeros(())
    return torch.where(kept, units, lowest - lowest.abs() - 1)


def _within(counts: dict[Site, int], kept: Mapping[Site, int]) -> dict[Site, int]:
    """No site keeps more than it has left; what it cannot take goes to the sites with most room.

    Rounding can ask for one more than before (largest remainder), ties at zero for some more (LAMP).
    """
    found = dict(counts)
    free = [site for site in counts if not site.pattern.fixed]
    for site in free:
        if found[site] > kept[site] and reachable(site, found[site]) > kept[site]:
            found[site] = kept[site]
    over = sum(counts.values()) - sum(found.values())
    for site in sorted(free, key=lambda site: found[site] - kept[site]):
        given = min(over, max(0, kept[site] - found[site]))
        found[site] += given
        over -= given
    return found


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
