"""GraNet: gradual pruning with zero-cost regrowth; GMP and RigL in one loop.

Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", 2021, arXiv:2106.10404.

    every ΔT steps: (1) prune, by global magnitude, to the cubic s(t) of the window; (2) in each layer drop the share
    α(t) of the smallest weights and grow as many by the dense gradient. After the window only (2) goes on: RigL.

In the code: s(t) and its window are `schedule` (s_i = schedule.initial: 0.5 sparse-to-sparse, 0 dense-to-sparse), (2)
is the engine; both follow the optimizer step. With s_i = s_f it is RigL without the skipped step. The authors' variant
that prunes per layer is `pruning="uniform"`. The paper's ΔT of 1000 is for some 60 000 steps: choose one that leaves 30
updates or more.

Deviations from the authors' code: exact counts (its strict threshold removes one weight more); the last pruning falls
on the end of the window, so that s_f is reached; int(α·n) are exchanged (theirs rounds up), as in the engine.
"""

import torch

from rarefy.axes import (
    AllocationField,
    Cosine,
    Cubic,
    DropFractionField,
    Every,
    EveryField,
    SparsityScheduleField,
    value,
)
from rarefy.core.method import register
from rarefy.core.scoring import random_masks
from rarefy.core.sparsity import Sparsity
from rarefy.methods.training.drop_and_grow import DropAndGrow
from rarefy.methods.training.gradual import prune_smallest, refuse_unreachable, share_at


@register
@value
class GraNet(DropAndGrow):
    """Args:
    schedule: s(t) and when it is followed. pruning: how a budget is shared in (1).
    allocation: of the first, random masks, where s_i > 0.
    See `DropAndGrow` for the others.
    """

    schedule: SparsityScheduleField = Cubic(initial=0.5, start=0.0, end=0.6875, every=1000)
    pruning: AllocationField = "global"
    fraction: DropFractionField = Cosine(0.5, 0.005)
    every: EveryField = Every(1000, 1.0)
    skip_step: bool = False

    paper = "Liu et al. 2021, arXiv:2106.10404"
    extra_cost = "one dense gradient every 1000 steps"
    labels = ("dynamic", "dense-to-sparse", "simulated")
    executions = frozenset({"simulated"})  # the number of kept weights falls

    def begin(self, s: Sparsity) -> None:
        refuse_unreachable(s, self.pruning, self.sparsity)
        first = share_at(self.schedule, self.sparsity, 0, s.steps)
        dense = {site: torch.ones_like(site.mask) for site in s.sites}
        for site, mask in (random_masks(s, self.allocation, first) if first else dense).items():
            s.keep(site, mask)

    def wants_dense_gradient(self, step: int, steps: int | None) -> bool:
        self.schedule.due(step, steps)  # asked before the first step: a schedule that does not fit the run raises here
        return super().wants_dense_gradient(step, steps)

    def on_weights(self, s: Sparsity) -> None:
        prune = self.schedule.due(s.step, s.steps)
        exchange = self.every.due(s.step, s.steps) and not self.skip_step
        if exchange and self.grow == "gradient":
            for site in s.sites:
                s.dense_gradient(site)  # raises before anything is decided
        masks = {site: site.mask for site in s.sites}
        if prune:
            share = share_at(self.schedule, self.sparsity, s.step, s.steps)
            masks = prune_smallest(s, masks, self.pruning, share, self.sparsity)
        if exchange:
            alpha = self.fraction.at(s.step, s.at(self.every.until, "until"))
            masks = {site: self.exchange(s, site, mask, alpha) for site, mask in masks.items()}
        if prune or exchange:
            for site, mask in masks.items():
                s.keep(site, mask)
