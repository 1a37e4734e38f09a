"""The last word: the whole model, dense against packed, interleaved; what loses is put back bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rarefy.core.undisturbed import undisturbed
from rarefy.runtime import measure, plan
from rarefy.runtime.find import feed
from rarefy.runtime.report import Whole


class Change:
    """A module with what it is made of, dense and packed; to switch between the two takes microseconds."""

    def __init__(self, module: nn.Module) -> None:
        """Of a module that is dense, and about to be packed."""
        self.module = module
        self._states: dict[bool, tuple[type[nn.Module], dict[str, Any]]] = {}
        self._note(False)

    def show(self, packed: bool) -> None:
        """Be what it is that way; what it was until now is noted, with what it has made for itself meanwhile."""
        self._note(not packed)
        kind, state = self._states[packed]
        mode = self.module.training
        self.module.__class__ = kind
        self.module.__dict__.clear()
        self.module.__dict__.update(_copied(state))
        self.module.training = mode

    def _note(self, packed: bool) -> None:
        self._states[packed] = (type(self.module), _copied(self.module.__dict__))


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """With parameters, buffers and children in dictionaries of their own."""
    owned = ("_parameters", "_buffers", "_modules")
    return {k: dict(v) if k in owned else v for k, v in state.items()}


def show(packed: bool, plans: Sequence[tuple[nn.Module, Any]], changes: Sequence[Change]) -> None:
    """Make a model packed, with its plans (module and its forward), or dense, without; until now it was the other."""
    for module, forward in plans:
        if packed:
            module.__dict__["forward"] = forward
        else:
            del module.__dict__["forward"]
    for change in changes:
        change.show(packed)


class Judge:
    """Times a packed model against what it was, and leaves the faster of the two."""

    def __init__(self, model: nn.Module, changes: Sequence[Change], examples: Sequence[Any]) -> None:
        self.model, self.changes, self.examples = model, changes, examples
        self.plans = plan.installed(model)
        self._packed = True

    def decide(self) -> tuple[tuple[Whole, ...], bool]:
        """The times, and whether the packed model stays. Plans that do not pay are taken back first."""
        found = self._compare()
        if self.plans and any(ratio.loses for ratio in found):
            plan.remove(self.model)
            self.plans = []
            found = self._compare()
        stays = not any(ratio.loses for ratio in found)
        if not stays:
            self._show(False)
            self.plans = []
        whole = [Whole(i, r.first, r.second, r.median, r.low, r.high, r.pairs) for i, r in enumerate(found)]
        return tuple(whole), stays

    def _compare(self) -> list[measure.Ratio]:
        with undisturbed(self.model), torch.no_grad():
            self.model.eval()
            found = [measure.ratios(self._side(False, e), self._side(True, e)) for e in self.examples]
        self._show(True)
        return found

    def _side(self, packed: bool, example: Any) -> measure.Side:
        return lambda: self._show(packed), lambda: feed(self.model, example)

    def _show(self, packed: bool) -> None:
        """Be packed, with plans, or as before, without."""
        if packed is self._packed:
            return
        self._packed = packed
        show(packed, self.plans, self.changes)
