"""GMP: gradual magnitude pruning on a cubic schedule.

Zhu & Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017,
arXiv:1710.01878.

    s(t) = s_f + (s_i − s_f) (1 − (t − t₀)/(nΔt))³   for t₀ ≤ t ≤ t₀ + nΔt

At each update the smallest |w| of every layer (or of all, allocation="global") are masked until s(t) is reached. In the
code: s(t), t₀ = start, t₀ + nΔt = end and Δt = every belong to `schedule`; `.sparsity` of the method is s_f.

The recipe of "The Journey Matters" (Jin et al., 2025, arXiv:2501.12486) is `Cubic(start=0.25, end=0.75)`; gradual
Global MP (Gupta et al., 2022, arXiv:2209.14624) is `allocation=AtLeast("global")`.

Deviations from the authors' code: masked weights are zero and stay masked (theirs keep the old value and may return);
the last update falls on the end of the window whatever the interval, so that s_f is always reached.
"""

import torch
from torch import Tensor

from rarefy.axes import AllocationField, Cubic, PatternField, Share, SparsityScheduleField, value
from rarefy.core.method import Method, register
from rarefy.core.sites import Site
from rarefy.core.sparsity import Sparsity
from rarefy.methods.training.gradual import prune_smallest, refuse_unreachable, share_at


@register
@value
class GMP(Method):
    """Args:
    sparsity: at the end. May be left out with an n:m pattern, which is masked at once where s(t) leaves zero.
    schedule: when, and how sparse by then, such as `Cubic(start=0.25, end=0.75)` or `OneShot(at=0.5)`.
    allocation: of the budget at each update; sparsities given layer by layer grow in step with s(t).

    >>> import torch, rarefy
    >>> model = torch.nn.Linear(8, 4)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> method = GMP(sparsity=0.75, schedule=Cubic(end=4, every=2))
    >>> sparsity = rarefy.sparsify(model, method, optimizer=optimizer, steps=5)
    >>> for _ in range(5):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(3, 8)).square().sum().backward()
    ...     optimizer.step()
    >>> sparsity.ledger.nonzeros
    [(0, 32), (2, 11), (4, 8)]
    """

    sparsity: Share | None = None
    schedule: SparsityScheduleField = Cubic()
    allocation: AllocationField = "uniform"
    pattern: PatternField = "unstructured"

    needs = frozenset({"optimizer", "steps"})
    stage = "training"
    paper = "Zhu & Gupta 2017, arXiv:1710.01878"
    labels = ("dynamic", "dense-to-sparse", "simulated")

    def begin(self, s: Sparsity) -> None:
        refuse_unreachable(s, self.allocation, self.sparsity)
        self._prune(s, {site: torch.ones_like(site.mask) for site in s.sites})

    def wants_dense_gradient(self, step: int, steps: int | None) -> bool:
        self.schedule.due(step, steps)  # asked before the first step: a schedule that does not fit the run raises here
        return False

    def on_weights(self, s: Sparsity) -> None:
        if self.schedule.due(s.step, s.steps):
            self._prune(s, {site: site.mask for site in s.sites})

    def _prune(self, s: Sparsity, masks: dict[Site, Tensor]) -> None:
        share = share_at(self.schedule, self.sparsity, s.step, s.steps)
        for site, mask in prune_smallest(s, masks, self.allocation, share, self.sparsity).items():
            s.keep(site, mask)
