"""Which handles are attached now. No two may hold the same model: each would undo the other's zeros."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    import rarefy.core.sparsity

_live: weakref.WeakSet[rarefy.core.sparsity.Sparsity] = weakref.WeakSet()


def enter(handle: rarefy.core.sparsity.Sparsity) -> None:
    """Count the handle as attached."""
    _live.add(handle)


def leave(handle: rarefy.core.sparsity.Sparsity) -> None:
    """It is attached no more."""
    _live.discard(handle)


def live_handle(
    model: nn.Module, but: rarefy.core.sparsity.Sparsity | None = None
) -> rarefy.core.sparsity.Sparsity | None:
    """The attached handle that holds weights of `model`, if there is one other than `but`."""
    theirs = {id(p) for p in model.parameters()}
    return next((s for s in _live if s is not but and any(id(h.parameter) in theirs for h in s.held())), None)


def refuse_second_handle(model: nn.Module, but: rarefy.core.sparsity.Sparsity | None = None) -> None:
    """Raise RuntimeError if another attached handle holds weights of `model`."""
    if live_handle(model, but) is not None:
        gc.collect()  # handle and optimizer hold each other, so one that nobody can reach may not be gone yet
    other = live_handle(model, but)
    if other is not None:
        raise RuntimeError(
            f"weights of this {type(model).__name__} are held by a live handle, {other!r}: two would undo each other's "
            "zeros. Call its end() (keeps the zeros) or detach() first."
        )
