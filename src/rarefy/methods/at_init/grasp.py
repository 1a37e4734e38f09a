"""GraSP: prune once before training so that the gradient flow is preserved.

Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow", 2020, arXiv:2002.07376.

    S = −θ ⊙ H g ; remove the largest S of all layers, that is keep the largest θ ⊙ H g  (signed)

g and H are of the loss whose logits are divided by T = 200; a class-balanced batch (10 per class) is customary.
In the code: the score "grasp" of the axes on `curvature_gradients`.

Deviations from the authors' code: no re-initialisation of Linear weights before scoring; one pass per batch given (theirs
splits its batch in two halves: give two batches and batches=2 for that); scores are not normalised, which leaves the
ranking as it is.
"""

from rarefy.axes import ScoreField, value
from rarefy.core.method import register
from rarefy.methods.one_shot.prune import Prune


@register
@value
class GraSP(Prune):
    """Needs `data` and `loss`. See `Prune` for the arguments; temperature: divides the model's output."""

    score: ScoreField = "grasp"
    temperature: float = 200.0

    needs = frozenset({"data", "loss"})
    stage = "at init"
    paper = "Wang et al. 2020, arXiv:2002.07376"
    extra_cost = "two forward and backward passes, one Hessian-vector product"
    labels = ("static", "sparse-to-sparse", "simulated")
