"""Runs of a whole model for calibration: quiet, without caches, stopped as early as may be."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from rarefy.core.capture.batches import Batch
from rarefy.core.flops import no_fused_attention
from rarefy.core.undisturbed import undisturbed


class Stop(BaseException):
    """The rest of a run is not needed. No model may catch it."""


@contextmanager
def quiet(model: nn.Module) -> Generator[None]:
    """Inside, the model is in evaluation mode, without gradients, dropout, caches of keys and fused attention.

    Modes, buffers, flags, configurations and global random state are put back, whatever happens.
    """
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(no_fused_attention())
        stack.enter_context(_no_cache(model))
        stack.enter_context(_fresh_casts())
        model.eval()
        yield


@contextmanager
def _fresh_casts() -> Generator[None]:
    """Autocast keeps copies of weights, which would be old ones once a block is changed, and made unseen."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def _no_cache(model: nn.Module) -> Generator[None]:
    configs: dict[int, Any] = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    configs = {key: c for key, c in configs.items() if isinstance(getattr(c, "use_cache", None), bool)}
    before = [(config, config.use_cache) for config in configs.values()]
    try:
        for config, _ in before:
            config.use_cache = False
        yield
    finally:
        for config, value in before:
            config.use_cache = value


def run(model: nn.Module, batch: Batch, until: nn.Module | None = None) -> None:
    """Call the model; it ends once `until` has run, where that is given. Only inside `quiet`."""
    kwargs = dict(batch.kwargs)
    if "use_cache" not in kwargs and _takes_use_cache(model):
        kwargs["use_cache"] = False
    hook = None if until is None else until.register_forward_hook(_stop)
    try:
        model(*batch.args, **kwargs)
    except Stop:
        pass
    finally:
        if hook is not None:
            hook.remove()


def _takes_use_cache(model: nn.Module) -> bool:
    try:
        return "use_cache" in inspect.signature(model.forward).parameters
    except ValueError:
        return False


def _stop(*_: Any) -> None:
    raise Stop
