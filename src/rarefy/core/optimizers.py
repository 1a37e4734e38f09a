"""What each optimizer keeps per weight, and how a position is set back to its initial state.

A grown or dropped position starts again: zero for momenta and averages, the initial step size for Rprop, the initial
accumulator for Adagrad. Factored state (Adafactor) has no positions and is kept; the flat history of LBFGS mixes all
positions and is cleared; a copy of the parameter (ASGD's average) follows the weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.core import bits
from rarefy.core.held import Held, local

_O = torch.optim

WEIGHTWISE: frozenset[type[Optimizer]] = frozenset(
    {_O.SGD, _O.Adam, _O.AdamW, _O.Adamax, _O.NAdam, _O.RAdam, _O.Adagrad, _O.Adadelta, _O.RMSprop, _O.Rprop}
)
"""Optimizers that treat every weight by itself and keep no copy of it: whatever they are given at a masked position
moves that weight only, which is cleared after the step, and its state, which starts anew if it ever grows."""

ELEMENTWISE: frozenset[type[Optimizer]] = WEIGHTWISE | {_O.ASGD, _O.LBFGS}
"""Optimizers that give a vector of some of the weights what they give those weights in their matrix."""

_COPIES: dict[type[Optimizer], frozenset[str]] = {_O.ASGD: frozenset({"ax"})}
_DRIFTING: dict[type[Optimizer], frozenset[str]] = {
    _O.Adamax: frozenset({"exp_inf"}),
    _O.Rprop: frozenset({"step_size"}),
}
"""State that a zero gradient moves, or that begins with the learning rate of its day: divisors and step sizes, by which
a weight without a gradient does not move. It starts anew with the weight, and is left when a past comes in."""

_FACTORED: dict[type[Optimizer], frozenset[str]] = {_O.Adafactor: frozenset({"row_var", "col_var"})}
_COUNTERS = ("func_evals", "n_iter")
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
    many = cast(Sequence[Any], optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
    found = tuple(unwrap(o) for o in many)
    if not found:
        raise ValueError("optimizer=() holds no optimizer: pass one, or None to attach later.")
    if len({id(o) for o in found}) < len(found):
        raise ValueError(f"optimizer={optimizer!r} holds the same optimizer twice: pass each of them once.")
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
        refuse_hidden_copies(optimizer, held)
    theirs = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    for item in held:
        parameter = item.parameter
        if getattr(parameter, "_in_backward_optimizers", None):
            raise ValueError(
                f"{item.name!r} is updated by an optimizer inside the backward pass, where its gradient is never "
                "whole: step an ordinary optimizer after backward()."
            )
        if parameter.requires_grad and id(parameter) not in theirs:
            raise ValueError(
                f"no given optimizer holds {item.name!r} (shape {tuple(parameter.shape)}): the model's parameters were "
                "replaced after the optimizer was made, or the optimizer works on copies of its own. Make it from "
                "model.parameters() of the model as it is now, pass every optimizer, or freeze the layer."
            )


def _refuse_master(optimizer: Optimizer, state: Any) -> None:
    hidden = _MASTER_NAMES.intersection(cast(dict[str, Any], state)) if isinstance(state, dict) else ()
    if hidden:
        raise ValueError(
            f"{type(optimizer).__name__} keeps a hidden master copy of the weights ({', '.join(sorted(hidden))}), "
            "which would bring masked weights back: use one that updates the parameter itself, with float32 parameters "
            "under autocast if precision is the reason."
        )


def refuse_hidden_copies(optimizer: Optimizer, held: Iterable[Held]) -> None:
    """Raise ValueError if the optimizer's state holds copies of the weights that the table does not know.

    Optimizers make their state in the first step, so it is looked at before the first step and after it.
    """
    if type(optimizer) in WEIGHTWISE:
        return
    known = _named(_COPIES, optimizer)
    for item in held:
        state = optimizer.state.get(item.parameter, {})
        _refuse_master(optimizer, state)
        weight = local(item.parameter).detach()
        if weight.ndim < 2 or not bool(weight.any()):  # scales and shifts may equal anything that starts at 1 or 0
            continue
        for name, raw in state.items():
            value = local(raw) if isinstance(raw, Tensor) else raw
            if name not in known and _per_weight(value, weight) and _is_copy(value, weight):
                raise ValueError(
                    f"{type(optimizer).__name__} keeps a copy of the weights of {item.name!r} as state[{name!r}], "
                    "which would bring masked weights back: use an optimizer that updates the parameter itself, such "
                    "as torch.optim.SGD or AdamW."
                )


def _is_copy(value: Tensor, weight: Tensor) -> bool:
    """Whether they agree wherever the weight is not zero (a copy may be older than the masks)."""
    return bool(((value.to(weight.dtype) == weight) | (weight == 0)).all())


def _named(table: Mapping[type[Optimizer], frozenset[str]], optimizer: Optimizer) -> frozenset[str]:
    return next((names for kind, names in table.items() if isinstance(optimizer, kind)), frozenset[str]())


def _per_weight(value: Any, weight: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == weight.shape and value.ndim > 0 and value.is_floating_point()


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


def per_weight(
    optimizer: Optimizer, parameter: nn.Parameter, shape: torch.Size
) -> list[tuple[str, Tensor, float | None]]:
    """(name, state, initial value) of what it keeps for each entry, of this shape; None: a copy of the parameter."""
    group, copies = _group_of(optimizer, parameter), _named(_COPIES, optimizer)
    return [
        (name, value, None if name in copies else _initial(optimizer, name, group))
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor) and value.shape == shape and value.ndim > 0 and value.is_floating_point()
    ]


def reset_state(optimizer: Optimizer, item: Held, stay: Tensor) -> None:
    """Initial state wherever the byte mask `stay` is 0: positions whose trainability changed, or (`item.train` itself:
    a state with a past comes in) all that gradients do not reach. That leaves a past under the same masks as it is.
    """
    comes_in = stay is item.train
    if isinstance(optimizer, _O.LBFGS):
        _forget_history(optimizer, item, stay, comes_in)
        return
    weight = local(item.parameter)
    group = _group_of(optimizer, item.parameter)
    kept = _named(_FACTORED, optimizer) | (_named(_DRIFTING, optimizer) if comes_in else frozenset[str]())
    copies = _named(_COPIES, optimizer)
    with torch.no_grad():
        for name, raw in optimizer.state.get(item.parameter, {}).items():
            value = local(raw) if isinstance(raw, Tensor) else raw
            if name in kept or not _per_weight(value, weight):
                continue
            if name in copies:
                value.copy_(torch.where(stay.ne(0), value, weight.to(value.dtype)))
            else:
                _reset(value, stay, _initial(optimizer, name, group), unless_equal=comes_in)


def _reset(value: Tensor, stay: Tensor, initial: float, *, unless_equal: bool) -> None:
    if unless_equal and not bool(value[stay.eq(0)].ne(initial).any()):  # −0.0 stays −0.0
        return
    bits.clear_(value, stay)
    if initial:
        value.add_(stay.eq(0).to(value.dtype), alpha=initial)


def _forget_history(optimizer: Optimizer, item: Held, stay: Tensor, comes_in: bool) -> None:
    """LBFGS keeps one history of all parameters, under the first of them. It goes whenever masks change; when a state
    with a past comes in, only if masked positions took part in it.
    """
    parameters = optimizer.param_groups[0]["params"]
    state = optimizer.state.get(parameters[0])
    if state and not (comes_in and not _took_part(state, parameters, item, stay)):
        forget_history(optimizer)


def forget_history(optimizer: Optimizer) -> None:
    """That of LBFGS, of all parameters; counters stay."""
    state: dict[str, Any] = optimizer.state.get(optimizer.param_groups[0]["params"][0]) or {}
    for name in [name for name in state if name not in _COUNTERS]:
        del state[name]
    if state:
        state["n_iter"] = 0  # what LBFGS goes by; it may be in the middle of a step


def forget_misfit(optimizer: Optimizer) -> None:
    """The history of LBFGS, if it is of parameters of another length than they have now."""
    parameters: Sequence[Tensor] = optimizer.param_groups[0]["params"]
    state: dict[str, Any] = optimizer.state.get(parameters[0]) or {}
    vector = state.get("prev_flat_grad")
    if isinstance(vector, Tensor) and vector.numel() != sum(p.numel() for p in parameters):
        forget_history(optimizer)
    optimizer._numel_cache = None  # type: ignore[attr-defined]  # it counts entries once


def _took_part(state: dict[str, Any], parameters: Sequence[Tensor], item: Held, stay: Tensor) -> bool:
    begin = 0
    for p in parameters:
        if p is item.parameter:
            break
        begin += p.numel()
    vectors = [state.get("d"), state.get("prev_flat_grad"), *state.get("old_dirs", ()), *state.get("old_stps", ())]
    masked = stay.eq(0).reshape(-1)
    return any(bool(v[begin : begin + masked.numel()][masked].any()) for v in vectors if isinstance(v, Tensor))
