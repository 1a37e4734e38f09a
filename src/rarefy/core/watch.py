"""Watching optimizers: when gradients are final, when a step is void, when a step of several optimizers is complete.

Everything hangs on the optimizers' own step hooks, so the training loop stays as it was. A step ends when the last of
the optimizers has stepped. Inside a step a site with a master hands the master to the optimizer; before and after, the
parameter holds the weight that the forward pass uses.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.core import bits
from rarefy.core.commit import reset_masked_state
from rarefy.core.held import Held, local
from rarefy.core.method import Method
from rarefy.core.optimizers import ZERO_STAYS_ZERO, owner, refuse_hidden_copies
from rarefy.core.sites import Site

if TYPE_CHECKING:
    import rarefy.core.sparsity


class Watch:
    """The hooks of one handle on its optimizers and parameters, and where inside a step we are."""

    def __init__(self, handle: rarefy.core.sparsity.Sparsity, optimizers: Sequence[Optimizer]) -> None:
        self.handle = handle
        self.optimizers = tuple(optimizers)
        self.skip = False
        self._of = {id(o): _Share(o, self._sites_of(o)) for o in optimizers}
        self._stepped: set[int] = set()
        self._acts = type(handle.method).on_gradients is not Method.on_gradients
        self._moves = type(handle.method).on_weights is not Method.on_weights
        self._wanted = False
        self._hooks: list[Any] = []
        for held in handle.held():
            held.attach()
        for optimizer in optimizers:
            self._hooks += [
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
                optimizer.register_load_state_dict_post_hook(self._loaded),
            ]
        self._announce()

    def _sites_of(self, optimizer: Optimizer) -> list[Site]:
        return [s for s in self.handle.sites if owner([optimizer], s.parameter) is not None]

    def remove(self) -> None:
        """Take every hook off again."""
        for hook in self._hooks:
            hook.remove()
        for held in self.handle.held():
            held.detach()
        self._hooks.clear()

    # -- the step ------------------------------------------------------------------------------------------------

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() ran inside the backward pass, where gradients are not final: "
                "step after backward(), or detach the handle."
            )
        share = self._of[id(optimizer)]
        share.recover()
        if id(optimizer) in self._stepped:  # the others were void this time
            self._complete()
        share.look()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if callable(closure):
            share.within = False
            wrapped = self._closure(share, closure)
            return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": wrapped})
        share.void = _voided(optimizer)
        if not share.void:
            self._gradients_final(share, deciding=True)
        return None

    def _closure(self, share: _Share, closure: Callable[[], Any]) -> Callable[[], Any]:
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

    def _gradients_final(self, share: _Share, *, deciding: bool) -> None:
        handle = self.handle
        for held in share.held:
            if held.train is not None or held.wants_dense:
                held.finalize()
        if self._acts or share.wants_dense:
            share.unscale()
        if self._acts:
            handle.ready, handle.deciding = tuple(share.sites), deciding
            try:
                handle.method.on_gradients(handle)
            except BaseException:
                handle.drop_staged()
                raise
            finally:
                handle.ready, handle.deciding = (), True
            handle.commit()
        if self.skip:
            share.hide()
        share.enter()
        self.skip = False

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        share = self._of[id(optimizer)]
        share.show()
        if share.void:
            share.void = False
            return
        share.leave()
        share.clear()
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self.optimizers):
            self._complete()

    def _complete(self) -> None:
        handle = self.handle
        self._stepped.clear()
        if self._wanted:
            handle.ledger.dense_steps.append(handle.ledger.steps)
        handle.step += 1
        handle.ledger.steps += 1
        if self._moves:
            self._weights_moved()
        for share in self._of.values():
            for held in share.held:
                held.forget()
        self._announce()

    def _weights_moved(self) -> None:
        handle = self.handle
        try:
            handle.method.on_weights(handle)
        except BaseException:
            handle.drop_staged()
            raise
        handle.commit()

    def _announce(self) -> None:
        """Tell the gradient hooks whether the dense gradient is wanted in the step that begins now."""
        handle = self.handle
        wanted = handle.method.wants_dense_gradient(handle.step, handle.steps)
        if wanted != self._wanted:
            for site in handle.sites:
                site.held.wants_dense = wanted
        self._wanted = wanted

    def _loaded(self, optimizer: Optimizer) -> None:
        reset_masked_state(self.handle)


class _Share:
    """What one optimizer updates: its sites, everything under a mask, and where inside its step we are."""

    def __init__(self, optimizer: Optimizer, sites: list[Site]) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.sites = sites
        self.masters = [s for s in sites if s.master is not None]
        self.held: list[Held] = [h for s in sites for h in (s.held, *s.followers)]
        self.void = False
        self.within = False
        self._keeps_zero = type(optimizer) in ZERO_STAYS_ZERO
        self._trusted: set[int] = set()
        self._hidden: list[tuple[nn.Parameter, Tensor]] = []
        self._looked_for_copies = False

    @property
    def optimizer(self) -> Optimizer:
        found = self._optimizer()
        assert found is not None
        return found

    @property
    def wants_dense(self) -> bool:
        return any(h.wants_dense for h in self.held)

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def look(self) -> None:
        """Which weights are known to be clear now, and will be after an optimizer that keeps zeros at zero."""
        self._trusted = {id(h) for h in self.held if h.keep is not None and h.weight_untouched} if self._keeps_zero else set()

    def unscale(self) -> None:
        """A fused optimizer under a gradient scaler would unscale inside its kernel: do it here, once, instead."""
        scale = getattr(self.optimizer, "grad_scale", None)
        if scale is None:
            return
        for p in self.parameters():
            if p.grad is not None:
                grad = local(p.grad)
                grad.mul_(scale.double().reciprocal().to(grad.device, torch.float32))
        for held in self.held:
            held.unscale(scale.double().reciprocal())
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]

    def hide(self) -> None:
        """An optimizer passes over parameters without gradients: that voids its step."""
        for p in self.parameters():
            if p.grad is not None:
                self._hidden.append((p, p.grad))
                p.grad = None

    def show(self) -> None:
        for p, grad in self._hidden:
            p.grad = grad
        self._hidden.clear()

    def enter(self) -> None:
        """Hand masters to the optimizer."""
        if self.within or not self.masters:
            return
        self.within = True
        with torch.no_grad():
            for site in self.masters:
                assert site.master is not None
                local(site.parameter).copy_(site.master)

    def leave(self) -> None:
        """Take masters back, unchanged where gradients do not reach, and leave the forward weight in the parameter."""
        if not self.within:
            return
        self.within = False
        with torch.no_grad():
            for site in self.masters:
                _take_back(site)
                site.held.clear_weight()

    def clear(self) -> None:
        """After the step: hold zeros. Weights that nothing but a zero-keeping optimizer has touched are clear already."""
        for held in self.held:
            if held.keep is None:
                continue
            if id(held) in self._trusted:
                held.seen_weight()
            else:
                held.clear_weight()
        if not self._looked_for_copies and not self._keeps_zero:
            refuse_hidden_copies(self.optimizer, self.held)
        self._looked_for_copies = True

    def recover(self) -> None:
        """The last step raised half-way: put gradients and forward weights back."""
        self.show()
        self.leave()
        self.void = False


def _take_back(site: Site) -> None:
    weight = local(site.parameter).detach()
    master = site.master
    assert master is not None
    if site.held.train is not None:
        fixed = master.clone()
        bits.clear_(fixed, ~site.held.train)
        bits.clear_(weight, site.held.train)
        weight.add_(fixed)
    master.copy_(weight)


def _voided(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler has told a fused optimizer that it must not step."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
