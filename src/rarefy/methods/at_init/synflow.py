"""SynFlow: data-free pruning before training, in many small rounds, that collapses no layer.

Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow", 2020,
arXiv:2006.05467.

    R = Σ f(1; |θ|),  score = |θ ⊙ ∂R/∂θ| ;  round i of n keeps the global share ρ^(i/n), ρ the final density

In the code: R and its gradient in float64 by `flow_gradients`, in evaluation mode. Where activations are ReLU-like,
what flows into a hidden neuron flows out of it, and R flows through every layer.

Deviations from the authors' code: exact counts; a weight once masked stays masked (theirs may revive one where an
active one on a dead path scores zero too); biases and running means count as zero (theirs: absolute), without which
flow is not conserved. With n:m, which has no steps on the way, one round.
"""

from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from rarefy.axes import AllocationField, PatternField, Score, Share, value
from rarefy.core.method import Method, register
from rarefy.core.scoring import score_sites
from rarefy.core.sites import Site
from rarefy.core.sparsity import Sparsity


@register
@value
class SynFlow(Method):
    """Needs one example input as `data` (only its shape matters; integers are passed on as they are).

    Args:
    rounds: n of the formula. One round alone is no SynFlow: the iterations are the method.
    decay: "exponential" is ρ^(i/n), "linear" 1 − (1 − ρ)·i/n, the authors' ablation.

    >>> import torch, rarefy
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> sparsity = rarefy.sparsify(model, SynFlow(sparsity=0.9), data=[torch.ones(1, 8)])
    >>> [bool(mask.any()) for mask in sparsity.masks.values()]
    [True, True]
    """

    sparsity: Share | None = None
    rounds: Annotated[int, Field(ge=1)] = 100
    decay: Literal["exponential", "linear"] = "exponential"
    allocation: AllocationField = "global"
    pattern: PatternField = "unstructured"

    needs = frozenset({"data"})
    stage = "at init"
    paper = "Tanaka et al. 2020, arXiv:2006.05467"
    extra_cost = "100 forward and backward passes on one all-ones sample"
    labels = ("static", "sparse-to-sparse", "simulated")
    executions = frozenset({"simulated", "sparse"})

    def begin(self, s: Sparsity) -> None:
        masks: dict[Site, Tensor] | None = None
        for share in [self.sparsity] if self.pattern.fixed else self._shares():
            scores = score_sites(s, Score("synflow"), masks=masks)
            masks = s.project(scores, self.allocation, share, nested=masks)
        for site, mask in (masks or {}).items():
            s.keep(site, mask)

    def _shares(self) -> list[float | None]:
        """Sparsity after each round; the last is the one asked for, to the digit."""
        if self.sparsity is None:
            return [None]  # refused where it is asked for
        parts = [float(Fraction(i, self.rounds)) for i in range(1, self.rounds)]
        if self.decay == "linear":
            return [*(self.sparsity * part for part in parts), self.sparsity]
        return [*(1 - (1 - self.sparsity) ** part for part in parts), self.sparsity]
