"""sparseprop: sparse forward and backward products of fp32 on the processor, as modules for torch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.bench.cpu.peers.environments import Peers, need

__all__ = ["layer", "sparse_linear"]


def sparse_linear(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """Its module for a weight [out, in] whose zeros are left out, to be trained or run."""
    return need("sparseprop.modules.linear").SparseLinear(
        weight.detach(), None if bias is None else nn.Parameter(bias.detach().clone())
    )


def layer(weight: Tensor, x: Tensor, peers: Peers) -> list[Callable[[], Any]] | str:
    """A call of its module on x, or why there is none."""
    if not peers.has("sparseprop"):
        return peers.missing["sparseprop"]
    module = sparse_linear(weight)
    given = torch.clone(x)
    return [lambda: module(given)]
