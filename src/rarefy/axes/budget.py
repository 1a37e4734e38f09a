"""What every allocation shares: the layers, the contract, and the splitting of a budget in proportion to a demand."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, NoReturn

from torch import Tensor

from rarefy.axes.pattern import Pattern
from rarefy.axes.top_k import count, largest_remainder
from rarefy.axes.value import Value


@dataclass(frozen=True)
class Layer:
    """One weight that takes part in an allocation. shape: canonical, (out, in, *kernel). units: of the pattern."""

    name: str
    shape: tuple[int, ...]
    units: int
    pattern: Pattern


class Allocation(Value):
    """How many units each layer keeps. A new allocation overrides `split`, or `Proportional.demand`."""

    needs_scores: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False
    """Whether counts, and the n of n:m, follow from what layers are given; `split` then raises."""

    def counts(self, layers: Sequence[Layer], sparsity: float, scores: Sequence[Tensor] | None = None) -> list[int]:
        """Units that each layer keeps, in the order of the layers.

        layers: those whose count is free; an n:m layer, whose count follows from its pattern, takes no part.
        sparsity: share of units not kept over all layers, 0 ≤ s < 1.
        scores: pooled, 1-D, one tensor per layer and one entry per unit; only where `needs_scores`.
        Raises ValueError for layers or scores that do not fit, and for a budget that the allocation cannot meet.
        """
        if not 0 <= sparsity < 1:
            raise ValueError(f"{self}: sparsity must be in [0, 1), got {sparsity}")
        for layer in layers:
            if layer.pattern.fixed:
                raise ValueError(
                    f"{self}: {layer.name!r} has the pattern {layer.pattern}, from which its count follows; "
                    "leave it out, or give it a pattern whose count is free"
                )
        if self.needs_scores:
            scores = self._checked(layers, scores)
        return self.split(layers, sparsity, scores, {})

    def total(self, layers: Sequence[Layer], sparsity: float) -> int:
        """The budget: units that all layers keep together, floor((1 − s)·units + ½)."""
        return count(sparsity, sum(layer.units for layer in layers))

    def split(
        self, layers: Sequence[Layer], sparsity: float, scores: Sequence[Tensor] | None, pinned: Mapping[int, int]
    ) -> list[int]:
        """`counts` for checked arguments, where some layers' counts are decided already.

        pinned: index of a layer → its count. The others share what that leaves of `total`.
        """
        raise NotImplementedError

    def check_scores(self, name: str, scores: Tensor) -> None:
        """Raises ValueError if one layer's scores, known to be finite, are none that this allocation can compare."""

    def _checked(self, layers: Sequence[Layer], scores: Sequence[Tensor] | None) -> Sequence[Tensor]:
        if scores is None or len(scores) != len(layers):
            seen = "none" if scores is None else f"{len(scores)} tensors"
            raise ValueError(f"{self} compares scores: needs one tensor for each of {len(layers)} layers, got {seen}")
        for layer, its in zip(layers, scores, strict=True):
            if its.shape != (layer.units,):
                raise ValueError(
                    f"{self}: the scores of {layer.name!r} have shape {tuple(its.shape)}; "
                    f"pool them to one score for each of its {layer.units} units, shape ({layer.units},)"
                )
            if not its.isfinite().all():
                raise ValueError(
                    f"{self}: scores of {layer.name!r} are NaN or infinite; check its weights and gradients"
                )
            self.check_scores(layer.name, its)
        return scores


class Proportional(Allocation):
    """An allocation in proportion to something that each layer's shape demands, as far as its units reach."""

    def demand(self, layers: Sequence[Layer], sparsity: float) -> list[Fraction]:
        """What the counts are proportional to, > 0 for a layer with units; only ratios matter."""
        raise NotImplementedError

    def ideal(
        self, layers: Sequence[Layer], sparsity: float, pinned: Mapping[int, int] | None = None
    ) -> list[Fraction]:
        """The exact counts before rounding."""
        return proportional(
            layers, self.demand(layers, sparsity), self.total(layers, sparsity), pinned or {}, asked=str(self)
        )

    def split(
        self, layers: Sequence[Layer], sparsity: float, scores: Sequence[Tensor] | None, pinned: Mapping[int, int]
    ) -> list[int]:
        """The ideal counts, rounded to whole units by largest remainder; ties to the earlier layer."""
        ideal = self.ideal(layers, sparsity, pinned)
        return largest_remainder(ideal, self.total(layers, sparsity), [layer.units for layer in layers])


def proportional(
    layers: Sequence[Layer],
    demand: Sequence[Fraction],
    budget: int,
    pinned: Mapping[int, int],
    asked: str = "proportional",
) -> list[Fraction]:
    """Shares of `budget` in proportion to `demand`, none above its layer's units; they sum to the budget exactly.

    What a full layer cannot take goes to the others. Filling one only raises the rate of the others, so filling all
    that overflow at once ends in the same place as one by one.
    pinned: index of a layer → its share, decided already. asked: who asks, for the error.
    Raises ValueError if the pinned layers leave the others less than nothing or more than they have.
    """
    rest = unpinned_budget(layers, budget, pinned, asked)
    shares = [Fraction(pinned.get(i, 0)) for i in range(len(layers))]
    free: list[int] = [i for i in range(len(layers)) if i not in pinned]
    while free and rest:
        rate = Fraction(rest) / sum((demand[i] for i in free), Fraction())
        full: list[int] = [i for i in free if demand[i] * rate > layers[i].units]
        if not full:
            for i in free:
                shares[i] = demand[i] * rate
            break
        for i in full:
            shares[i] = Fraction(layers[i].units)
            rest -= layers[i].units
        free = [i for i in free if i not in full]
    return shares


def unpinned_budget(layers: Sequence[Layer], budget: int, pinned: Mapping[int, int], asked: str) -> int:
    """What is left of the budget for the layers that are not pinned. Raises ValueError if they cannot take it."""
    rest = budget - sum(pinned.values())
    room = sum(layer.units for i, layer in enumerate(layers) if i not in pinned)
    if not 0 <= rest <= room:
        _refuse(layers, budget, pinned, room, asked)
    return rest


def _refuse(layers: Sequence[Layer], budget: int, pinned: Mapping[int, int], room: int, asked: str) -> NoReturn:
    taken, total = sum(pinned.values()), sum(layer.units for layer in layers)
    who = ", ".join(f"{layers[i].name!r} {n}" for i, n in pinned.items())
    if taken > budget:
        raise ValueError(
            f"{asked}: the budget is {budget} of {total} units, but it fixes {taken} ({who}); "
            f"a sparsity of at most {highest_sparsity(taken, total)} would do"
        )
    raise ValueError(
        f"{asked}: the budget is {budget} of {total} units, but with {taken} fixed ({who}) the other layers can take "
        f"no more than {room}; a sparsity of at least {lowest_sparsity(taken + room, total)} would do"
    )


def kept(density: float, units: int) -> int:
    """floor(density·units + ½), the density taken as the decimal written."""
    return math.floor(Fraction(str(density)) * units + Fraction(1, 2))


def highest_sparsity(needed: int, total: int) -> float:
    """The highest sparsity, to four decimals, that keeps at least `needed` of `total` units."""
    return (total - needed) * 10_000 // total / 10_000


def lowest_sparsity(allowed: int, total: int) -> float:
    """The lowest sparsity, to four decimals, that keeps at most `allowed` of `total` units."""
    return -((allowed - total) * 10_000 // total) / 10_000
