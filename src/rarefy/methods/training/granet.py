"""GraNet: gradual pruning with zero-cost regrowth; GMP and RigL in one loop.

Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", 2021, arXiv:2106.10404.

    every ΔT steps: (1) prune, by global magnitude, to the cubic s(t) of the window; (2) in each layer drop the share α(t)
    of the smallest weights and grow as many by the dense gradient. After the window only (2) goes on, which is RigL.

In the code: s(t) and its window are `schedule` (s_i = schedule.initial: 0.5 sparse-to-sparse, 0 dense-to-sparse), (2) is
the engine; both follow the optimizer step. With s_i = s_f it is RigL without the skipped step.

Deviations from the authors' code: exact counts (its strict threshold removes one weight more); the last pruning falls on
the end of the window, so that s_f is reached; int(α·n) are exchanged (theirs rounds up), as in the engine.
"""

import torch
from torch import Tensor

from rarefy.axes import (
    Cosine,
    Cubic,
    DropFractionField,
    Every,
    EveryField,
    Global,
    Score,
    SparsityScheduleField,
    value,
)
from rarefy.core.method import register
from rarefy.core.scoring import score_sites
from rarefy.core.sites import Site
from rarefy.core.sparsity import Sparsity
from rarefy.methods.training.drop_and_grow import DropAndGrow


@register
@value
class GraNet(DropAndGrow):
    """See `DropAndGrow` for the arguments; `allocation` is that of the first masks, pruning is global."""

    schedule: SparsityScheduleField = Cubic(initial=0.5, start=0.0, end=0.6875, every=100)
    fraction: DropFractionField = Cosine(0.5, 0.005)
    every: EveryField = Every(100, 1.0)
    skip_step: bool = False

    paper = "Liu et al. 2021, arXiv:2106.10404"
    extra_cost = "one dense gradient every 100 steps"
    labels = ("dynamic", "dense-to-sparse", "simulated")

    def begin(self, s: Sparsity) -> None:
        initial = getattr(self.schedule, "initial", 0.0)
        if initial == 0.0:
            for site in s.sites:
                s.keep(site, torch.ones_like(site.mask))
            return
        for site, mask in s.project(score_sites(s, Score("random")), self.allocation, initial).items():
            s.keep(site, mask)

    def on_weights(self, s: Sparsity) -> None:
        masks = {site: site.mask for site in s.sites}
        if self.schedule.due(s.step, s.steps) and s.step > 0:
            masks = self._pruned(s, masks)
        if self.every.due(s.step, s.steps):
            alpha = self.fraction.at(s.step, s.at(self.every.until, "until"))
            masks = {site: self.exchange(s, site, mask, alpha) for site, mask in masks.items()}
        elif not self.schedule.due(s.step, s.steps):
            return
        for site, mask in masks.items():
            s.keep(site, mask)

    def _pruned(self, s: Sparsity, masks: dict[Site, Tensor]) -> dict[Site, Tensor]:
        final = self.sparsity
        target = final if final is None else self.schedule.sparsity(s.step, final, s.steps)
        return s.project({site: site.weight.abs() for site in s.sites}, Global(), target, nested=masks)
