"""How the blocks of a chain are called: their actual arguments, and which of them the block before has returned.

A tensor that *is* a leaf of the previous block's output is a link to it; any other is a constant, kept once for all
blocks and batches that are given the same content. That nothing else hangs on earlier blocks (a mask made anew from the
hidden states, say) is made sure by disturbing the first block's output: constants must not move.

Most models hand the same objects (a mask, position embeddings) to every block. Then a batch of the same shapes as one
that is known needs to run only as far as the last block that is given a new object; the first and the last batch run
through, and must agree on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.capture.batches import Batch
from rarefy.core.capture.blocks import Block
from rarefy.core.capture.follow import Call, Constant, Link, Plan, shapes
from rarefy.core.capture.runs import Stop, run
from rarefy.core.capture.store import Store, fingerprint
from rarefy.core.capture.tree import Path, leaves, replaced, tensors


class Refused(BaseException):
    """The chain cannot be replayed, for the reason given. No model may catch it."""


class _Recorder:
    """Hooks on the members of a chain for one run. Each tensor that no block made is kept once, as one Constant object
    wherever it is given; `again` counts its further uses.

    until: the block before which the run ends; None: after the last, or with the model's end where not `last`.
    """

    def __init__(
        self, blocks: Sequence[Block], keep: Callable[[Tensor], Any], again: Callable[[Any], Any], *,
        told: bool = False, last: bool = True, until: int | None = None,
    ) -> None:  # fmt: skip
        self.blocks, self._keep, self._again = blocks, keep, again
        self._told, self._last, self._until = told, last, until
        self._made: list[tuple[Path, Tensor, int]] = []
        self._constants: dict[int, tuple[Tensor, int, Constant]] = {}
        self._open: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.calls: list[Call] = []

    def attach(self, noise: Callable[[Any], Any] | None) -> list[Any]:
        hooks: list[Any] = []
        for index, block in enumerate(self.blocks):
            if index == 0 and noise is not None:
                hooks.append(block.module.register_forward_hook(lambda _m, _a, output: noise(output)))
            before = block.module.register_forward_pre_hook(self._before(index), with_kwargs=True, prepend=True)
            hooks += [before, block.module.register_forward_hook(self._after)]
        return hooks

    def _before(self, index: int) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._open is not None or index != len(self.calls):
                raise Refused(f"{self.blocks[index].name} is called twice or out of order")
            self._open = replaced((args, kwargs), self._mark)
            if index and not any(isinstance(leaf, Link) for _, leaf in leaves(self._open)):
                raise Refused(f"what {self.blocks[index - 1].name} returns is changed before the next block")
            if index == self._until:
                self._close(None)
                raise Stop

        return before

    def _mark(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            for path, made, version in self._made:
                if made is leaf and made._version == version:
                    return Link(path)
            return self._constant(leaf)
        return None if type(leaf).__name__.endswith("Cache") else leaf  # stateful: to be replayed without

    def _constant(self, leaf: Tensor) -> Constant:
        known = self._constants.get(id(leaf))  # held, so that no other tensor takes its place
        if known is not None and known[1] == leaf._version:
            self._again(known[2].kept)
            return known[2]
        made = Constant(self._keep(leaf))
        self._constants[id(leaf)] = (leaf, leaf._version, made)
        return made

    def _after(self, _: nn.Module, args: Any, output: Any) -> None:
        self._made = [(path, leaf, leaf._version) for path, leaf in tensors(output)]
        self._close({path: fingerprint(leaf) for path, leaf, _ in self._made} if self._told else None)
        if self._last and len(self.calls) == len(self.blocks):
            raise Stop

    def _close(self, told: dict[Path, bytes] | None) -> None:
        assert self._open is not None
        args, kwargs = self._open
        self._open = None
        self.calls.append(Call(args, kwargs, told))


def record(model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch], store: Store) -> list[list[Call]]:
    """The calls of each block in each batch; raises Refused where they cannot be wired. Only inside `quiet`."""
    if len({id(block.module) for block in blocks}) < len(blocks):
        raise Refused("one module stands at several places of the chain")
    owners: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for parameter in block.module.parameters():
            if owners.setdefault(id(parameter), index) != index:
                raise Refused(f"{block.name} shares weights with another block")
    recording = _Recording(model, blocks, store)
    first = recording.whole(batches[0], told=True, last=False)
    _refuse_hidden(model, blocks, batches[0], store, first)
    if len(batches) == 1:
        return [first]
    last = recording.whole(batches[-1], told=True)
    plans = {shapes(batches[0]): Plan.of(first)}
    plan = plans.setdefault(shapes(batches[-1]), Plan.of(last))
    known = plans if plan.holds_for(last) else None
    return [first, *(recording.middle(batch, known) for batch in batches[1:-1]), last]


class _Recording:
    """Records batch by batch. Used inside `quiet`."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block], store: Store) -> None:
        self._model, self._blocks, self._store = model, blocks, store

    def whole(self, batch: Batch, *, told: bool = False, last: bool = True) -> list[Call]:
        """The calls of all blocks. told: with fingerprints. last: the model is stopped after the last block."""
        return _recorded(self._model, self._recorder(told=told, last=last), batch, None)

    def middle(self, batch: Batch, plans: dict[Any, Plan] | None) -> list[Call]:
        """The same, run no further than the plan for such shapes needs; the first of its shapes makes one."""
        if plans is None:
            return self.whole(batch)
        plan = plans.get(shapes(batch))
        if plan is None:
            calls = self.whole(batch)
            plans[shapes(batch)] = Plan.of(calls)
            return calls
        begun = _recorded(self._model, self._recorder(until=plan.reach), batch, None, count=plan.reach + 1)
        found = plan.followed(begun, self._store.use)
        if found is None:  # another way than the plan's: run it all
            for call in begun:
                for mark in call.constants():
                    self._store.drop(mark.kept)
            return self.whole(batch)
        return found

    def _recorder(self, **how: Any) -> _Recorder:
        return _Recorder(self._blocks, lambda t: self._store.put(t, once=True), self._store.use, **how)


def _recorded(
    model: nn.Module, recorder: _Recorder, batch: Batch, noise: Callable[[Any], Any] | None, count: int | None = None
) -> list[Call]:
    """count: of the blocks that are to be called; None: all."""
    hooks = recorder.attach(noise)
    try:
        run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    calls, blocks = recorder.calls, recorder.blocks
    if len(calls) < (len(blocks) if count is None else count):
        raise Refused(f"{blocks[len(calls)].name} was not called")
    return calls


def _refuse_hidden(
    model: nn.Module, blocks: Sequence[Block], batch: Batch, store: Store, calls: Sequence[Call]
) -> None:
    """Raise Refused where constants follow from what an earlier block of the chain returned."""
    recorder = _Recorder(blocks, fingerprint, lambda kept: kept)
    generator = torch.Generator().manual_seed(0)

    def disturb(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        noise = torch.randn(leaf.shape, generator=generator).to(leaf)
        return torch.where(leaf.isfinite(), leaf + noise * (leaf.abs().nanmean() + 1), leaf)

    try:
        moved = _recorded(model, recorder, batch, lambda output: replaced(output, disturb))
    except (RuntimeError, ValueError, IndexError) as error:
        raise Refused(f"the model fails when {blocks[0].name} returns something else ({error})") from error
    for block, before, after in list(zip(blocks, calls, moved, strict=True))[1:]:
        as_told = [(p, Constant(store.digest(m.kept)) if isinstance(m, Constant) else m) for p, m in before.marks()]
        if as_told != after.marks():
            raise Refused(f"an argument of {block.name} follows from earlier blocks by other ways than their output")
