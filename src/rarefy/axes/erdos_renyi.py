"""Erdős–Rényi allocations: a layer's density falls with its size, so that narrow layers stay connected.

Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network
science", 2018, arXiv:1707.04780; with kernels: Evci et al., "Rigging the Lottery", 2020, arXiv:1911.11134.

    density_ℓ = min(1, ε·raw_ℓ),   raw_ℓ = (n_in + n_out)/(n_in·n_out)   or, with kernels,   (Σ dims)/(Π dims)

with ε such that the budget K is met exactly: ε = (K − Σ_dense N_ℓ) / Σ_other raw_ℓ·N_ℓ, where a layer that would exceed
density 1 joins the dense ones. In the code: raw_ℓ·N_ℓ = `demand`, N_ℓ = `units`, ε = the rate in `budget.proportional`.

Deviation from the authors' code: they take K as the sum of N_ℓ − floor(s·N_ℓ), up to one weight per layer more; here it
is floor((1 − s)·ΣN_ℓ + ½), split by largest remainder. A pattern with other units than weights scales raw_ℓ·N_ℓ.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated

from pydantic import Field

from rarefy.axes.budget import Layer, Proportional, kept
from rarefy.axes.value import value


@value
class ErdosRenyi(Proportional):
    """ER: density ∝ (n_in + n_out)/(n_in·n_out); a kernel does not matter.

    >>> from rarefy.axes import Unstructured
    >>> shapes = [(300, 784), (100, 300), (10, 100)]
    >>> lenet = [Layer(str(s), s, s[0] * s[1], Unstructured()) for s in shapes]
    >>> ErdosRenyi().counts(lenet, 0.9)
    [18714, 6906, 1000]
    """

    def demand(self, layers: Sequence[Layer], sparsity: float) -> list[Fraction]:
        """raw_ℓ·N_ℓ, exact."""
        return [_demand(layer.shape[:2], layer.units) for layer in layers]


@value
class ErdosRenyiKernel(Proportional):
    """ERK: density ∝ ((Σ dims)/(Π dims)) to a power, all dims with the kernel's. power < 1 evens out; 0 is uniform.

    At equal sparsity it costs about twice the FLOPs of uniform on convolutional networks.

    >>> from rarefy.axes import Unstructured
    >>> shapes = [(16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (10, 64)]
    >>> cnn = [Layer(str(s), s, math.prod(s), Unstructured()) for s in shapes]
    >>> ErdosRenyiKernel().counts(cnn, 0.8)
    [432, 1298, 2452, 640]
    """

    power: Annotated[float, Field(ge=0)] = 1.0

    def demand(self, layers: Sequence[Layer], sparsity: float) -> list[Fraction]:
        """raw_ℓ^power·N_ℓ; exact for a power of 1."""
        return [_demand(layer.shape, layer.units, self.power) for layer in layers]


@value
class ErdosRenyiKernelPlus(ErdosRenyiKernel):
    """ERK+: the last layer, if it is a matrix (a classifier), has a fixed density; ERK on the rest.

    Liu et al., "The Unreasonable Effectiveness of Random Pruning", 2022, arXiv:2202.02643.

    last: its density, in (0, 1]. Raises ValueError where the budget is too small, or too large, for that.
    """

    last: Annotated[float, Field(gt=0, le=1)] = 1.0

    def ideal(
        self, layers: Sequence[Layer], sparsity: float, pinned: Mapping[int, int] | None = None
    ) -> list[Fraction]:
        """The exact counts before rounding."""
        pinned = dict(pinned or {})
        if layers and len(layers[-1].shape) == 2:
            pinned.setdefault(len(layers) - 1, kept(self.last, layers[-1].units))
        return super().ideal(layers, sparsity, pinned)


def _demand(dims: tuple[int, ...], units: int, power: float = 1.0) -> Fraction:
    if not units:
        return Fraction(0)
    raw = Fraction(sum(dims), math.prod(dims))
    return (raw if power == 1 else Fraction(float(raw) ** power)) * units
