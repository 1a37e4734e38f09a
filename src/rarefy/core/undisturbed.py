"""Run a model as if nobody had: modes, buffers, requires_grad and global random state are put back afterwards."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@contextmanager
def undisturbed(model: nn.Module, seed: int = 0) -> Generator[None]:
    """Inside, dropout layers are off, compiled parts run eagerly, and whatever else is random is drawn from `seed`.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    >>> with undisturbed(model):
    ...     _ = model(torch.ones(4, 2))
    >>> model[1].running_mean
    tensor([0., 0.])
    """
    modes = {m: m.training for m in model.modules()}
    buffers = [(m, name, b, b.clone()) for m in modes for name, b in m.named_buffers(recurse=False)]
    wanted = {p: p.requires_grad for p in model.parameters()}
    with ExitStack() as stack:
        stack.enter_context(_random_state(_accelerators(model), seed))
        if _compiled(modes):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module in modes:
                if isinstance(module, _DROPOUT):
                    module.training = False
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for p, flag in wanted.items():
                p.requires_grad_(flag)
            _restore(buffers)


def _restore(buffers: Sequence[tuple[nn.Module, str, Tensor, Tensor]]) -> None:
    """The same tensors with the same values, whether they were written to or replaced."""
    with torch.no_grad():
        for module, name, buffer, saved in buffers:
            setattr(module, name, buffer)
            buffer.copy_(saved)


@contextmanager
def _random_state(devices: Sequence[torch.device], seed: int) -> Generator[None]:
    """Only the generators of the CPU and of `devices`: torch.manual_seed would reach those of every other one too."""
    before = torch.get_rng_state()
    states = {device: _get_state(device) for device in devices}
    try:
        torch.default_generator.manual_seed(seed)
        for device in devices:
            _set_state(device, torch.Generator(device).manual_seed(seed).get_state())
        yield
    finally:
        torch.set_rng_state(before)
        for device, state in states.items():
            _set_state(device, state)


def _get_state(device: torch.device) -> Tensor:
    module = torch.get_device_module(device)
    return module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)  # mps is one device


def _set_state(device: torch.device, state: Tensor) -> None:
    module = torch.get_device_module(device)
    module.set_rng_state(state) if device.type == "mps" else module.set_rng_state(state, device)


def _accelerators(model: nn.Module) -> list[torch.device]:
    found = {p.device for p in model.parameters() if p.device.type not in {"cpu", "meta"}}
    return sorted(found, key=str)


def _compiled(modules: Iterable[nn.Module]) -> bool:
    return any(type(m).__name__ == "OptimizedModule" or _compiled_call(m) is not None for m in modules)


def _compiled_call(module: Any) -> Any:
    return module._compiled_call_impl  # of module.compile()
