"""What one of the optimizers updates: its sites, everything under a mask, and where inside its step we are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.core import bits
from rarefy.core.dense import Dense
from rarefy.core.held import Held, local
from rarefy.core.optimizers import WEIGHTWISE, refuse_hidden_copies
from rarefy.core.sites import Site


class Share:
    """One optimizer's part of a step. `passed`: it has had its turn; `void`: a gradient scaler voids that turn."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.weightwise = type(optimizer) in WEIGHTWISE
        self.sites: tuple[Site, ...] = ()
        self.masters: list[Site] = []
        self.held: list[Held] = []
        self.groups = 0
        self.passed = False
        self.void = False
        self._within = False
        self._hidden: list[tuple[nn.Parameter, Tensor]] = []
        self._spent: list[tuple[Held, Dense]] = []
        self._searched = self.weightwise

    def take(self, sites: Sequence[Site]) -> None:
        """Those of `sites` and their followers that the optimizer holds now; a follower may be another's."""
        theirs = {id(p) for p in self.parameters()}
        self.sites = tuple(site for site in sites if id(site.parameter) in theirs)
        self.masters = [site for site in self.sites if site.master is not None]
        every = [held for site in sites for held in (site.held, *site.followers)]
        self.held = [held for held in every if id(held.parameter) in theirs]
        self.groups = len(self.optimizer.param_groups)

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    # -- before the optimizer works ------------------------------------------------------------------------------

    def finalize(self, *, trust: bool, dense: bool) -> None:
        """See `Held.finalize`. dense: whether some of the gradients were gathered whole."""
        for held in self.held:
            held.finalize(trust=trust)
        if dense:
            found = [held.dense for held in self.held if held.dense is not None]
            known = next((each.scale for each in found if each.scale is not None), None)
            if known is not None:  # clipping by norm and unscaling scale all gradients alike
                for each in found:
                    each.rescale(known)

    def unscale(self) -> None:
        """A fused optimizer under a gradient scaler would unscale inside its kernel: do it here, once, instead."""
        scale = getattr(self.optimizer, "grad_scale", None)
        if scale is None:
            return
        inverse = scale.double().reciprocal()
        for p in self.parameters():
            if p.grad is not None:
                grad = local(p.grad)
                grad.mul_(inverse.to(grad.device, torch.float32))
        for held in self.held:
            held.unscale(inverse)
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]

    def hide(self) -> None:
        """An optimizer passes over parameters without gradients: that voids its step."""
        for p in self.parameters():
            if p.grad is not None:
                self._hidden.append((p, p.grad))
                p.grad = None

    def enter(self) -> None:
        """Hand masters to the optimizer."""
        if self._within:
            return
        self._within = True
        with torch.no_grad():
            for site in self.masters:
                assert site.master is not None
                local(site.parameter).copy_(site.master)

    # -- after it has ---------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Take masters back, unchanged where gradients do not reach, and leave the forward weight in the parameter."""
        if self._within:
            self._take_back()
            for site in self.masters:
                site.held.clear_weight()

    def _take_back(self) -> None:
        self._within = False
        with torch.no_grad():
            for site in self.masters:
                _take_back(site)

    def finish(self) -> None:
        """The optimizer has worked: put gradients back where they were, take masters back, hold zeros."""
        self._show()
        if self._within:
            self._take_back()
        for held in self.held:
            held.clear_weight()
        if not self._searched:
            refuse_hidden_copies(self.optimizer, self.held)
            self._searched = True

    def _show(self) -> None:
        for p, grad in self._hidden:
            p.grad = grad
        self._hidden.clear()

    def spend(self) -> None:
        """The dense gradients that are there belong to this step."""
        self._spent = [(held, held.dense) for held in self.held if held.dense is not None]

    def forget(self) -> None:
        """The step is complete: drop its dense gradients."""
        for held, dense in self._spent:
            if held.dense is dense:  # else it belongs to a later step
                held.dense = None
        self._spent.clear()

    def recover(self) -> None:
        """If the last step raised half-way: put forward weights back, and gradients unless there are newer ones."""
        if self._hidden:
            if any(p.grad is not None for p, _ in self._hidden):
                self._hidden.clear()
            self._show()
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
