"""A registered score for every site of a handle: fetch the gradient that it asks for, then apply the pure function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.axes import Score
from rarefy.core.gradients import curvature_gradients, flow_gradients, loss_gradients, take
from rarefy.core.sites import Site
from rarefy.core.sparsity import Sparsity


def score_sites(
    s: Sparsity,
    score: Score,
    *,
    batches: int | None = 1,
    temperature: float = 1.0,
    masks: Mapping[Site, Tensor] | None = None,
) -> dict[Site, Tensor]:
    """Raw scores in the weights' shapes, all sites; signed where the score is.

    batches: how many of `s.data` make the gradient (None: all of them); they are summed. temperature: divides the
    model's output before the loss. masks: for the synaptic flow, the masks under which it flows.
    Raises ValueError when the score needs data or a loss that were not given.
    """
    gradients = _gradients(s, score, batches, temperature, masks)
    return {site: score(site.weight, gradients.get(site), s.generator) for site in s.sites}


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
    if not isinstance(s.data, list):
        s.data = take(s.data, batches)
    return take(s.data, batches)
