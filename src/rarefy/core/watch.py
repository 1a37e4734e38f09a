"""Watching optimizers: when gradients are final, when a step is void, when a step of several optimizers is complete.

Everything hangs on the optimizers' own step hooks, so the training loop stays as it was. A step ends when the last of
the optimizers has stepped, or, where a gradient scaler kept one of them from it, when another begins its next step.
Inside a step a site with a master hands the master to the optimizer; before and after, the parameter holds the weight
that the forward pass uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from rarefy.core.commit import reset_masked_state
from rarefy.core.held import Held, uncompiled
from rarefy.core.method import Method
from rarefy.core.share import Share
from rarefy.core.sparse.execute import refuse_waiting, take_in

if TYPE_CHECKING:
    import rarefy.core.sparsity

_backward = torch._C._current_graph_task_id  # pyright: ignore[reportPrivateUsage]


class Watch:
    """The hooks of one handle on its optimizers and parameters, and where inside a step we are."""

    def __init__(self, handle: rarefy.core.sparsity.Sparsity, optimizers: Sequence[Optimizer]) -> None:
        self.handle = handle
        self.optimizers = tuple(optimizers)
        self.skip = False
        method = type(handle.method)
        self._acts = method.on_gradients is not Method.on_gradients
        self._moves = method.on_weights is not Method.on_weights
        self._asks = method.wants_dense_gradient is not Method.wants_dense_gradient
        self._wanted = False  # a dense gradient in this step
        self._gathers = False  # dense gradients in the backward passes to come
        self._moved = False  # some optimizer has stepped since the last step was complete
        self._past = False  # a state was loaded into an optimizer
        self._waits = handle.execution == "sparse"  # for weights of a resumed run, perhaps
        self._of = {id(o): Share(o) for o in optimizers}
        self._unowned: list[Held] = []
        self._divide()
        self._hooks: list[Any] = []
        for held in handle.held():
            held.attach()
        before, after = uncompiled(self._before), uncompiled(self._after)
        for optimizer in optimizers:
            self._hooks += [
                optimizer.register_step_pre_hook(before),
                optimizer.register_step_post_hook(after),
                optimizer.register_load_state_dict_post_hook(self._loaded),
            ]
        self.announce()

    def _divide(self) -> None:
        """Which optimizer holds what; now, since parameter groups may be added later."""
        for share in self._of.values():
            share.take(self.handle.sites)
        theirs = {id(held) for share in self._of.values() for held in share.held}
        self._unowned = [held for held in self.handle.held() if id(held) not in theirs]
        for held in self.handle.held():
            held.remembers = self._acts or self._asks

    def remove(self) -> None:
        """Take every hook off again."""
        for hook in self._hooks:
            hook.remove()
        for held in self.handle.held():
            held.detach()
        self._hooks.clear()

    # -- the step ------------------------------------------------------------------------------------------------

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _backward() != -1:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() ran inside the backward pass, where gradients are not final: "
                "step after backward(), or detach the handle."
            )
        share = self._of[id(optimizer)]
        if self._waits:
            refuse_waiting(self.handle.sites)
            self._waits = False
        if self._past:
            self._past = False
            reset_masked_state(self.handle)
            take_in(self.handle, self.optimizers)
        share.recover()
        if len(optimizer.param_groups) != share.groups:
            self._divide()
        if share.passed:  # the others will not step any more
            self._close()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if callable(closure):
            wrapped = self._closure(share, closure)
            return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": wrapped})
        share.void = _voided(optimizer)
        if not share.void:
            self._gradients_final(share, deciding=True)
        return None

    def _closure(self, share: Share, closure: Callable[[], Any]) -> Callable[[], Any]:
        evaluations = 0

        def evaluate() -> Any:
            nonlocal evaluations
            share.leave()
            with torch.enable_grad():
                loss = closure()
            self._gradients_final(share, deciding=evaluations == 0)
            evaluations += 1
            return loss

        return evaluate

    def _gradients_final(self, share: Share, *, deciding: bool) -> None:
        self.skip = False
        if self._acts or self._gathers:
            share.finalize(trust=share.weightwise, dense=self._gathers)
            share.unscale()
        elif not share.weightwise:
            share.finalize(trust=False, dense=False)
        if self._acts:
            self._act(share, deciding)
        if self.skip:
            share.hide()
        if share.masters:
            share.enter()

    def _act(self, share: Share, deciding: bool) -> None:
        handle = self.handle
        handle.ready, handle.deciding = share.sites, deciding
        try:
            handle.method.on_gradients(handle)
        except BaseException:
            handle.drop_staged()
            raise
        finally:
            handle.ready, handle.deciding = (), True
        handle.commit()

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        share = self._of[id(optimizer)]
        share.passed = True
        if share.void:
            share.void = False
        else:
            share.finish()
            self._moved = True
            if self._gathers:
                share.spend()
        if len(self._of) == 1 or all(other.passed for other in self._of.values()):
            self._close()
        else:
            self.announce()

    def _close(self) -> None:
        """Every optimizer has stepped, or will not."""
        for share in self._of.values():
            share.passed = False
        if self._moved:
            self._moved = False
            self._complete()

    def _complete(self) -> None:
        handle = self.handle
        for held in self._unowned:
            held.clear_weight()
        if self._wanted:
            handle.ledger.dense_steps.append(handle.ledger.steps)
        handle.step += 1
        handle.ledger.steps += 1
        try:
            if self._moves:
                self._weights_moved()
        finally:
            if self._asks:
                for share in self._of.values():
                    share.forget()
                self.announce()

    def _weights_moved(self) -> None:
        handle = self.handle
        try:
            handle.method.on_weights(handle)
        except BaseException:
            handle.drop_staged()
            raise
        handle.commit()

    def announce(self) -> None:
        """Tell the gradient hooks whether dense gradients are wanted of the backward passes to come.

        While a step is half done, the next gradient may belong to it or to the step after it.
        """
        if not self._asks:
            return
        handle = self.handle
        wants = handle.method.wants_dense_gradient
        self._wanted = wants(handle.step, handle.steps)
        gathers = self._wanted or (self._moved and wants(handle.step + 1, handle.steps))
        if gathers != self._gathers:
            for site in handle.sites:
                site.held.want_dense(gathers)
        self._gathers = gathers

    def _loaded(self, optimizer: Optimizer) -> None:
        """Its masked state is set back when the next step begins: the masks that belong to it may be loaded later."""
        self._past = True


def _voided(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler has told a fused optimizer that it must not step."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
