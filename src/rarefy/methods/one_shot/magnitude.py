"""Magnitude pruning, local or global, with an optional floor per layer.

Gupta et al., "Is complexity required for neural network pruning? A case study on global magnitude pruning", 2022,
arXiv:2209.14624.

Keep the largest |w|: of all layers together (Global MP, the default) or of each (`allocation="uniform"`). With
`minimum=0.0005` every layer keeps at least that share of all weights (the paper's minimum threshold, MT), so that none
collapses.

Deviations from the authors' code: exactly K weights are kept (theirs compares with a threshold); the floor is met by
water-filling (theirs rescales until the mean fits and may pass a layer's size).
"""

from rarefy.axes import value
from rarefy.core.method import register
from rarefy.methods.one_shot.prune import Prune


@register
@value
class Magnitude(Prune):
    """Keep the largest weights. See `Prune` for the arguments."""

    paper = "Gupta et al. 2022, arXiv:2209.14624"
