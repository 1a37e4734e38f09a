"""A site as matrices (out, in): convolutions flattened, and for n:m their inputs moved next to one another."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from rarefy.axes import NM
from rarefy.core.capture.statistics import Statistics
from rarefy.core.sites import Site


def to_matrix(site: Site, tensor: Tensor) -> Tensor:
    """A tensor of the site's shape as (out, in·kernel), matrices of a site one below another."""
    canonical = site.layout.canonical(tensor)
    return (canonical.movedim(1, -1) if _moves(site) else canonical).flatten(1)


def from_matrix(site: Site, matrix: Tensor) -> Tensor:
    """The inverse of `to_matrix`."""
    shape = site.shape
    moved = _moves(site)
    canonical = matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1) if moved else matrix.reshape(shape)
    return site.layout.restore(canonical).contiguous()


def line_of(site: Site) -> int | None:
    """Columns of the matrix that groups of n:m lie in; None: all."""
    return site.shape[1] if _moves(site) else None


def permuted(site: Site, statistics: Statistics) -> Statistics:
    """Statistics of the inputs in the order of the matrix's columns; themselves where that is (in, *kernel)."""
    if not _moves(site):
        return statistics
    order = torch.arange(len(statistics.squares)).view(site.shape[1], -1).t().flatten()
    gram = statistics.gram
    vectors = {name: getattr(statistics, name)[order] for name in ("squares", "sums", "within")}
    return dataclasses.replace(statistics, outer=None if gram is None else gram[order][:, order], **vectors)


def _moves(site: Site) -> bool:
    return isinstance(site.pattern, NM) and len(site.shape) > 2
