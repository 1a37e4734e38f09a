"""What methods share that prune along a sparsity schedule: s(t), and refusing at once what could only fail later."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rarefy.axes import Allocation, PerLayer
from rarefy.core import choose
from rarefy.core.sites import Site
from rarefy.core.sparsity import Sparsity

_LONG = 10**9  # stands for the length of a run that is not known yet: a fraction of it lies far ahead


def share_at(schedule: Any, final: float | None, step: int, steps: int | None) -> float:
    """s(t). final: the sparsity to reach; None for n:m, which is masked at the first update whose s(t) is above zero.

    Raises ValueError where the schedule cannot reach `final`.

    >>> from rarefy.axes import Cubic
    >>> round(share_at(Cubic(start=0.5, end=1.0), 0.8, step=75, steps=100), 6)
    0.7
    """
    if final is None:
        final = (1 + getattr(schedule, "initial", 0.0)) / 2
    return schedule.sparsity(step, final, steps if steps is not None else _LONG)


def prune_smallest(
    s: Sparsity, masks: dict[Site, Tensor], allocation: Allocation, share: float, final: float | None
) -> Mapping[Site, Tensor]:
    """The masks with the smallest |w| masked too, up to `share` on the way to `final`. What is masked stays masked."""
    if not share:
        return masks
    scores = {site: site.weight.abs() for site in s.sites}
    return s.project(scores, _on_the_way(allocation, share, final), share, nested=masks)


def refuse_unreachable(s: Sparsity, allocation: Allocation, sparsity: float | None) -> None:
    """Raise ValueError if the budget at the end cannot be met, by the weights of now."""
    units = {site: choose.pooled(site, site.weight) for site in s.sites}
    choose.allocate(s.sites, allocation, sparsity, units)


def _on_the_way(allocation: Any, share: float, final: float | None) -> Any:
    """Sparsities given layer by layer grow in step with the overall one; all other allocations follow by themselves."""
    if final is None or share == final:
        return allocation
    if isinstance(allocation, PerLayer):
        return PerLayer({name: s * share / final for name, s in allocation.by_name.items()})
    within = getattr(allocation, "allocation", None)  # of a floor under another allocation
    if within is None:
        return allocation
    return dataclasses.replace(allocation, allocation=_on_the_way(within, share, final))
