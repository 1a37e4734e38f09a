"""Allocations: how many units does each layer keep?

| name | counts |
|---|---|
| uniform | each layer the same density (uniform.py) |
| uniform_plus | the first convolution dense, the last layer at least 20 % dense, the others the same density |
| erdos_renyi, erdos_renyi_kernel, erdos_renyi_kernel_plus | density falls with size (erdos_renyi.py) |
| balanced | each layer the same number, small layers dense |
| global, lamp | the best scores of all layers (by_score.py) |
| owl | blocks with more outliers in their inputs keep more (owl.py) |
| `PerLayer({...})` or a dict | a sparsity per layer |
| `AtLeast(allocation)` | another allocation with a floor for each layer |

Counts are exact: `uniform` and `PerLayer` round each layer, floor((1 − s_ℓ)·N_ℓ + ½); all others sum to
floor((1 − s)·ΣN_ℓ + ½), by largest remainder.
"""

import bisect
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, cast

from pydantic import BeforeValidator, Field
from torch import Tensor

from rarefy.axes.budget import Allocation, Layer, Proportional, highest_sparsity
from rarefy.axes.by_score import Global, Lamp, lamp_scores
from rarefy.axes.erdos_renyi import ErdosRenyi, ErdosRenyiKernel, ErdosRenyiKernelPlus
from rarefy.axes.owl import OWL
from rarefy.axes.shorthand import parse_named
from rarefy.axes.uniform import Balanced, PerLayer, Uniform, UniformPlus
from rarefy.axes.value import Share, value

__all__ = [
    "OWL",
    "Allocation",
    "AllocationField",
    "AtLeast",
    "Balanced",
    "ErdosRenyi",
    "ErdosRenyiKernel",
    "ErdosRenyiKernelPlus",
    "Global",
    "Lamp",
    "Layer",
    "PerLayer",
    "Proportional",
    "Uniform",
    "UniformPlus",
    "lamp_scores",
    "parse_allocation",
]


_names = {
    "uniform": Uniform,
    "uniform_plus": UniformPlus,
    "erdos_renyi": ErdosRenyi,
    "erdos_renyi_kernel": ErdosRenyiKernel,
    "erdos_renyi_kernel_plus": ErdosRenyiKernelPlus,
    "balanced": Balanced,
    "global": Global,
    "lamp": Lamp,
    "owl": OWL,
}


def parse_allocation(x: object) -> Allocation:
    """An allocation from its name, itself, or a dict: of the allocation (with a `kind`), or of sparsities per layer.

    Raises ValueError for anything else, naming near matches.

    >>> parse_allocation("erdos_renyi_kernel")
    ErdosRenyiKernel(power=1.0)
    >>> parse_allocation({"fc1": 0.9})
    PerLayer(by_name={'fc1': 0.9})
    """
    entries = cast(Mapping[str, Any], x) if isinstance(x, Mapping) else None
    if entries is not None and not isinstance(entries.get("kind"), str):
        return PerLayer(dict(entries))
    return parse_named(cast(object, x), Allocation, _names, "an allocation")


AllocationField = Annotated[Any, BeforeValidator(parse_allocation)]


@value
class AtLeast(Allocation):
    """Another allocation with a floor of units for each layer, against layer collapse.

    Gupta et al., "Is complexity required for neural network pruning? A case study on global magnitude pruning", 2022,
    arXiv:2209.14624: the minimum threshold of Global MP.

    Layers below the floor are lifted to it, and the allocation shares what is left among the others, until none is
    below. Layers with fewer units than the floor stay dense. The total is the allocation's own.
    Deviation from the authors' code, which rescales all sparsities in turn and may push one above 1.

    allocation: what the floor is put under, "global" for example.
    share: the floor, as a share of all layers' units together; the same number for every layer.
    units: the floor itself, in place of `share`.
    Raises ValueError for floors that exceed the budget.

    >>> import torch
    >>> from rarefy.axes import Unstructured
    >>> layers = [Layer("a", (1, 10), 10, Unstructured()), Layer("b", (10, 100), 1000, Unstructured())]
    >>> AtLeast("global", units=5).counts(layers, 0.99, [torch.full((10,), 9.0), torch.full((1000,), 0.1)])
    [5, 5]
    """

    allocation: AllocationField
    share: Share = 0.0005
    units: Annotated[int, Field(ge=0)] | None = None

    def __post_init__(self) -> None:
        if self.units is not None and self.share != 0.0005:
            raise ValueError(f"the floor is given twice, as share={self.share} and as units={self.units}; give one")

    @property
    def needs_scores(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the allocation within."""
        return self._within.needs_scores

    @property
    def needs_inputs(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the allocation within."""
        return self._within.needs_inputs

    def check_scores(self, name: str, scores: Tensor) -> None:
        """As the allocation within."""
        self._within.check_scores(name, scores)

    def total(self, layers: Sequence[Layer], sparsity: float) -> int:
        """As the allocation within."""
        return self._within.total(layers, sparsity)

    def split(
        self, layers: Sequence[Layer], sparsity: float, scores: Sequence[Tensor] | None, pinned: Mapping[int, int]
    ) -> list[int]:
        """Water-filling: pin what is too low at its floor, split again what is left, until nothing is too low."""
        floors = self.floors(layers)
        self._check_budget(layers, {**floors, **pinned}, self.total(layers, sparsity))
        pinned = dict(pinned)
        while True:
            counts = self._within.split(layers, sparsity, scores, pinned)
            low = {i: floor for i, floor in floors.items() if counts[i] < floor and i not in pinned}
            if not low:
                return counts
            pinned |= low

    def floors(self, layers: Sequence[Layer]) -> dict[int, int]:
        """Index of a layer → the fewest units that it keeps."""
        floor = self.units
        if floor is None:
            floor = int(Fraction(str(self.share)) * sum(layer.units for layer in layers))
        return {i: min(floor, layer.units) for i, layer in enumerate(layers)}

    @property
    def _within(self) -> Allocation:
        return self.allocation

    def _check_budget(self, layers: Sequence[Layer], floors: Mapping[int, int], budget: int) -> None:
        needed, total = sum(floors.values()), sum(layer.units for layer in layers)
        if needed <= budget:
            return

        def need(floor: int) -> int:
            return sum(min(floor, layer.units) for layer in layers)

        fits = bisect.bisect_right(range(budget + 1), budget, key=need) - 1
        raise ValueError(
            f"{self}: floors of up to {max(floors.values())} units in {len(layers)} layers need {needed} units, "
            f"but the budget is {budget} of {total}; units={fits} or a sparsity of at most "
            f"{highest_sparsity(needed, total)} would do"
        )
