"""Dense forward FLOPs of each weight, measured by running one example: 2 per multiply-accumulate, per sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def call(model: Callable[..., Any], batch: Any) -> Any:
    """`model(batch)` for a tensor, `model(*batch)` for a tuple or list, `model(**batch)` for a mapping."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def measure(model: nn.Module, example: Any) -> dict[str, float]:
    """FLOPs of one forward sample per weight of Linear and convolution, by parameter name (tied weights add up).

    example: one batch as the model takes it; its first axis counts samples. The model runs once in evaluation mode and
    is left as it was. Raises ValueError for an example without tensors.

    >>> measure(nn.Linear(3, 5), torch.zeros(2, 3))
    {'weight': 30.0}
    """
    samples = _samples(example)
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, float] = {}
    handles: list[Any] = []

    def count(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        weight = module._parameters.get("weight")
        if weight is None or not isinstance(output, Tensor):
            return
        name = names[id(weight)]
        found[name] = found.get(name, 0.0) + 2.0 * weight.numel() * _positions(module, args[0], output) / samples

    for module in model.modules():
        if isinstance(module, (nn.Linear, *_CONV, *_TRANSPOSED)):
            handles.append(module.register_forward_hook(count))
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return found


def _positions(module: nn.Module, given: Tensor, output: Tensor) -> float:
    """How often each weight is used: output positions, for transposed convolutions input positions."""
    if isinstance(module, _TRANSPOSED):
        return given.numel() / module.in_channels
    return output.numel() / (module.out_channels if isinstance(module, _CONV) else output.shape[-1])


def _samples(example: Any) -> int:
    values = example.values() if isinstance(example, Mapping) else example
    tensors = [example] if isinstance(example, Tensor) else [t for t in values if isinstance(t, Tensor)]
    if not tensors or tensors[0].ndim == 0 or tensors[0].shape[0] == 0:
        raise ValueError(f"example={type(example).__name__} holds no tensor with samples along its first axis.")
    return int(tensors[0].shape[0])
