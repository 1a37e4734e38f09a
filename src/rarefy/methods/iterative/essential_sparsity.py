"""Essential sparsity: how much can be removed at once, without training, before quality falls off.

Jaiswal et al., "The Emergence of Essential Sparsity in Large Pre-trained Models: The Weights that Matter", 2023,
arXiv:2306.03805.

    for s on a grid: prune a copy of the model to s, evaluate it;  the knee is where the curve turns down

In the code, two readings of the knee: the largest s with a drop of at most 1 % of the dense metric (`tolerated`), and
the point farthest from the chord between the ends of the curve, on its better side (`knee`).

Deviation: the paper speaks of a sharp drop; both definitions are ours.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field
from torch import nn

from rarefy.axes import Share, Value, value
from rarefy.core.method import Method
from rarefy.core.sparsify import sparsify
from rarefy.methods.one_shot.layerwise import MethodField

Better = Literal["higher", "lower"]


class Knee(NamedTuple):
    """Sparsities. tolerated: the largest within the tolerance. knee: the one farthest from the chord."""

    tolerated: float
    knee: float


class Point(NamedTuple):
    """One setting. sparsity: asked for. achieved: of all sites together. least_density: of the emptiest site."""

    sparsity: float
    achieved: float
    least_density: float
    metric: float


def essential_sparsity(
    curve: Sequence[tuple[float, float]], tolerance: float = 0.01, better: Better = "higher"
) -> Knee:
    """Both readings of the knee of a curve of (sparsity, metric).

    curve: sparsities ascending; the first is the dense model. tolerance: the drop allowed, as a share of its metric.
    Raises ValueError for fewer than two points, sparsities out of order, and metrics that are not finite.

    >>> essential_sparsity([(0.0, 0.9), (0.3, 0.9), (0.6, 0.9), (0.8, 0.5), (1.0, 0.1)])
    Knee(tolerated=0.6, knee=0.6)
    """
    _refuse(curve)
    sign = 1 if better == "higher" else -1
    (first, dense), (last, worst) = curve[0], curve[-1]
    allowed = tolerance * abs(dense)
    tolerated = max(s for s, metric in curve if sign * (dense - metric) <= allowed)
    # Distances to the chord are these up to one positive factor, whatever the units of the two axes.
    above = [sign * ((metric - dense) * (last - first) - (worst - dense) * (s - first)) for s, metric in curve]
    return Knee(tolerated, curve[above.index(max(above))][0])


def _refuse(curve: Sequence[tuple[float, float]]) -> None:
    if len(curve) < 2:
        raise ValueError(f"a knee needs a curve of two points or more, got {len(curve)}")
    sparsities = [s for s, _ in curve]
    if sparsities != sorted(set(sparsities)):
        raise ValueError(f"sparsities must ascend, got {sparsities}")
    for s, metric in curve:
        if not math.isfinite(metric):
            raise ValueError(f"the metric is {metric} at a sparsity of {s}: end the grid before it")


@dataclasses.dataclass(frozen=True)
class Essential:
    """What a sweep found. by: the value that ran."""

    by: "EssentialSparsity"
    points: tuple[Point, ...]
    tolerated: float
    knee: float

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            "by": self.by.to_dict(),
            "points": [point._asdict() for point in self.points],
            "tolerated": self.tolerated,
            "knee": self.knee,
        }


def _ascending(grid: tuple[float, ...]) -> tuple[float, ...]:
    if len(grid) < 2 or grid[0] != 0 or list(grid) != sorted(set(grid)):
        raise ValueError("must be two or more sparsities that ascend from 0, the dense model")
    return grid


@value
class EssentialSparsity(Value):
    """Args:
    method: any one-shot method, `Magnitude(0.5)` say (the paper's: global magnitude); its sparsity is set in turn.
    grid: sparsities, ascending from 0. tolerance: the drop allowed, as a share of the dense metric.
    better: whether a higher metric is better (accuracy) or a lower one (perplexity).
    Raises ValueError for n:m patterns, whose sparsity is fixed.

    >>> import torch, rarefy
    >>> model = nn.Linear(10, 10)
    >>> sweep = EssentialSparsity(rarefy.Magnitude(0.5), grid=(0.0, 0.5, 0.9))
    >>> found = sweep.run(model, lambda pruned: float(pruned.weight.ne(0).sum()))
    >>> [point.metric for point in found.points], found.tolerated
    ([100.0, 50.0, 10.0], 0.0)
    """

    method: MethodField
    grid: Annotated[tuple[Share, ...], AfterValidator(_ascending)] = tuple(i / 20 for i in range(20))
    tolerance: Annotated[float, Field(ge=0)] = 0.01
    better: Better = "higher"

    def __post_init__(self) -> None:
        if self.method.pattern.fixed:
            raise ValueError(
                f"{self.method}: the pattern {self.method.pattern} fixes its sparsity; there is none to sweep"
            )

    def run(
        self,
        model: nn.Module,
        evaluate: Callable[[nn.Module], float],
        *,
        data: Any = None,
        loss: Any = None,
        only: Any = None,
        skip: Any = None,
        seed: int = 0,
        progress: Callable[[Point], None] | None = None,
    ) -> Essential:
        """Prune a copy of the model to each sparsity, and evaluate it; the model itself is left as it is.

        evaluate(model) → the metric, finite. data, loss, only, skip, seed: as for `sparsify`; data that can be read
        once only are kept. progress: called after each point. Raises as `sparsify` and `essential_sparsity` do.
        """
        if data is not None and iter(data) is data:
            data = list(data)
        points: list[Point] = []
        for share in self.grid:
            twin = copy.deepcopy(model)
            achieved, least = 0.0, 1.0
            if share:
                s = sparsify(twin, at(self.method, share), data=data, loss=loss, only=only, skip=skip, seed=seed)
                achieved, least = s.sparsity, min(s.density(site.name) for site in s.sites)
            points.append(Point(share, achieved, least, float(evaluate(twin))))
            if progress is not None:
                progress(points[-1])
        knee = essential_sparsity([(p.sparsity, p.metric) for p in points], self.tolerance, self.better)
        return Essential(self, tuple(points), *knee)


def at(method: Any, sparsity: float) -> Method:
    """The same method with another sparsity, also where it goes on from another one's mask."""
    inner = getattr(method, "method", None)
    if inner is None:
        return dataclasses.replace(method, sparsity=sparsity)
    return dataclasses.replace(method, method=at(inner, sparsity))
