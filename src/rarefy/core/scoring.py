"""A registered score for every site of a handle: fetch the gradient that it asks for, then apply the pure function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.axes import Allocation, Score
from rarefy.core.choose import How
from rarefy.core.gradients import curvature_gradients, flow_gradients, loss_gradients, take
from rarefy.core.sites import Site
from rarefy.core.sparse.site import SparseSite
from rarefy.core.sparsity import Sparsity


def score_sites(
    s: Sparsity,
    score: Score,
    *,
    batches: int | None = 1,
    temperature: float = 1.0,
    masks: Mapping[Site, Tensor] | None = None,
) -> Mapping[Site, Tensor]:
    """Raw scores in the weights' shapes, all sites; signed where the score is. Each is made when it is asked for;
    random ones are drawn now, in the order of the sites.

    batches: how many of `s.data` make the gradient (None: all of them); they are summed. temperature: divides the
    model's output before the loss. masks: for the synaptic flow, the masks under which it flows.
    Raises ValueError when the score needs data or a loss that were not given.
    """
    gradients = _gradients(s, score, batches, temperature, masks)
    made = _Scores(s, score, gradients)
    return dict(made) if score.random else made


class _Scores(Mapping[Site, Tensor]):
    """Scores that are in memory no longer than who asks for them keeps them."""

    def __init__(self, s: Sparsity, score: Score, gradients: Mapping[Site, Tensor]) -> None:
        self._s, self._score, self._gradients = s, score, gradients

    def __getitem__(self, site: Site) -> Tensor:
        return _scored(site.weight, self._score, self._gradients.get(site), self._s.generator)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._s.sites)

    def __len__(self) -> int:
        return len(self._s.sites)


def pool_of(score: Score) -> How:
    """How a unit's scores make one. Of random ones the first stands for all: a mean would favour small edge tiles."""
    return "first" if score.random else score.pool


def random_masks(s: Sparsity, allocation: Allocation, sparsity: float | None) -> dict[Site, Tensor]:
    """Masks drawn from the handle's generator: every choice of units of a site is equally likely."""
    score = Score("random")
    return s.project(score_sites(s, score), allocation, sparsity, pool=pool_of(score))


def random_rows(s: Sparsity, site: Site) -> Iterator[Tensor]:
    """The score "random" of a site in chunks of rows, from the first; the same draws however they are cut."""
    random = Score("random")
    if not isinstance(site, SparseSite):
        yield random(site.weight, None, s.generator)
        return
    for first, last in site.structure.by_row.chunks():
        yield random(site.values.new_zeros(()).expand(last - first, site.structure.cols), None, s.generator)


def _scored(weight: Tensor, score: Score, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
    """In the wider type of weight and gradient: the flow of a deep network in half precision needs float64."""
    if gradient is not None:
        weight = weight.to(torch.promote_types(weight.dtype, gradient.dtype))
    return score(weight, gradient, generator)


def _gradients(
    s: Sparsity, score: Score, batches: int | None, temperature: float, masks: Mapping[Site, Tensor] | None
) -> dict[Site, Tensor]:
    if score.gradient is None:
        return {}
    if s.data is None:
        raise ValueError(f"score {score} needs data=, an iterable of batches, for its {score.gradient} gradient.")
    if score.gradient == "flow":
        keep = masks or {site: torch.ones_like(site.mask) for site in s.sites}
        return flow_gradients(s.model, s.sites, keep, _remembered(s, 1)[0])
    if s.loss is None:
        raise ValueError(f"score {score} needs loss=, a callable loss(model, batch) that returns a scalar tensor.")
    given = _remembered(s, batches)
    if score.gradient == "loss":
        return loss_gradients(s.model, s.sites, given, s.loss, temperature=temperature, seed=s.seed)
    return curvature_gradients(s.model, s.sites, given, s.loss, temperature=temperature, seed=s.seed)


def _remembered(s: Sparsity, batches: int | None) -> Sequence[Any]:
    """The batches, kept as a list so that a generator can be used again within one `begin`."""
    given: Any = s.data
    if not isinstance(given, list):
        s.data = take(given, batches)
    return take(s.data, batches)
