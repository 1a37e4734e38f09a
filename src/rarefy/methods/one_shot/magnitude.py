"""Magnitude pruning, local or global, with an optional floor per layer.

Gupta et al., "Is complexity required for neural network pruning? A case study on global magnitude pruning", 2022,
arXiv:2209.14624.

Keep the largest |w|: of all layers together (Global MP, the default) or of each (`allocation="uniform"`). With
`minimum=0.0005` every layer keeps at least that share of all weights (the paper's minimum threshold, MT), so that none
collapses; layers smaller than that stay dense. The gradual form is `GMP` with `allocation=AtLeast("global")`.

Deviations from the authors' code: exactly K weights are kept (theirs compares with a threshold); the floor is met by
water-filling (theirs rescales until the mean fits and may pass a layer's size).
"""

from rarefy.axes import value
from rarefy.core.method import register
from rarefy.methods.one_shot.prune import ByScore


@register
@value
class Magnitude(ByScore):
    """Keep the largest weights. See `ByScore` for the arguments.

    >>> import torch, rarefy
    >>> model = torch.nn.Linear(3, 1)
    >>> _ = model.weight.data.copy_(torch.tensor([[0.1, -3.0, 2.0]]))
    >>> rarefy.sparsify(model, Magnitude(sparsity=0.3)).masks["weight"]
    tensor([[False,  True,  True]])
    """

    paper = "Gupta et al. 2022, arXiv:2209.14624"
