"""Allocations by a rule of thumb: the same density, the same number, or what one asks for each layer."""

import fnmatch
from collections.abc import Mapping, Sequence
from fractions import Fraction

from torch import Tensor

from rarefy.axes.budget import Layer, Proportional
from rarefy.axes.shorthand import suggest
from rarefy.axes.top_k import count
from rarefy.axes.value import Share, value


class EachRounded(Proportional):
    """An allocation whose law is one layer's alone: each count is rounded by itself, and the total is their sum."""

    def sparsities(self, layers: Sequence[Layer], sparsity: float) -> list[float]:
        """The sparsity of each layer."""
        raise NotImplementedError

    def demand(self, layers: Sequence[Layer], sparsity: float) -> list[Fraction]:
        """(1 − s_ℓ)·N_ℓ; once some layers are pinned, the others scale together."""
        its = self.sparsities(layers, sparsity)
        return [(1 - Fraction(str(s))) * layer.units for s, layer in zip(its, layers, strict=True)]

    def total(self, layers: Sequence[Layer], sparsity: float) -> int:
        """The sum of the rounded counts."""
        return sum(self._rounded(layers, sparsity))

    def split(
        self, layers: Sequence[Layer], sparsity: float, scores: Sequence[Tensor] | None, pinned: Mapping[int, int]
    ) -> list[int]:
        """Each layer's floor((1 − s_ℓ)·N_ℓ + ½), unless some are pinned."""
        return super().split(layers, sparsity, scores, pinned) if pinned else self._rounded(layers, sparsity)

    def _rounded(self, layers: Sequence[Layer], sparsity: float) -> list[int]:
        its = self.sparsities(layers, sparsity)
        return [count(s, layer.units) for s, layer in zip(its, layers, strict=True)]


@value
class Uniform(EachRounded):
    """Each layer keeps the same share: floor((1 − s)·units + ½)."""

    def sparsities(self, layers: Sequence[Layer], sparsity: float) -> list[float]:
        """The same for each."""
        return [sparsity] * len(layers)


@value
class PerLayer(EachRounded):
    """A sparsity for each layer, by the name of its weight or its module, or by a glob.

    Layers that none fits take the overall sparsity. A name goes before a glob. Raises ValueError for an entry that
    fits no layer, and where two globs give one layer different sparsities.

    >>> from rarefy.axes import Unstructured
    >>> names = ["block.0.weight", "block.1.weight", "head.weight"]
    >>> layers = [Layer(name, (10, 10), 100, Unstructured()) for name in names]
    >>> PerLayer({"block.*": 0.9, "block.1.weight": 0.8}).counts(layers, 0.5)
    [10, 20, 50]
    """

    by_name: dict[str, Share]

    def sparsities(self, layers: Sequence[Layer], sparsity: float) -> list[float]:
        """Those asked for, else the overall one."""
        names = [layer.name for layer in layers]
        for entry in self.by_name:
            if not any(_fits(entry, name) for name in names):
                raise ValueError(f"PerLayer: {entry!r} fits no layer; {suggest(entry, names) or 'there are none'}")
        return [self._of(name, sparsity) for name in names]

    def _of(self, name: str, otherwise: float) -> float:
        for exact in (name, _module(name)):
            if exact in self.by_name:
                return self.by_name[exact]
        found = {entry: s for entry, s in self.by_name.items() if _fits(entry, name)}
        if len(set(found.values())) > 1:
            raise ValueError(f"PerLayer: several entries fit {name!r}: {found}; give the sparsity under its full name")
        return next(iter(found.values()), otherwise)


def _fits(entry: str, name: str) -> bool:
    return entry in (name, _module(name)) or fnmatch.fnmatchcase(name, entry)


def _module(name: str) -> str:
    """The module that holds the weight: "fc1" of "fc1.weight"."""
    return name.rpartition(".")[0] or name


@value
class Balanced(Proportional):
    """Each layer keeps the same number of units; smaller layers stay dense, and the others share what that frees."""

    def demand(self, layers: Sequence[Layer], sparsity: float) -> list[Fraction]:
        """The same for each."""
        return [Fraction(min(1, layer.units)) for layer in layers]


@value
class UniformPlus(Proportional):
    """Uniform, but the first layer stays dense if it is a convolution, and the last keeps at least 20 %.

    Gale et al., "The state of sparsity in deep neural networks", 2019, arXiv:1902.09574; as in the code of LAMP
    (Lee et al. 2021), where the last layer, if it would keep less, keeps round(.2·N) and the total stays exact.
    Raises ValueError for a budget that these two layers exceed.

    >>> from rarefy.axes import Unstructured
    >>> shapes = [(300, 784), (100, 300), (10, 100)]
    >>> lenet = [Layer(str(s), s, s[0] * s[1], Unstructured()) for s in shapes]
    >>> UniformPlus().counts(lenet, 0.9)
    [23431, 2989, 200]
    """

    def demand(self, layers: Sequence[Layer], sparsity: float) -> list[Fraction]:
        """Proportional to the units."""
        return [Fraction(layer.units) for layer in layers]

    def ideal(
        self, layers: Sequence[Layer], sparsity: float, pinned: Mapping[int, int] | None = None
    ) -> list[Fraction]:
        """The exact counts before rounding."""
        pinned = dict(pinned or {})
        if not layers:
            return []
        if len(layers[0].shape) > 2:
            pinned.setdefault(0, layers[0].units)
        last = len(layers) - 1
        floor = count(0.8, layers[last].units)
        guarded = {last: floor} | pinned
        if sum(guarded.values()) > self.total(layers, sparsity):
            return super().ideal(layers, sparsity, guarded)  # raises, naming both layers
        shares = super().ideal(layers, sparsity, pinned)
        return shares if shares[last] >= floor else super().ideal(layers, sparsity, guarded)
