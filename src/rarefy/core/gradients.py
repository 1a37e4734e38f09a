"""Gradients for scores, at the weights as they are: of the loss, of the gradient's norm, of the synaptic flow.

Nothing of the model is left changed: `.grad`, buffers, modes and global random state are as before. Dropout layers are
off; normalisation layers run in the mode that the model is in. A model inside DistributedDataParallel gives the mean
over its replicas, so that all of them choose the same masks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from rarefy.core.flops import call
from rarefy.core.held import distributed
from rarefy.core.sites import Site
from rarefy.core.undisturbed import undisturbed

Loss = Callable[[Any, Any], Tensor]
_OfBatch = Callable[[Any], list[Tensor]]


def take(data: Iterable[Any], batches: int | None) -> list[Any]:
    """The first `batches` batches (None: all of them). Raises ValueError when there are fewer, or none at all."""
    if isinstance(data, Tensor | Mapping):
        raise ValueError(
            f"data= is one {type(cast(object, data)).__name__}, but it must be an iterable of batches: give a list of "
            "batches, such as data=[batch], or a data loader."
        )
    found = list(itertools.islice(data, batches))
    if not found:
        raise ValueError("data= holds no batch: give at least one (an exhausted generator gives none a second time).")
    if batches is not None and len(found) < batches:
        raise ValueError(f"batches={batches}, but data= holds only {len(found)}: give more, or ask for {len(found)}.")
    return found


def loss_gradients(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Any],
    loss: Loss,
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[Site, Tensor]:
    """∂/∂W of the loss summed over batches, the model's output divided by T; zeros for weights out of its reach.

    Raises ValueError when the loss is no scalar, reaches none of the sites, or the weights are sharded.
    """

    def of_batch(batch: Any) -> list[Tensor]:
        return _gradients(_value(model, loss, batch), sites)

    return _summed(model, sites, batches, of_batch, temperature, seed)


def curvature_gradients(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Any], loss: Loss, *, temperature: float, seed: int = 0
) -> dict[Site, Tensor]:
    """H g, the Hessian of the summed loss times its own gradient over `sites`; the model's output is divided by T."""
    first = loss_gradients(model, sites, batches, loss, temperature=temperature, seed=seed)

    def of_batch(batch: Any) -> list[Tensor]:
        gradients = _gradients(_value(model, loss, batch), sites, create_graph=True)
        parts = [(first[s] * g).sum() for s, g in zip(sites, gradients, strict=True)]
        return _gradients(torch.stack(parts).sum(), sites, flat=True)

    return _summed(model, sites, batches, of_batch, temperature, seed)


def _summed(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Any],
    of_batch: _OfBatch,
    temperature: float,
    seed: int,
) -> dict[Site, Tensor]:
    _refuse_sharded(sites)
    total = {site: _zeros(site.parameter) for site in sites}
    with undisturbed(model, seed), torch.enable_grad(), _tempered(model, temperature), _unsynchronised(model):
        for site in sites:
            site.parameter.requires_grad_(True)
        for batch in batches:
            for site, g in zip(sites, of_batch(batch), strict=True):
                total[site] += g.detach()
    for tensor in total.values():
        average_over_replicas(model, tensor)
    return total


def _zeros(parameter: Tensor) -> Tensor:
    """To add up gradients in: float32 at least."""
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros_like(parameter, dtype=wide, requires_grad=False)


def flow_gradients(
    model: nn.Module, sites: Sequence[Site], masks: Mapping[Site, Tensor], example: Any
) -> dict[Site, Tensor]:
    """∂R/∂|W| in float64, zero where masked: R = sum of outputs for one sample of ones, everything absolute.

    Biases and running means count as zero, so that what flows into a neuron flows out of it: the network is linear in
    the weights of each layer. Raises ValueError when the outputs hold no number or depend on none of the sites.
    """
    _refuse_sharded(sites)
    weights = {name: _absolute(name, p) for name, p in model.named_parameters()}
    buffers = {name: _absolute(name, b) for name, b in model.named_buffers()}
    leaves = {s: (weights[s.name] * masks[s]).requires_grad_(True) for s in sites}
    weights.update({s.name: w for s, w in leaves.items()})
    with undisturbed(model), torch.enable_grad(), _unsynchronised(model):
        model.eval()
        total = _sum_outputs(_call_with(model, {**weights, **buffers}, _ones(example)))
        gradients = _reached(total, list(leaves.values()))
    return {s: g * masks[s] for s, g in zip(leaves, gradients, strict=True)}


