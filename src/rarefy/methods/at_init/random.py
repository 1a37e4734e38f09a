"""Random pruning at initialisation: a fixed random mask with good layer ratios.

Liu et al., "The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse Training",
2022, arXiv:2202.02643.

    K_ℓ weights of layer ℓ, drawn uniformly; K from the allocation (Erdős–Rényi-kernel by default)

In the code: the K_ℓ largest of draws from [0, 1), one for each unit, in row order on the CPU. The paper's other ratios
are allocations too: "uniform", "uniform_plus", "erdos_renyi", "erdos_renyi_kernel_plus".

Deviations from the authors' code: exact counts (theirs draws each weight with probability d_ℓ); SNIP's and GraSP's
layer ratios are no allocation here (the control "shuffled" of a benchmark is that comparison).
"""

from rarefy.axes import AllocationField, Score, value
from rarefy.core.method import register
from rarefy.methods.one_shot.prune import ByScore


@register
@value
class Random(ByScore):
    """A random mask. See `ByScore` for the arguments.

    >>> import torch, rarefy
    >>> model = torch.nn.Linear(8, 4)
    >>> int(rarefy.sparsify(model, Random(sparsity=0.75), seed=3).masks["weight"].sum())
    8
    """

    allocation: AllocationField = "erdos_renyi_kernel"

    score = Score("random")

    stage = "at init"
    paper = "Liu et al. 2022, arXiv:2202.02643"
    labels = ("static", "sparse-to-sparse", "simulated")
