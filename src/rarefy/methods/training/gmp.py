"""GMP: gradual magnitude pruning on a cubic schedule.

Zhu & Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017,
arXiv:1710.01878.

    s(t) = s_f + (s_i − s_f) (1 − (t − t₀)/(nΔt))³   for t₀ ≤ t ≤ t₀ + nΔt

At each update the smallest |w| of every layer (or of all, allocation="global") are masked until s(t) is reached. In the
code: s(t), t₀ = start, t₀ + nΔt = end and Δt = every belong to `schedule`; `.sparsity` of the method is s_f.

Deviations from the authors' code: masked weights are zero and stay masked (theirs keep the old value and may return);
the last update falls on the end of the window whatever the interval, so that s_f is always reached.
"""

import torch

from rarefy.axes import AllocationField, Cubic, PatternField, Share, SparsityScheduleField, value
from rarefy.core.method import Method, register
from rarefy.core.sparsity import Sparsity


@register
@value
class GMP(Method):
    """Args: sparsity: at the end. schedule: when, and how sparse by then (`Cubic(start=0.25, end=0.75)`)."""

    sparsity: Share | None = None
    schedule: SparsityScheduleField = Cubic()
    allocation: AllocationField = "uniform"
    pattern: PatternField = "unstructured"

    needs = frozenset({"optimizer", "steps"})
    stage = "training"
    paper = "Zhu & Gupta 2017, arXiv:1710.01878"
    labels = ("dynamic", "dense-to-sparse", "simulated")

    def begin(self, s: Sparsity) -> None:
        for site in s.sites:
            s.keep(site, torch.ones_like(site.mask))

    def on_weights(self, s: Sparsity) -> None:
        if self.schedule.due(s.step, s.steps):
            final = 0.0 if self.sparsity is None else self.sparsity  # n:m says itself how many it keeps
            self.prune_to(s, self.schedule.sparsity(s.step, final, s.steps))

    def prune_to(self, s: Sparsity, sparsity: float) -> None:
        """Mask the smallest weights; what is masked stays masked."""
        target = self.sparsity if sparsity == self.sparsity or self.sparsity is None else sparsity
        scores = {site: site.weight.abs() for site in s.sites}
        for site, mask in s.project(scores, self.allocation, target, nested={x: x.mask for x in s.sites}).items():
            s.keep(site, mask)
