"""Calls of a chain's blocks as they were recorded, and those of other batches, which follow from their first few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rarefy.core.capture.batches import Batch
from rarefy.core.capture.tree import Mark, Path, leaves, replaced


@dataclass(frozen=True)
class Link(Mark):
    """The leaf at this path of the previous block's output."""

    path: Path


@dataclass(frozen=True)
class Constant(Mark):
    """What the keeper returned for a tensor that no block made."""

    kept: Any


@dataclass(frozen=True)
class Call:
    """Arguments of one call, Links and Constants in place of tensors. output: fingerprints by path, where asked for."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: dict[Path, bytes] | None = None

    def marks(self) -> list[tuple[Path, Link | Constant]]:
        """Where tensors were."""
        return [(path, leaf) for path, leaf in self.leaves() if isinstance(leaf, Link | Constant)]

    def constants(self) -> list[Constant]:
        """Of the marks, each as often as it is given."""
        return [mark for _, mark in self.marks() if isinstance(mark, Constant)]

    def leaves(self) -> list[tuple[Path, Any]]:
        """All arguments."""
        return list(leaves((self.args, self.kwargs)))


@dataclass(frozen=True)
class Plan:
    """How all calls follow from those up to block `reach`: each later Constant is one of theirs, the same object.

    calls: of the batch from which this was learnt. origins: by identity of a Constant, where it is given first.
    """

    calls: Sequence[Call]
    reach: int
    origins: dict[int, tuple[int, Path]]

    @staticmethod
    def of(calls: Sequence[Call]) -> Plan:
        """Learn from a batch that was recorded in full."""
        origins: dict[int, tuple[int, Path]] = {}
        reach = 0
        for index, call in enumerate(calls):
            for path, mark in call.marks():
                if isinstance(mark, Constant) and id(mark) not in origins:
                    origins[id(mark)] = (index, path)
                    reach = index
        return Plan(calls, reach, origins)

    def followed(self, begun: Sequence[Call], use: Callable[[Any], Any]) -> list[Call] | None:
        """All calls of another batch, from those up to `reach`; None where these are not made in the same way.

        use: counts one more use of what a Constant keeps.
        """
        if not all(_alike(mine, other) for mine, other in zip(self.calls, begun, strict=False)):
            return None
        given = [dict(call.leaves()) for call in begun]

        def own(leaf: Any) -> Any:
            if not isinstance(leaf, Constant):
                return leaf
            index, path = self.origins[id(leaf)]
            use(given[index][path].kept)
            return given[index][path]

        later = [replaced((call.args, call.kwargs), own) for call in self.calls[self.reach + 1 :]]
        return [*begun, *(Call(args, kwargs) for args, kwargs in later)]

    def holds_for(self, calls: Sequence[Call]) -> bool:
        """Whether the calls of a batch recorded in full are what `followed` would make of the first of them."""
        found = self.followed(calls[: self.reach + 1], lambda kept: kept)
        if found is None:
            return True  # made in another way, so never followed
        return all(_alike(mine, other, exactly=True) for mine, other in zip(found, calls, strict=True))


def _alike(one: Call, other: Call, *, exactly: bool = False) -> bool:
    """Whether two calls have the same arguments, but for what Constants keep unless `exactly`."""
    mine, its = one.leaves(), other.leaves()
    return len(mine) == len(its) and all(
        path == place and _same(a, b, exactly) for (path, a), (place, b) in zip(mine, its, strict=True)
    )


def _same(a: Any, b: Any, exactly: bool) -> bool:
    if isinstance(a, Constant) and isinstance(b, Constant):
        return a == b or not exactly
    plain = type(a) is type(b) and isinstance(a, Mark | int | float | str | None)
    return a is b or (plain and a == b)


def shapes(batch: Batch) -> tuple[Any, ...]:
    """What batches must have in common to be called alike: shapes, dtypes and other arguments."""
    return tuple(
        (path, (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf))
        for path, leaf in leaves((batch.args, batch.kwargs))
    )
