"""How the blocks of a chain are called: their actual arguments, and which of them the block before has returned.

A tensor that *is* a leaf of the previous block's output is a link to it; any other is a constant, kept once for all
blocks and batches that are given the same content. That nothing else hangs on earlier blocks (a mask made anew from the
hidden states, say) is made sure by disturbing the first block's output: constants must not move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.capture.batches import Batch
from rarefy.core.capture.blocks import Block
from rarefy.core.capture.runs import Stop, run
from rarefy.core.capture.store import Store, fingerprint
from rarefy.core.capture.tree import Mark, Path, leaves, replaced, tensors


class Refused(BaseException):
    """The chain cannot be replayed, for the reason given. No model may catch it."""


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
        return [(p, leaf) for p, leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Link | Constant)]


class _Recorder:
    """Hooks on the members of a chain for one run."""

    def __init__(self, blocks: Sequence[Block], keep: Callable[[Tensor], Any], *, told: bool, last: bool) -> None:
        self._blocks, self._keep, self._told, self._last = blocks, keep, told, last
        self._made: list[tuple[Path, Tensor, int]] = []
        self._open: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.calls: list[Call] = []

    def attach(self, noise: Callable[[Any], Any] | None) -> list[Any]:
        hooks: list[Any] = []
        for index, block in enumerate(self._blocks):
            if index == 0 and noise is not None:
                hooks.append(block.module.register_forward_hook(lambda _m, _a, output: noise(output)))
            before = block.module.register_forward_pre_hook(self._before(index), with_kwargs=True, prepend=True)
            hooks += [before, block.module.register_forward_hook(self._after)]
        return hooks

    def _before(self, index: int) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._open is not None or index != len(self.calls):
                raise Refused(f"{self._blocks[index].name} is called twice or out of order")
            self._open = replaced((args, kwargs), self._mark)
            if index and not any(isinstance(leaf, Link) for _, leaf in leaves(self._open)):
                raise Refused(f"what {self._blocks[index - 1].name} returns is changed before the next block")

        return before

    def _mark(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            for path, made, version in self._made:
                if made is leaf and made._version == version:
                    return Link(path)
            return Constant(self._keep(leaf))
        return None if type(leaf).__name__.endswith("Cache") else leaf  # stateful: to be replayed without

    def _after(self, _: nn.Module, args: Any, output: Any) -> None:
        assert self._open is not None
        args, kwargs = self._open
        self._open = None
        self._made = [(path, leaf, leaf._version) for path, leaf in tensors(output)]
        told = {path: fingerprint(leaf) for path, leaf, _ in self._made} if self._told else None
        self.calls.append(Call(args, kwargs, told))
        if self._last and len(self.calls) == len(self._blocks):
            raise Stop


def record(model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch], store: Store) -> list[list[Call]]:
    """The calls of each block in each batch; raises Refused where they cannot be wired. Only inside `quiet`."""
    if len({id(block.module) for block in blocks}) < len(blocks):
        raise Refused("one module stands at several places of the chain")
    owners: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for parameter in block.module.parameters():
            if owners.setdefault(id(parameter), index) != index:
                raise Refused(f"{block.name} shares weights with another block")
    found: list[list[Call]] = []
    for index, batch in enumerate(batches):
        told = index in (0, len(batches) - 1)
        recorder = _Recorder(blocks, lambda t: store.put(t, once=True), told=told, last=index > 0)
        found.append(_recorded(model, recorder, batch, None))
    _refuse_hidden(model, blocks, batches[0], store, found[0])
    return found


def _recorded(model: nn.Module, recorder: _Recorder, batch: Batch, noise: Callable[[Any], Any] | None) -> list[Call]:
    hooks = recorder.attach(noise)
    try:
        run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    calls, blocks = recorder.calls, recorder._blocks  # pyright: ignore[reportPrivateUsage]
    if len(calls) < len(blocks):
        raise Refused(f"{blocks[len(calls)].name} was not called")
    return calls


def _refuse_hidden(
    model: nn.Module, blocks: Sequence[Block], batch: Batch, store: Store, calls: Sequence[Call]
) -> None:
    """Raise Refused where constants follow from what an earlier block of the chain returned."""
    recorder = _Recorder(blocks, fingerprint, told=False, last=True)
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
