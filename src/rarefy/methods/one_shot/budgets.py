"""How much each site keeps when layers are solved one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rarefy.axes import NM, OWL, Layer
from rarefy.axes.uniform import EachRounded
from rarefy.core.capture import blocks_of, dense_statistics
from rarefy.core.choose import allocate, units_of
from rarefy.core.sites import Site
from rarefy.core.sparsity import Sparsity
from rarefy.methods.one_shot.matrix import exact_share
from rarefy.methods.one_shot.views import permuted, to_matrix


class Budget(NamedTuple):
    """keep: units of the pattern in the site. sparsity: the exact share of units to drop."""

    keep: int
    sparsity: Fraction


def budgets(method: Any, s: Sparsity, given: Mapping[Site, Tensor]) -> dict[Site, Budget]:
    """For every site; where masks are given they say it. May set the sites' patterns (OWL with n:m)."""
    if given:
        return {site: _of(site, int(units_of(site, given[site]).sum())) for site in s.sites}
    if isinstance(method.allocation, OWL):
        return _by_outliers(method.allocation, method, s)
    counts = allocate(s.sites, method.allocation, method.sparsity, None)
    exact = _exact(method, s)
    return {
        site: Budget(_reachable(site, keep), exact.get(site, _of(site, keep).sparsity)) for site, keep in counts.items()
    }


def _exact(method: Any, s: Sparsity) -> dict[Site, Fraction]:
    """The decimals as written, where the allocation names one for each layer."""
    free = [site for site in s.sites if not site.pattern.fixed]
    if not free or not isinstance(method.allocation, EachRounded):
        return {}
    shares = method.allocation.sparsities(_layers(free), method.sparsity)
    return {site: exact_share(share) for site, share in zip(free, shares, strict=True)}


def _of(site: Site, keep: int) -> Budget:
    return Budget(keep, 1 - Fraction(keep, site.pattern.units(site.pattern_shape)))


def _reachable(site: Site, keep: int) -> int:
    """Constant fan-in keeps as many in each row."""
    return keep - keep % site.shape[0] if site.pattern.shorthand == "constant_fan_in" else keep


def _layers(sites: list[Site]) -> list[Layer]:
    return [Layer(s.name, s.shape, s.pattern.units(s.pattern_shape), s.pattern) for s in sites]


def _by_outliers(owl: OWL, method: Any, s: Sparsity) -> dict[Site, Budget]:
    """A dense pass for the outliers of each block, then its share."""
    if method.sparsity is None and not method.pattern.fixed:
        allocate(s.sites, owl, None, None)  # raises, saying what is missing
    s.data = list(s.data) if isinstance(s.data, Iterator) else s.data  # it is read twice
    block_of: dict[Site, int] = {}
    shares: list[float] = []
    found = dense_statistics(s.model, s.sites, s.data)
    for block in blocks_of(s.model, s.sites):
        new = {site: found[site] for site in block.sites if site in found and site not in block_of}
        if new:
            block_of.update(dict.fromkeys(new, len(shares)))
            shares.append(outliers(new, owl.outlier))
    for site in s.sites:  # one that no input reached is a block without outliers
        if site not in block_of:
            block_of[site] = len(shares)
            shares.append(0.0)
    if any(isinstance(site.pattern, NM) for site in s.sites):
        _vary_groups(owl, s, block_of, shares)
        return {site: _of(site, site.pattern.asked(site.pattern_shape, None)) for site in s.sites}
    sparsity = cast(float, method.sparsity)
    counts = owl.by_block(_layers(list(s.sites)), [block_of[site] for site in s.sites], shares, sparsity)
    return {site: _of(site, _reachable(site, keep)) for site, keep in zip(s.sites, counts, strict=True)}


def _vary_groups(owl: OWL, s: Sparsity, block_of: Mapping[Site, int], shares: list[float]) -> None:
    sizes = [0] * len(shares)
    for site, block in block_of.items():
        sizes[block] += site.numel
    pattern: Any = s.sites[0].pattern
    kept = owl.of_groups(shares, pattern.n, pattern.m, sizes)
    for site, block in block_of.items():
        site.pattern = NM(kept[block], pattern.m)


def outliers(statistics: Mapping[Site, list[Any]], times: float) -> float:
    """D of one block: 100 · the share of its Wanda scores above `times` their mean."""
    total, above, count = 0.0, 0, 0
    scores = [score for site, its in statistics.items() for score in _scores(site, its)]
    for weight, norms in scores:
        total += float((weight.abs().sum(0, dtype=torch.float64) * norms).sum())
        count += weight.numel()
    bound = times * total / max(1, count)
    for weight, norms in scores:
        for rows in weight.split(256):
            above += int((rows.abs() * norms > bound).sum())
    return 100 * above / max(1, count)


def _scores(site: Site, statistics: list[Any]) -> list[tuple[Tensor, Tensor]]:
    parts = to_matrix(site, site.weight).chunk(len(statistics))
    return [(part, permuted(site, seen).squares.sqrt()) for part, seen in zip(parts, statistics, strict=True)]
