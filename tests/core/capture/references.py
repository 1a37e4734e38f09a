"""Statistics by plain forward hooks in float64: what the observer must find."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rarefy.core.capture import Captured
from rarefy.core.flops import call
from rarefy.core.sites import Site


def rows(module: nn.Module, x: Tensor) -> Tensor:
    """(groups, tokens, in) of what a layer was called with."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        flat = isinstance(module, nn.Conv1d)
        x = x.unsqueeze(2) if flat else x
        each = [(0, *v) if flat and w == "padding" else (1, *v) if flat else v
                for w in ("kernel_size", "dilation", "padding", "stride") for v in [getattr(module, w)]]  # fmt: skip
        columns = functional.unfold(x, *each)  # (batch, in · kernel, places)
        return columns.unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    return x.reshape(1, -1, x.shape[-1])


def hooked(model: nn.Module, data: list[Any], sites: list[Site]) -> dict[Site, Tensor]:
    """For each site whose layer is called: (groups, tokens, in) float64, over all batches."""
    found: dict[Site, list[Tensor]] = {}
    of = {site.module: site for site in sites if not site.layout.stacked}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.setdefault(of[module], []).append(rows(module, args[0].detach().double()))

    hooks = [module.register_forward_pre_hook(note) for module in of]
    try:
        with torch.no_grad():
            for batch in data:
                call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {site: torch.cat(parts, 1) for site, parts in found.items()}


def close(found: Tensor, expected: Tensor, relative: float = 1e-12) -> bool:
    return bool((found.double() - expected).norm() <= relative * expected.norm())


def shrink(captured: Captured) -> None:
    """A change that the next block must see."""
    with torch.no_grad():
        for site in captured.block.sites:
            site.parameter[::2] *= 0.5
