"""The door to the captured inputs of a model's blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from rarefy.core.sites import Site


def walk(model: nn.Module, sites: Sequence[Site], data: Iterable[Any], *, gram: torch.dtype | None) -> Iterator[Any]:
    """Blocks in running order, with the inputs that the blocks before them, changed by now, have made."""
    from rarefy.core.capture.walk import walk as captured  # type: ignore

    return captured(model, sites, data, gram=gram)


def dense_by_block(model: nn.Module, sites: Sequence[Site], data: Iterable[Any]) -> list[dict[Site, list[Any]]]:
    """The statistics of each block's sites in the model as it is, from one pass."""
    from rarefy.core.capture.blocks import blocks_of  # type: ignore
    from rarefy.core.capture.walk import dense_statistics  # type: ignore

    found = dense_statistics(model, sites, data)
    blocks = ({site: found[site] for site in block.sites if site in found} for block in blocks_of(model, sites))
    return [block for block in blocks if block]
