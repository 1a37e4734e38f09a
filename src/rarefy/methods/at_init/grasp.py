"""GraSP: prune once before training so that the gradient flow is preserved.

Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow", 2020, arXiv:2002.07376.

    S = −θ ⊙ H g ; remove the largest S of all layers, that is keep the largest θ ⊙ H g  (signed)

g and H are of the loss whose logits are divided by T = 200; a class-balanced batch (10 per class) is customary.
In the code: the score "grasp" of the axes on `curvature_gradients`.

Deviations from the authors' code: no re-initialisation of Linear weights before scoring; one pass per batch given
(theirs splits its batch in two halves: give two batches and batches=2 for that); scores are not normalised, which does
not change their ranking.
"""

from typing import Annotated

from pydantic import Field

from rarefy.axes import Score, value
from rarefy.core.method import register
from rarefy.methods.one_shot.prune import ByScore


@register
@value
class GraSP(ByScore):
    """Needs `data` and `loss`.

    Args:
    batches: how many of `data` are scored together (None: all).
    temperature: T, which divides the model's output.
    See `ByScore` for the others.
    """

    batches: Annotated[int, Field(ge=1)] | None = 1
    temperature: Annotated[float, Field(gt=0)] = 200.0

    score = Score("grasp")

    needs = frozenset({"data", "loss"})
    stage = "at init"
    paper = "Wang et al. 2020, arXiv:2002.07376"
    extra_cost = "two forward and backward passes, one Hessian-vector product"
    labels = ("static", "sparse-to-sparse", "simulated")
