"""SNIP: prune once before training, by connection sensitivity.

Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", 2019, arXiv:1810.02340.

    s_j = |∂L/∂c_j| = |w_j · ∂L/∂w_j|  at c = 1, on one mini-batch; keep the K largest of all layers

In the code: the score "snip" of the axes; a unit of several weights pools w·g signed, then takes the magnitude. The
ranking is that of the normalised s_j / Σ s.

Deviations from the authors' code: no re-initialisation before scoring (pass a model initialised as you mean it: the
paper asks for variance scaling).
"""

from typing import Annotated

from pydantic import Field

from rarefy.axes import Score, value
from rarefy.core.method import register
from rarefy.methods.one_shot.prune import ByScore


@register
@value
class SNIP(ByScore):
    """Needs `data` (one mini-batch of some 100 samples) and `loss`.

    Args: batches: how many of `data` are scored together (None: all). See `ByScore` for the others.

    >>> import torch, rarefy
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> batch = torch.ones(3, 8), torch.tensor([0, 1, 1])
    >>> def loss(model, batch):
    ...     return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    >>> sparsity = rarefy.sparsify(model, SNIP(sparsity=0.5), data=[batch], loss=loss)
    >>> sum(int(mask.sum()) for mask in sparsity.masks.values())
    20
    """

    batches: Annotated[int, Field(ge=1)] | None = 1

    score = Score("snip")

    needs = frozenset({"data", "loss"})
    stage = "at init"
    paper = "Lee et al. 2019, arXiv:1810.02340"
    extra_cost = "one forward and backward pass"
    labels = ("static", "sparse-to-sparse", "simulated")
