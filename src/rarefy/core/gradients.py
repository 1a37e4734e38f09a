"""Gradients for scores, at the weights as they are: of the loss, of the gradient's norm, of the synaptic flow.

Nothing of the model is left changed: `.grad`, buffers, modes and global random state are as before. Dropout is off;
normalisation layers run in the mode that the model is in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rarefy.core.flops import call
from rarefy.core.sites import Site

Loss = Callable[[Any, Any], Tensor]
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def take(data: Iterable[Any], batches: int | None) -> list[Any]:
    """The first `batches` batches (None: all). Raises ValueError when there is none."""
    found = list(itertools.islice(data, batches))
    if not found:
        raise ValueError("data= holds no batch: give at least one (an exhausted generator gives none a second time).")
    return found


@contextmanager
def undisturbed(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Run the model here: dropout off, then modes, buffers, requires_grad and global random state as before."""
    modes = {m: m.training for m in model.modules()}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    wanted = {p: p.requires_grad for p in model.parameters()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    try:
        for module in modes:
            if isinstance(module, _DROPOUT):
                module.training = False
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for p, flag in wanted.items():
            p.requires_grad_(flag)
        with torch.no_grad():
            for name, b in model.named_buffers():
                b.copy_(buffers[name])


def loss_gradients(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Any],
    loss: Loss,
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[Site, Tensor]:
    """∂/∂W of the loss summed over batches, the model's output divided by T; zeros for weights that it does not reach."""

    def of_batch(callee: Any, batch: Any) -> list[Tensor]:
        return _gradients(_value(callee, loss, batch), sites)

    return _summed(model, sites, batches, of_batch, temperature, seed)


def curvature_gradients(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Any], loss: Loss, *, temperature: float, seed: int = 0
) -> dict[Site, Tensor]:
    """H g, the Hessian of the summed loss times its own gradient over `sites`; the model's output is divided by T."""
    first = loss_gradients(model, sites, batches, loss, temperature=temperature, seed=seed)

    def of_batch(callee: Any, batch: Any) -> list[Tensor]:
        gradients = _gradients(_value(callee, loss, batch), sites, create_graph=True)
        return _gradients(
            torch.stack([(first[s] * g).sum() for s, g in zip(sites, gradients, strict=True)]).sum(), sites
        )

    return _summed(model, sites, batches, of_batch, temperature, seed)


def _summed(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Any],
    of_batch: Callable[[Any, Any], list[Tensor]],
    temperature: float,
    seed: int,
) -> dict[Site, Tensor]:
    total = {site: torch.zeros_like(site.parameter) for site in sites}
    with undisturbed(model, seed), torch.enable_grad():
        for site in sites:
            site.parameter.requires_grad_(True)
        callee = model if temperature == 1.0 else _Tempered(model, temperature)
        for batch in batches:
            for site, g in zip(sites, of_batch(callee, batch), strict=True):
                total[site] += g.detach()
    return total


def flow_gradients(
    model: nn.Module, sites: Sequence[Site], masks: Mapping[Site, Tensor], example: Any
) -> dict[Site, Tensor]:
    """∂R/∂|W| in float64, zero where masked: R = sum of outputs for one sample of ones, everything absolute."""
    weights = {name: _absolute(p) for name, p in model.named_parameters()}
    buffers = {name: _absolute(b) for name, b in model.named_buffers()}
    leaves = {s: (weights[s.name] * masks[s]).requires_grad_(True) for s in sites}
    weights.update({s.name: w for s, w in leaves.items()})
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        with torch.enable_grad():
            total = _sum_outputs(_call_with(model, {**weights, **buffers}, _ones(example)))
            gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return {
        s: torch.zeros_like(w) if g is None else g * masks[s]
        for (s, w), g in zip(leaves.items(), gradients, strict=True)
    }


def evaluate_masked(
    model: nn.Module, masks: Mapping[Site, Tensor], batches: Sequence[Any], loss: Loss, *, seed: int = 0
) -> float:
    """Mean loss over batches with the weights masked for the moment."""
    saved = {site: site.parameter.detach().clone() for site in masks}
    with undisturbed(model, seed), torch.no_grad():
        try:
            for site, mask in masks.items():
                site.parameter.masked_fill_(~mask, 0)
            return sum(float(_value(model, loss, batch)) for batch in batches) / len(batches)
        finally:
            for site, weight in saved.items():
                site.parameter.copy_(weight)


class _Tempered(nn.Module):
    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs) / self.temperature


def _value(model: Any, loss: Loss, batch: Any) -> Tensor:
    value = loss(model, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        seen = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss(model, batch) must return a scalar tensor; got {seen}.")
    return value.reshape(())


def _gradients(value: Tensor, sites: Sequence[Site], *, create_graph: bool = False) -> list[Tensor]:
    parameters = [site.parameter for site in sites]
    if value.grad_fn is None:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(value, parameters, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _absolute(tensor: Tensor) -> Tensor:
    return tensor.detach().abs().double() if tensor.is_floating_point() else tensor


def _ones(value: Any) -> Any:
    """The example with every floating-point tensor replaced by one sample of ones."""
    if isinstance(value, Tensor):
        return torch.ones_like(value[:1], dtype=torch.float64) if value.is_floating_point() else value[:1]
    if isinstance(value, Mapping):
        return {key: _ones(item) for key, item in value.items()}
    return tuple(_ones(item) for item in value) if isinstance(value, tuple | list) else value


def _call_with(model: nn.Module, tensors: dict[str, Tensor], example: Any) -> Any:
    return call(lambda *args, **kwargs: functional_call(model, tensors, args, kwargs), example)


def _sum_outputs(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output.sum()
    if isinstance(output, Mapping):
        output = output.values()
    parts = [o for o in output if isinstance(o, Tensor) and o.is_floating_point()]
    if not parts:
        raise ValueError("SynFlow sums the model's outputs, and found no floating-point tensor among them.")
    return torch.stack([p.sum() for p in parts]).sum()
