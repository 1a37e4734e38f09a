"""A site under truly sparse execution: its parameter is the vector of values, its mask the structure of its layer.

Nothing has to be cleared: what is masked does not exist. Masks, dense weights and dense gradients are made when
somebody asks for them; drop and grow asks for values and for row chunks instead, and says by index what it keeps.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rarefy.axes import top_k
from rarefy.axes.top_k import from_array
from rarefy.core import bits
from rarefy.core.held import Everywhere, Held
from rarefy.core.sites import Site
from rarefy.core.sparse.gathered import Factors, Gathered
from rarefy.core.sparse.linear import SparseLinear
from rarefy.core.sparse.structure import Structure


class SparseHeld(Held):
    """The values of one layer. In a step whose dense gradient is wanted the layer hands over its factors."""

    def __init__(self, name: str, parameter: nn.Parameter, layer: SparseLinear) -> None:
        super().__init__(name, parameter)
        self.layer = layer
        self._pass = -1
        self._factors: list[Factors] = []
        self._continues = False  # the present pass adds to the gradient that is there

    @property
    def gathered(self) -> Gathered | None:
        """The dense gradient of this step, in place of the whole one that a plain parameter sets aside."""
        return cast("Gathered | None", self.dense)

    def set(self, keep: Tensor, train: Tensor | Everywhere | None = None) -> None:
        raise TypeError(f"{self.name!r} runs sparse: its structure is moved, not its mask set.")

    def attach(self) -> None:
        """Nothing to watch: gradients are those of the non-zeros."""

    def detach(self) -> None:
        self.want_dense(False)

    def want_dense(self, wanted: bool) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.wants_dense = wanted
        self.layer.gathers = self._gather if wanted else None
        if wanted:
            self._hook("register_post_accumulate_grad_hook", self._accumulated)
        else:
            self.dense, self._factors = None, []

    def _gather(self, x: Tensor, dy: Tensor) -> None:
        """Inside a backward pass. Copies, since the user may write the next batch into the same memory."""
        task = torch._C._current_graph_task_id()  # pyright: ignore[reportPrivateUsage]
        if task != self._pass:
            self._pass, self._factors = task, []
            grad = self.parameter.grad
            self._continues = grad is not None and self.gathered is not None
            if grad is not None and self.gathered is not None:
                self.gathered.follow(grad)
        self._factors.append((x.detach().clone(), dy.detach().clone()))

    def _accumulated(self, parameter: Tensor) -> None:
        if not self._continues or self.gathered is None:
            self.dense = cast(Any, Gathered())
        if self.gathered is not None and parameter.grad is not None:
            self.gathered.add(self._factors, parameter.grad)
        self._factors = []

    def finalize(self, *, trust: bool) -> None:
        grad = self.parameter.grad
        if grad is None:
            self.dense = None
        elif self.wants_dense and self.gathered is not None:
            self.gathered.follow(grad)

    def unscale(self, inverse: Tensor) -> None:
        if self.gathered is not None:
            self.gathered.unscale(inverse)

    def remask_gradient(self) -> None:
        """Nothing: it has moved with the structure."""

    def rows(self) -> Iterator[Tensor]:
        """The dense gradient in chunks of rows, from the first."""
        grad, structure = self.parameter.grad, self.layer.structure
        if self.wants_dense and grad is None:
            grad = torch.zeros_like(self.parameter)
            return Gathered().rows(structure, grad.detach())
        if self.wants_dense and self.gathered is not None and grad is not None:
            return self.gathered.rows(structure, grad.detach())
        raise RuntimeError(
            f"the dense gradient of {self.name!r} was asked for in a step for which wants_dense_gradient() was false, "
            "or whose gradient came without a backward pass through the layer; sparse execution gathers it only where "
            "the method announces it before the forward pass."
        )

    def dense_gradient(self) -> Tensor:
        return torch.cat(list(self.rows()))


class SparseSite(Site):
    """A site of a SparseLinear. `name` stays that of the dense weight; `held.name` is that of the values."""

    record: bytes | None = None  # which weights were kept at some time, packed and compressed; None: those kept now

    @classmethod
    def of(cls, site: Site, layer: SparseLinear) -> SparseSite:
        """The same site, of what its layer has become."""
        held = SparseHeld(_values_name(site.name), layer.values, layer)
        found = cls(site.name, layer, held, site.layout, site.index, site.pattern, asked=site.asked, memory=site.memory)
        if site.explored is not None:
            found.explore(site.explored)
        return found

    def plain(self, module: nn.Module, parameter: nn.Parameter) -> Site:
        """The site of a layer that is dense again, its mask not yet set."""
        held = Held(self.name, parameter)
        explored = self.explored_bits()
        return Site(
            self.name, module, held, self.layout, self.index, self.pattern, [], None, self.asked, explored, self.memory
        )

    @property
    def layer(self) -> SparseLinear:
        return cast(SparseHeld, self.held).layer

    @property
    def structure(self) -> Structure:
        return self.layer.structure

    @property
    def values(self) -> Tensor:
        """Of the non-zeros, in row order, without a graph."""
        return self.parameter.detach()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.structure.rows, self.structure.cols

    @property
    def kind(self) -> str:
        return "Linear"

    @property
    def numel(self) -> int:
        return self.structure.rows * self.structure.cols

    @property
    def mask(self) -> Tensor:
        return self.structure.mask()

    @property
    def trainable(self) -> Tensor:
        return self.structure.mask()

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    def reached_weight(self) -> Tensor:
        return self.layer.weight

    # -- what a method asks --------------------------------------------------------------------------------------

    def gradient_rows(self) -> Iterator[Tensor]:
        """The dense gradient of this step in chunks of rows. Raises RuntimeError if it was not announced."""
        return cast(SparseHeld, self.held).rows()

    def has_finite_gradient(self) -> bool:
        """Whether what the dense gradient is made of is finite; False too where nothing is known of it."""
        grad, gathered = self.parameter.grad, cast(SparseHeld, self.held).gathered
        return grad is not None and gathered is not None and bool(torch.isfinite(grad).all()) and gathered.is_finite()

    def positions_of(self, mask: Tensor, trainable: Tensor | Everywhere | None) -> Tensor:
        """A mask, or positions, as positions. Raises ValueError where gradients were to reach other weights too."""
        if trainable is not None:
            raise ValueError(f"{self.name!r} runs sparse: gradients reach the kept weights and no others.")
        return from_array(np.flatnonzero(mask.numpy())) if mask.dtype == torch.bool else mask

    # -- what was kept at some time ------------------------------------------------------------------------------

    def explored_bits(self) -> Tensor | None:
        """One bit a weight, as `bits.pack` packs them."""
        if self.record is None:
            return self.structure.bits()
        return from_array(np.frombuffer(zlib.decompress(self.record), dtype=np.uint8).copy())

    def explore(self, packed: Tensor) -> int:
        """Remember these as kept at some time; returns how many are. Compressed, since few bits are set."""
        self.record = None if torch.equal(packed, self.structure.bits()) else zlib.compress(packed.numpy().tobytes(), 1)
        return bits.count_packed(packed)

    # -- drop and grow by index ----------------------------------------------------------------------------------

    def exchanged(self, stay: Tensor, scores: Iterable[Tensor]) -> Tensor:
        """Positions (int64, ascending) of the non-zeros in `stay` and, up to as many as there are, the best others.

        stay: bool, for each non-zero. scores: of all weights, in row order, in parts. Ties go to the lower position.
        """
        staying = self.structure.positions()[stay]
        best = _Best(len(stay) - len(staying))
        offset = 0
        for part in scores:
            flat = part.reshape(-1)
            begin, end = np.searchsorted(staying.numpy(), [offset, offset + len(flat)])
            best.add(flat.index_fill(0, staying[begin:end] - offset, -math.inf), offset)
            offset += len(flat)
        return from_array(np.sort(np.concatenate([staying.numpy(), best.positions()]), kind="stable"))  # merges runs


class _Best:
    """The `wanted` best of scores that come in parts; of equal ones those that came first. −∞ is never taken."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self._scores = torch.empty(0)
        self._places = torch.empty(0, dtype=torch.int64)
        self._least = -math.inf  # what comes later must be better

    def add(self, part: Tensor, offset: int) -> None:
        found = from_array(np.flatnonzero(np.greater(part.numpy(), self._least)))
        self._scores = torch.cat([self._scores.to(part.dtype), part[found]])
        self._places = torch.cat([self._places, found + offset])
        if len(self._scores) > 2 * self.wanted:  # now and then, since choosing costs more than keeping
            self._choose()

    def _choose(self) -> None:
        if len(self._scores) > self.wanted:
            kept = top_k(self._scores, self.wanted)
            self._scores, self._places = self._scores[kept], self._places[kept]
        if len(self._scores) == self.wanted:
            self._least = float(self._scores.min()) if self.wanted else math.inf

    def positions(self) -> NDArray[np.int64]:
        """Ascending."""
        self._choose()
        return self._places.numpy()


def _values_name(name: str) -> str:
    return name.removesuffix("weight") + "values"
