"""ITOP: RigL tuned to explore. What matters is the share of weights that was ever active, reliably trained in between.

Liu et al., "Do We Actually Need Dense Over-Parameterization? In-Time Over-Parameterization in Sparse Training", 2021,
arXiv:2102.02887.

    RigL with half of the weights exchanged (cosine to 0.005 over the whole run), rarer updates that follow the
    optimizer step, and no early stop; R_s = |∪ₜ Mₜ| / N is `sparsity.ledger.explored`

ITOP on random growth is `ITOP(grow="random")`. The paper's intervals (1500 for SET, 4000 for RigL) are for long runs:
choose one that leaves 30 updates or more.

Deviations from the authors' code: exact counts under random growth.
"""

from rarefy.axes import Cosine, DropFractionField, Every, EveryField, value
from rarefy.core.method import register
from rarefy.methods.training.drop_and_grow import DropAndGrow


@register
@value
class ITOP(DropAndGrow):
    """See `DropAndGrow` for the arguments."""

    fraction: DropFractionField = Cosine(0.5, 0.005)
    every: EveryField = Every(4000, 1.0)
    skip_step: bool = False

    paper = "Liu et al. 2021, arXiv:2102.02887"
    extra_cost = "one dense gradient every 4000 steps"
