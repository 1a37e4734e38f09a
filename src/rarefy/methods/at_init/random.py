"""Random pruning at initialisation: a fixed random mask with good layer ratios.

Liu et al., "The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse Training",
2022, arXiv:2202.02643.

    K_ℓ weights of layer ℓ, drawn uniformly; K from the allocation (Erdős–Rényi-kernel by default)

Deviations from the authors' code: exact counts (theirs draws each weight with probability d_ℓ).
"""

from rarefy.axes import AllocationField, ScoreField, value
from rarefy.core.method import register
from rarefy.methods.one_shot.prune import Prune


@register
@value
class Random(Prune):
    """A random mask. See `Prune` for the arguments."""

    score: ScoreField = "random"
    allocation: AllocationField = "erdos_renyi_kernel"

    stage = "at init"
    paper = "Liu et al. 2022, arXiv:2202.02643"
    labels = ("static", "sparse-to-sparse", "simulated")
