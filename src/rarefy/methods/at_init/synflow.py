"""SynFlow: data-free pruning before training, in many small rounds, that collapses no layer.

Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow", 2020,
arXiv:2006.05467.

    R = Σ f(1; |θ|),  score = |θ ⊙ ∂R/∂θ| ;  round i of n keeps the global share ρ^(i/n), ρ the final density

In the code: R and its gradient in float64 by `flow_gradients` (evaluation mode, every parameter and buffer absolute).

Deviations from the authors' code: exact counts, and a weight once masked stays masked (theirs may revive one where an
active weight on a dead path scores zero too).
"""

from fractions import Fraction
from typing import Annotated

from pydantic import Field

from rarefy.axes import AllocationField, PatternField, Score, Share, value
from rarefy.core.method import Method, register
from rarefy.core.scoring import score_sites
from rarefy.core.sparsity import Sparsity


@register
@value
class SynFlow(Method):
    """Needs one example input as `data` (its values do not matter). Args: rounds: n of the formula."""

    sparsity: Share | None = None
    rounds: Annotated[int, Field(ge=1)] = 100
    allocation: AllocationField = "global"
    pattern: PatternField = "unstructured"

    needs = frozenset({"data"})
    stage = "at init"
    paper = "Tanaka et al. 2020, arXiv:2006.05467"
    extra_cost = "100 forward and backward passes on one all-ones sample"
    labels = ("static", "sparse-to-sparse", "simulated")

    def begin(self, s: Sparsity) -> None:
        masks = None
        for i in range(1, self.rounds + 1):
            scores = score_sites(s, Score("synflow"), masks=masks)
            masks = s.project(scores, self.allocation, self._at(i), nested=masks)
        assert masks is not None
        for site, mask in masks.items():
            s.keep(site, mask)

    def _at(self, i: int) -> float | None:
        """Sparsity after round i; the last is the one asked for, to the digit."""
        if self.sparsity is None or i == self.rounds:
            return self.sparsity
        return 1 - (1 - self.sparsity) ** float(Fraction(i, self.rounds))
