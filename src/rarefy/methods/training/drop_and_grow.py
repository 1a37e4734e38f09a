"""Drop and grow: the one engine of dynamic sparse training.

Every ΔT steps, in each layer with n kept units: keep the n − k with the largest drop score, k = int(α(t)·n), then grow
the best k of all that are not kept, just-dropped ones included. Counts never change. New weights start at zero with the
optimizer's initial state; one dropped and regrown in the same update keeps both its value and its state.

SET, RigL, ITOP and GraNet are configurations: their drop score, grow score, α(t), ΔT and where in the step they act.

With a pattern of whole channels mind that a channel grown at zero gets no gradient through a ReLU or a norm whose scale
is masked with it, so that it stays at zero: prune channels gradually (`GMP`) instead.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rarefy.axes import (
    AllocationField,
    Cosine,
    DropFractionField,
    Every,
    EveryField,
    PatternField,
    Score,
    Share,
    top_k,
    value,
)
from rarefy.core import choose
from rarefy.core.method import Method
from rarefy.core.scoring import pool_of, random_masks, random_rows
from rarefy.core.sites import Site
from rarefy.core.sparsity import Sparsity


@value
class DropAndGrow(Method):
    """Args:
    drop: "magnitude" drops the smallest |w|; "magnitude_by_sign" the smallest positive and the largest negative ones,
        each a share α of its side (by magnitude all the same where a unit has several weights).
    grow: "gradient" grows where the dense gradient is largest; "random" anywhere.
    fraction: α(t), the share of kept units exchanged at an update.
    every: ΔT, and until when. `Every(100, until=0.75)`, or an int.
    skip_step: whether an update takes the place of the optimizer step (RigL) or follows it (ITOP).
    """

    sparsity: Share | None = None
    allocation: AllocationField = "erdos_renyi_kernel"
    pattern: PatternField = "unstructured"
    drop: Literal["magnitude", "magnitude_by_sign"] = "magnitude"
    grow: Literal["gradient", "random"] = "gradient"
    fraction: DropFractionField = Cosine(0.3)
    every: EveryField = Every(100, 0.75)
    skip_step: bool = True

    needs = frozenset({"optimizer", "steps"})
    stage = "training"
    labels = ("dynamic", "sparse-to-sparse", "simulated")
    executions = frozenset({"simulated", "sparse"})

    def begin(self, s: Sparsity) -> None:
        for site, mask in random_masks(s, self.allocation, self.sparsity).items():
            s.keep(site, mask)

    def wants_dense_gradient(self, step: int, steps: int | None) -> bool:
        return self.grow == "gradient" and self.every.due(step if self.skip_step else step + 1, steps)

    def on_gradients(self, s: Sparsity) -> None:
        if not s.deciding or not self.every.due(s.step if self.skip_step else s.step + 1, s.steps):
            return
        if self.skip_step:
            self.update(s, s.ready)
            s.skip_optimizer_step()
        elif self.grow == "gradient":
            for site in s.ready:
                s.require_finite_gradient(site)

    def on_weights(self, s: Sparsity) -> None:
        if not self.skip_step and self.every.due(s.step, s.steps):
            self.update(s, s.sites)

    def update(self, s: Sparsity, sites: Sequence[Site]) -> None:
        """One exchange in each of `sites`."""
        alpha = self.fraction.at(s.step, s.at(self.every.until, "until"))
        for site in sites:
            s.keep(site, self.exchange(s, site, None, alpha))

    def exchange(self, s: Sparsity, site: Site, mask: Tensor | None, alpha: float) -> Tensor:
        """The mask (None: the present one) after dropping a share alpha of its units and growing as many."""
        stay = self._stay(site, mask, alpha)
        if self.grow == "gradient":
            return choose.exchanged(site, mask, stay, s.dense_gradient_rows(site))
        return choose.exchanged(site, mask, stay, random_rows(s, site), pool_of(Score("random")))

    def _stay(self, site: Site, mask: Tensor | None, alpha: float) -> Tensor:
        """Which of the kept units stay."""
        by_sign = self.drop == "magnitude_by_sign" and site.pattern.units(site.pattern_shape) == site.numel
        weights = choose.kept_weights(site, mask, "mean" if by_sign else "mean_abs")
        stay = torch.zeros_like(weights, dtype=torch.bool)
        for side in (weights < 0, weights >= 0) if by_sign else (~stay,):
            n = int(side.sum())
            stay |= top_k(weights.abs(), n - int(alpha * n), among=side)
        return stay