def evaluate_masked(
    model: nn.Module, masks: Mapping[Site, Tensor], batches: Sequence[Any], loss: Loss, *, seed: int = 0
) -> float:
    """Mean loss over batches with the weights masked for the moment."""
    _refuse_sharded(list(masks))
    saved = {site: site.parameter.detach().clone() for site in masks}
    with undisturbed(model, seed), torch.no_grad(), _unsynchronised(model):
        try:
            for site, mask in masks.items():
                site.parameter.masked_fill_(~mask, 0)
            total = torch.stack([_value(model, loss, batch).double() for batch in batches]).mean()
            return float(average_over_replicas(model, total))
        finally:
            for site, weight in saved.items():
                site.parameter.copy_(weight)


def average_over_replicas(model: nn.Module, tensor: Tensor) -> Tensor:
    """In place, the mean over the replicas of a model inside DistributedDataParallel; any other model has only one."""
    if isinstance(model, DistributedDataParallel):
        group = cast(Any, model).process_group
        cast(Any, dist).all_reduce(tensor, group=group)
        tensor.div_(dist.get_world_size(group))
    return tensor


def _unsynchronised(model: nn.Module) -> Any:
    """Without this, DistributedDataParallel waits for a backward pass that never reaches its hooks."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def _refuse_sharded(sites: Sequence[Site]) -> None:
    for site in sites:
        if distributed(site.parameter) is not None:
            raise ValueError(
                f"{site.name!r} is sharded, and a score that runs the model needs whole weights: choose the masks "
                "before the model is sharded, or use a score of the weights alone (magnitude, random)."
            )


@contextmanager
def _tempered(model: nn.Module, temperature: float) -> Generator[None]:
    """Divide the model's output by `temperature`; the loss still sees the model itself."""

    def divide(module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"temperature={temperature} divides the model's output, which must then be one tensor of logits; "
                f"{type(module).__name__} returns {type(output).__name__}. Give temperature=1, or wrap the model."
            )
        return output / temperature

    hook = model.register_forward_hook(divide) if temperature != 1 else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def _value(model: Any, loss: Loss, batch: Any) -> Tensor:
    value: Any = loss(model, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        seen = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss(model, batch) must return a scalar tensor; got {seen}.")
    return value.reshape(())


def _gradients(value: Tensor, sites: Sequence[Site], *, create_graph: bool = False, flat: bool = False) -> list[Tensor]:
    parameters = [site.parameter for site in sites]
    if flat and value.grad_fn is None:  # a loss that is linear in the weights has no curvature
        return [torch.zeros_like(p, requires_grad=False) for p in parameters]
    return _reached(value, parameters, create_graph=create_graph, flat=flat)


def _reached(
    value: Tensor, tensors: Sequence[Tensor], *, create_graph: bool = False, flat: bool = False
) -> list[Tensor]:
    """Gradients, zeros for tensors out of reach. Raises ValueError when none is within reach, unless `flat`."""
    found: Sequence[Tensor | None] = [None] * len(tensors)
    if value.grad_fn is not None:
        found = torch.autograd.grad(value, tensors, create_graph=create_graph, allow_unused=True)
    if not flat and all(g is None for g in found):
        raise ValueError(
            "the loss or output depends on none of the sites, so there is nothing to score: call the model that is "
            "being made sparse, as loss(model, batch) is given it, and not under torch.no_grad()."
        )
    return [torch.zeros_like(t, requires_grad=False) if g is None else g for t, g in zip(tensors, found, strict=True)]


_ADDED = ("bias", "running_mean")


def _absolute(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    found = tensor.detach().abs().double()
    return torch.zeros_like(found) if name.rpartition(".")[2].endswith(_ADDED) else found


def _ones(value: Any) -> Any:
    """The example with every floating-point tensor replaced by one sample of ones."""
    if isinstance(value, Tensor):
        return torch.ones_like(value[:1], dtype=torch.float64) if value.is_floating_point() else value[:1]
    if isinstance(value, Mapping):
        return {key: _ones(item) for key, item in cast(Mapping[str, Any], value).items()}
    return tuple(map(_ones, cast(Sequence[Any], value))) if isinstance(value, tuple | list) else value


def _call_with(model: nn.Module, tensors: dict[str, Tensor], example: Any) -> Any:
    try:
        return call(lambda *args, **kwargs: functional_call(model, tensors, args, kwargs), example)
    except TypeError as error:
        if not isinstance(example, tuple | list):
            raise
        raise ValueError(
            f"the example is passed as model(*batch), and its {len(cast(Sequence[Any], example))} values do not fit "
            f"({error}): give inputs without labels, data=[inputs]."
        ) from error


def _sum_outputs(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output.sum()
    if isinstance(output, Mapping):
        output = cast(Mapping[str, Any], output).values()
    parts = [o for o in output if isinstance(o, Tensor) and o.is_floating_point()]
    if not parts:
        raise ValueError("SynFlow sums the model's outputs, and found no floating-point tensor among them.")
    return torch.stack([p.sum() for p in parts]).sum()
