"""SET: sparse evolutionary training. Sparse from start to end; drop the weakest, grow at random.

Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network
science", 2018, arXiv:1707.04780.

    every ΔT steps and per layer: remove the share ζ of weights closest to zero, the smallest positive and the largest
    negative ones apart; add as many at random empty positions

The first masks are Erdős–Rényi: density ∝ (n_in + n_out)/(n_in·n_out).

Deviations from the authors' code: a step interval instead of the end of an epoch; new weights start at zero (theirs at
random); exact counts (theirs draws with a probability); no update at the very end, as theirs.
"""

from typing import Literal

from rarefy.axes import AllocationField, Constant, DropFractionField, Every, EveryField, value
from rarefy.core.method import register
from rarefy.methods.training.drop_and_grow import DropAndGrow


@register
@value
class SET(DropAndGrow):
    """See `DropAndGrow` for the arguments; ζ is `fraction`, 0.3."""

    allocation: AllocationField = "erdos_renyi"
    drop: Literal["magnitude", "magnitude_by_sign"] = "magnitude_by_sign"
    grow: Literal["gradient", "random"] = "random"
    fraction: DropFractionField = Constant(0.3)
    every: EveryField = Every(100, 1.0)
    skip_step: bool = False

    paper = "Mocanu et al. 2018, arXiv:1707.04780"
    extra_cost = "random growth every 100 steps"
