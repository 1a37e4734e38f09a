"""What each optimizer keeps per weight, and how a position is set back to its initial state.

A grown or dropped position starts again: zero for momenta and averages, the initial step size for Rprop, the initial
accumulator for Adagrad. Factored state (Adafactor) has no positions and is kept; the flat history of LBFGS mixes all
positions and is cleared; a copy of the parameter (ASGD's average) follows the weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.core import bits
from rarefy.core.held import Held, local

_O = torch.optim

ZERO_STAYS_ZERO: frozenset[type[Optimizer]] = frozenset(
    {_O.SGD, _O.Adam, _O.AdamW, _O.Adamax, _O.NAdam, _O.RAdam, _O.Adagrad, _O.Adadelta, _O.RMSprop, _O.Rprop, _O.ASGD}
)
"""Optimizers that work weight by weight and leave a zero weight with zero gradient and initial state at zero."""

_COPIES: dict[type[Optimizer], frozenset[str]] = {_O.ASGD: frozenset({"ax"})}
_MASTER_NAMES = frozenset({"master", "master_param", "master_params", "master_weight", "fp32_param", "fp32_master"})


def unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside a wrapper that holds it as `.optimizer` (as Accelerate's does)."""
    while not isinstance(optimizer, Optimizer) or type(optimizer).__name__ == "AcceleratedOptimizer":
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise TypeError(
                f"optimizer={optimizer!r} is no torch.optim.Optimizer and wraps none: "
                "pass an optimizer, or a sequence of them."
            )
        optimizer = inner
    return optimizer


def as_sequence(optimizer: Any) -> tuple[Optimizer, ...]:
    """One optimizer or several as a tuple. Raises TypeError on anything else, ValueError on an empty sequence."""
    many: Iterable[Any] = optimizer if isinstance(optimizer, list | tuple) else (optimizer,)
    found = tuple(unwrap(o) for o in many)
    if not found:
        raise ValueError("optimizer=() holds no optimizer: pass one, or None to attach later.")
    return found


def refuse_unfit(optimizers: Sequence[Optimizer], held: Sequence[Held]) -> None:
    """Raise ValueError for optimizers under which masked weights could not be promised to stay zero."""
    for optimizer in optimizers:
        if isinstance(optimizer, _O.SparseAdam):
            raise ValueError(
                "SparseAdam takes sparse gradients only, which carry no value at masked positions of a dense weight: "
                "use Adam or AdamW (and sparse=False in the embedding)."
            )
        for state in optimizer.state.values():
            _refuse_master(optimizer, state)
    theirs = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    for item in held:
        parameter = item.parameter
        if getattr(parameter, "_in_backward_optimizers", None):
            raise ValueError(
                f"{item.name!r} is updated by an optimizer inside the backward pass, where its gradient is never whole: "
                "step an ordinary optimizer after backward()."
            )
        if parameter.requires_grad and id(parameter) not in theirs:
            raise ValueError(
                f"no given optimizer holds {item.name!r} (shape {tuple(parameter.shape)}): its parameters were replaced "
                "after the optimizer was made, or the optimizer works on copies of its own. Make the optimizer from "
                "model.parameters() of the model as it is now, pass every optimizer, or freeze the layer."
            )


def _refuse_master(optimizer: Optimizer, state: Any) -> None:
    hidden = _MASTER_NAMES.intersection(state) if isinstance(state, dict) else ()
    if hidden:
        raise ValueError(
            f"{type(optimizer).__name__} keeps a hidden master copy of the weights ({', '.join(sorted(hidden))}), which "
            "would bring masked weights back: use one that updates the parameter itself, with float32 parameters "
            "under autocast if precision is the reason."
        )


def refuse_hidden_copies(optimizer: Optimizer, held: Iterable[Held]) -> None:
    """After a first step: raise RuntimeError if the state holds copies of the weights that the table does not know."""
    known = _COPIES.get(type(optimizer), frozenset())
    for item in held:
        weight = local(item.parameter)
        state = optimizer.state.get(item.parameter, {})
        _refuse_master(optimizer, state)
        for name, value in state.items():
            if not _per_weight(value, weight) or name in known or not bool(weight.any()):
                continue
            if torch.equal(value.to(weight.dtype), weight.detach()):
                raise RuntimeError(
                    f"{type(optimizer).__name__} keeps a copy of the weights of {item.name!r} as state[{name!r}], which "
                    "would bring masked weights back. Use an optimizer that updates the parameter itself."
                )


def _per_weight(value: Any, weight: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == weight.shape and value.ndim > 0


def _group_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    for group in optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            return group
    return {}


def _initial(optimizer: Optimizer, name: str, group: dict[str, Any]) -> float:
    if isinstance(optimizer, _O.Rprop) and name == "step_size":
        return float(group["lr"])
    if isinstance(optimizer, _O.Adagrad) and name == "sum":
        return float(group["initial_accumulator_value"])
    return 0.0


def owner(optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> Optimizer | None:
    """The optimizer that updates `parameter`, if any."""
    return next((o for o in optimizers if _group_of(o, parameter)), None)


def learning_rate(optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> float:
    """The current learning rate of `parameter`'s group; 0 when nothing updates it."""
    optimizer = owner(optimizers, parameter)
    return float(_group_of(optimizer, parameter)["lr"]) if optimizer is not None else 0.0


def reset_state(optimizer: Optimizer, item: Held, stay: Tensor) -> None:
    """Initial state wherever the byte mask `stay` is 0 (positions whose trainability changed, or all that is masked)."""
    if isinstance(optimizer, _O.LBFGS):
        # One history for all parameters, kept under the first of them.
        optimizer.state[optimizer.param_groups[0]["params"][0]].clear()
        return
    weight = local(item.parameter)
    state = optimizer.state.get(item.parameter)
    if not state:
        return
    group = _group_of(optimizer, item.parameter)
    with torch.no_grad():
        for name, raw in state.items():
            value = local(raw) if isinstance(raw, Tensor) else raw
            if not _per_weight(value, weight):
                continue
            if name in _COPIES.get(type(optimizer), frozenset()):
                value.copy_(torch.where(stay.ne(0), value, weight.to(value.dtype)))
                continue
            bits.clear_(value, stay)
            initial = _initial(optimizer, name, group)
            if initial:
                value.add_(stay.eq(0).to(value.dtype), alpha=initial)
