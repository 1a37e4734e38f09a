"""Which parameters are layers' own weights, and how their modules store them."""

from __future__ import annotations

from torch import Tensor, nn

from rarefy.axes import Layout

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
DEFAULT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def layout_of(name: str, module: nn.Module, parameter: Tensor) -> Layout:
    """How `module` stores its parameter of that name."""
    if _is_stacked(module, parameter):
        return Layout(transposed=_stores_inputs_first(name, module, parameter), stacked=int(parameter.shape[0]))
    transposed = isinstance(module, _TRANSPOSED)
    groups = int(getattr(module, "groups", 1)) if transposed else 1
    return Layout(transposed=transposed or _is_conv1d_of_transformers(module), groups=groups)


def is_default(name: str, module: nn.Module, parameter: Tensor) -> bool:
    """A layer's own weight; matrices that a subclass adds (adapters) are not meant unless named."""
    if _is_stacked(module, parameter):
        return True
    known = isinstance(module, DEFAULT_LAYERS) or _is_conv1d_of_transformers(module)
    return known and name.rpartition(".")[2] == "weight"


def _is_conv1d_of_transformers(module: nn.Module) -> bool:
    """GPT-2's layer: a linear one that stores (in, out). Known by its name and attributes, so without an import."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(weight, "ndim", 0) == 2


def _is_stacked(module: nn.Module, parameter: Tensor) -> bool:
    return type(module).__name__.endswith("Experts") and parameter.ndim == 3


def _stores_inputs_first(name: str, module: nn.Module, parameter: Tensor) -> bool:
    """Whether fused experts are (experts, in, out): as the module says, else as the width of the model tells.

    What reads the model's hidden states ("gate", "up") has its width as inputs, what writes them ("down") as outputs.
    """
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    hidden = getattr(module, "hidden_size", None) or getattr(module, "hidden_dim", None)
    first, second = parameter.shape[1:]
    if not isinstance(hidden, int) or (first == hidden) == (second == hidden):
        return False
    writes = "down" in name.rpartition(".")[2]
    return (second == hidden) if writes else (first == hidden)
