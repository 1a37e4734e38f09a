"""RigL: dynamic sparse training that grows where the dense gradient is largest.

Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020, arXiv:1911.11134.

    every ΔT = 100 steps while t < ¾T, in each layer with n ones:  α(t) = α/2 (1 + cos(πt / ¾T)), k = int(α(t)·n)
    keep the n − k largest |w|, grow the k largest |∂L/∂w| of all others; new weights start at zero

In the code: the engine `DropAndGrow` with its defaults; the update takes the place of that iteration's optimizer step.

Deviations from the authors' code: no noise on |w| to break ties (the lower index stays); the step counter moves on in
an update iteration (theirs stands still), so the period is ΔT iterations and not ΔT + 1; α anneals by the cosine of the
paper (the code's default is constant); no update at t = 0; new weights start at zero only (theirs can be random).
"""

from rarefy.axes import value
from rarefy.core.method import register
from rarefy.methods.training.drop_and_grow import DropAndGrow


@register
@value
class RigL(DropAndGrow):
    """See `DropAndGrow` for the arguments.

    >>> import torch, rarefy
    >>> model = torch.nn.Linear(8, 4)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> sparsity = rarefy.sparsify(model, RigL(sparsity=0.75, every=2), optimizer=optimizer, steps=20)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(3, 8)).square().sum().backward()
    ...     optimizer.step()
    >>> int(model.weight.count_nonzero()) <= int(sparsity.masks["weight"].sum()) == 8
    True
    """

    paper = "Evci et al. 2020, arXiv:1911.11134"
    extra_cost = "one dense gradient every 100 steps"
