"""Top-KAST: always-sparse training with a larger set of weights to learn from.

Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", 2020, arXiv:2106.03517.

    forward uses α = θ_A, A = the share D of largest |θ|; gradients reach θ_B, B ⊃ A of share D + M
    penalty(θ) = ½‖θ_A‖² + ½‖θ_{B∖A}‖² / D      A and B are chosen anew every N = 100 steps

In the code: A = `site.mask`, B = `site.trainable`, θ = `site.master`, α = the parameter itself. θ outside B stays as it
is, through weight decay and momentum too. The penalty takes the place of weight decay: set the optimizer's to zero.

Deviations: no official code was published. The penalty's gradient is added when gradients are final, after clipping; D
is each layer's own density, and M the same for all.
"""

import math
from fractions import Fraction
from typing import Annotated

from pydantic import Field

from rarefy.axes import AllocationField, Interval, PatternField, Share, count, value
from rarefy.core import choose
from rarefy.core.held import local
from rarefy.core.method import Method, register
from rarefy.core.sites import Site
from rarefy.core.sparsity import Sparsity


@register
@value
class TopKAST(Method):
    """Args:
    density_backward: D + M, the share of weights that gradients reach; at least 1 − sparsity.
    every: optimizer steps between two choices. until: when choosing stops (B = A from then on).
    penalty: strength of the exploration loss; it takes the place of weight decay.

    >>> import torch, rarefy
    >>> sparsity = rarefy.sparsify(torch.nn.Linear(8, 4), TopKAST(sparsity=0.75, density_backward=0.5))
    >>> (site,) = sparsity.sites
    >>> int(site.mask.sum()), int(site.trainable.sum())
    (8, 16)
    """

    sparsity: Share
    density_backward: Annotated[float, Field(gt=0, le=1)] = 0.5
    every: Annotated[int, Field(ge=1)] = 100
    until: Interval = 1.0
    penalty: Annotated[float, Field(ge=0)] = 1e-4
    allocation: AllocationField = "uniform"
    pattern: PatternField = "unstructured"

    needs = frozenset({"optimizer", "steps", "master"})
    stage = "training"
    paper = "Jayakumar et al. 2020, arXiv:2106.03517"
    extra_cost = "weight gradients at density D + M; a dense copy of the weights"
    labels = ("dynamic", "sparse-to-sparse", "simulated")

    def __post_init__(self) -> None:
        if _exact(self.density_backward) < 1 - _exact(self.sparsity):
            raise ValueError(
                f"TopKAST: density_backward={self.density_backward} is below the forward density "
                f"{1 - self.sparsity:.4g}; give at least that, since B must contain A"
            )
        if self.pattern.fixed:
            raise ValueError(f"TopKAST: the pattern {self.pattern} fixes its own count; give one that takes a sparsity")

    def begin(self, s: Sparsity) -> None:
        self._choose(s, explore=True)

    def on_gradients(self, s: Sparsity) -> None:
        if not self.penalty:
            return
        for site in s.ready:
            if site.parameter.grad is not None:
                self._pull(s, site)

    def _pull(self, s: Sparsity, site: Site) -> None:
        """θ_A + θ_{B∖A}/D = θ_B/D + (1 − 1/D) θ_A."""
        density = max(1, s.kept(site)) / site.numel
        reached = site.reached_weight()
        site.gradient.add_(reached, alpha=self.penalty / density)
        site.gradient.add_(local(site.parameter).detach(), alpha=self.penalty * (1 - 1 / density))

    def on_weights(self, s: Sparsity) -> None:
        until = max(1, s.at(self.until, "until"))
        if s.step == until or (s.step % self.every == 0 and s.step < until):
            self._choose(s, explore=s.step < until)

    def _choose(self, s: Sparsity, *, explore: bool) -> None:
        scores = {site: site.weight.abs() for site in s.sites}
        for site, forward in s.project(scores, self.allocation, self.sparsity).items():
            units = choose.units_of(site, forward)
            wider = min(len(units), int(units.sum()) + (self._extra(len(units)) if explore else 0))
            s.keep(site, forward, choose.fill(site, units, choose.pooled(site, scores[site]), wider))

    def _extra(self, units: int) -> int:
        """|B∖A|: both sets are rounded as every budget is, so that they have exactly the shares asked for."""
        backward = math.floor(_exact(self.density_backward) * units + Fraction(1, 2))
        return max(0, backward - count(self.sparsity, units))


def _exact(decimal: float) -> Fraction:
    return Fraction(repr(decimal))
