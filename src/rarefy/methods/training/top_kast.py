"""Top-KAST: always-sparse training with a larger set of weights to learn from.

Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", 2020, arXiv:2106.03517.

    forward uses α = θ_A, A = the share D of largest |θ|; gradients reach θ_B, B ⊃ A of share D + M
    penalty(θ) = ½‖θ_A‖² + ½‖θ_{B∖A}‖² / D      A and B are chosen anew every N = 100 steps

In the code: A = `site.mask`, B = `site.trainable`, θ = `site.master`, α = the parameter itself. θ outside B stays as it
is, through weight decay and momentum too.

Deviations: no official code was published. The penalty's gradient is added when gradients are final, after clipping; D is
each layer's own density.
"""

from typing import Annotated

from pydantic import Field

from rarefy.axes import AllocationField, Interval, PatternField, Share, value
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
        if self.density_backward < 1 - self.sparsity:
            raise ValueError(
                f"TopKAST: density_backward={self.density_backward} is below the forward density "
                f"{1 - self.sparsity:.4g}; give at least that, since B must contain A"
            )
        if self.pattern.fixed:
            raise ValueError(f"TopKAST: the pattern {self.pattern} fixes its own count; give one that takes a sparsity")

    def begin(self, s: Sparsity) -> None:
        self._choose(s, self.density_backward)

    def on_gradients(self, s: Sparsity) -> None:
        if not self.penalty:
            return
        for site in s.ready:
            if site.parameter.grad is not None:
                self._pull(s, site)

    def _pull(self, s: Sparsity, site: Site) -> None:
        """θ_A + θ_{B∖A}/D = θ_B/D + (1 − 1/D) θ_A."""
        density = s.kept(site) / site.numel
        reached = site.reached_weight()
        site.gradient.add_(reached, alpha=self.penalty / density)
        site.gradient.add_(local(site.parameter).detach(), alpha=self.penalty * (1 - 1 / density))

    def on_weights(self, s: Sparsity) -> None:
        until = s.at(self.until, "until")
        if s.step == until:
            self._choose(s, 1 - self.sparsity)
        elif s.step % self.every == 0 and s.step < until:
            self._choose(s, self.density_backward)

    def _choose(self, s: Sparsity, density: float) -> None:
        scores = {site: site.weight.abs() for site in s.sites}
        for site, forward in s.project(scores, self.allocation, self.sparsity).items():
            units = choose.units_of(site, forward)
            extra = round((density - (1 - self.sparsity)) * units.numel())
            wider = min(units.numel(), int(units.sum()) + max(0, extra))
            s.keep(site, forward, choose.fill(site, units, choose.pooled(site, scores[site], "mean_abs"), wider))
