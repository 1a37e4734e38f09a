"""SNIP: prune once before training, by connection sensitivity.

Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", 2019, arXiv:1810.02340.

    s_j = |∂L/∂c_j| = |w_j · ∂L/∂w_j|  at c = 1, on one mini-batch; keep the K largest of all layers

In the code: the score "snip" of the axes; a unit of several weights pools w·g signed, then takes the magnitude.

Deviations from the authors' code: no re-initialisation before scoring (pass a model initialised as you mean it).
"""

from rarefy.axes import ScoreField, value
from rarefy.core.method import register
from rarefy.methods.one_shot.prune import Prune


@register
@value
class SNIP(Prune):
    """Needs `data` (one mini-batch of some 100 samples) and `loss`. See `Prune` for the arguments."""

    score: ScoreField = "snip"

    needs = frozenset({"data", "loss"})
    stage = "at init"
    paper = "Lee et al. 2019, arXiv:1810.02340"
    extra_cost = "one forward and backward pass"
    labels = ("static", "sparse-to-sparse", "simulated")
