"""Blocks run again by themselves, with the arguments that the model gave them and what earlier blocks returned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from rarefy.core.capture.batches import Batch
from rarefy.core.capture.blocks import Block
from rarefy.core.capture.follow import Constant, Link
from rarefy.core.capture.record import Refused, record
from rarefy.core.capture.runs import quiet
from rarefy.core.capture.store import Store, fingerprint
from rarefy.core.capture.tree import Path, at, replaced, tensors


class Replay:
    """Runs the blocks of a chain one after the other over all batches. Only what the next block needs is kept.

    Raises Refused (from the constructor) where the chain cannot be replayed bit for bit.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch], store: Store) -> None:
        self._model, self._blocks, self._store = model, blocks, store
        with quiet(model):
            self._calls = record(model, blocks, batches, store)
            for batch in {0, len(batches) - 1}:
                self._verify(batch)
        self._states: list[dict[Path, int]] = [{} for _ in batches]

    def run(self, block: int, batch: int) -> Any:
        """The output of a block, with its states as they are now. Only inside `quiet`."""
        states = self._states[batch]
        return self._call(block, batch, lambda path: self._store.get(states[path]))

    def advance(self, block: int, told: Callable[[int], None]) -> None:
        """Run a block over all batches and keep what the next one needs; each batch's old states are dropped."""
        with quiet(self._model):
            for batch, calls in enumerate(self._calls):
                output = self.run(block, batch)
                for handle in self._states[batch].values():
                    self._store.drop(handle)
                for mark in calls[block].constants():
                    self._store.drop(mark.kept)
                wanted = {m.path for _, m in calls[block + 1].marks() if isinstance(m, Link)}
                self._states[batch] = {path: self._store.put(at(output, path)) for path in wanted}
                told(batch)

    def _call(self, block: int, batch: int, linked: Callable[[Path], Any]) -> Any:
        fresh: dict[Link | Constant, Any] = {}  # what was one tensor in the model's call is one again

        def given(leaf: Any) -> Any:
            if not isinstance(leaf, Link | Constant):
                return leaf
            if leaf not in fresh:
                fresh[leaf] = linked(leaf.path) if isinstance(leaf, Link) else self._store.get(leaf.kept)
            return fresh[leaf]

        call = self._calls[batch][block]
        args, kwargs = replaced((call.args, call.kwargs), given)
        return self._blocks[block].module(*args, **kwargs)

    def _verify(self, batch: int) -> None:
        """Raise Refused unless every block returns what it returned in the model, to the bit."""
        output: Any = None
        for index, block in enumerate(self._blocks):
            try:
                output = self._call(index, batch, lambda path, before=output: at(before, path))
            except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
                raise Refused(f"{block.name} cannot be run by itself ({error})") from error
            told = {path: fingerprint(leaf) for path, leaf in tensors(output)}
            if told != self._calls[batch][index].output:
                raise Refused(f"{block.name} returns something else when it is run by itself")
