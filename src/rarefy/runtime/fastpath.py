"""Modules of torch that read the weights of the layers in them, past their forward, and how that is switched off.

In evaluation mode nn.TransformerEncoderLayer gives its weights to one fused dense operator. With packed layers in it,
that would unpack them in every call.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from rarefy.runtime.packed import Packed

# Class and the attribute that keeps it from doing so, with the value that does.
_SWITCHES: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
_KEPT = "_rarefy_fast_path"


def concerned(model: nn.Module, layers: set[nn.Module]) -> list[nn.Module]:
    """The modules of such a class that hold one of the layers."""
    found = [m for m in model.modules() if type(m) in _SWITCHES]
    return [m for m in found if any(inner in layers for inner in m.modules())]


def close(module: nn.Module) -> None:
    """Let it call its layers from now on."""
    name, value = _SWITCHES[type(module)]
    state: dict[str, Any] = module.__dict__
    if name in state:
        state[_KEPT] = state[name]
        state[name] = value


def reopen(model: nn.Module) -> None:
    """As they were, where nothing in them is packed."""
    for module in model.modules():
        if _KEPT in module.__dict__ and not any(isinstance(m, Packed) for m in module.modules()):
            state = module.__dict__
            state[_SWITCHES[type(module)][0]] = state.pop(_KEPT)
