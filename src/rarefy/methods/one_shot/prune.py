"""One choice of masks: any score, any allocation, any pattern.

    mask = pattern.project(score(w, g), budget(allocation, sparsity))

Magnitude, Random, SNIP and GraSP are this with their own score and their papers' defaults.
"""

from typing import Annotated, Any

from pydantic import Field

from rarefy.axes import AllocationField, AtLeast, PatternField, Score, ScoreField, Share, value
from rarefy.core.method import Method, register
from rarefy.core.scoring import pool_of, score_sites
from rarefy.core.sparsity import Sparsity


@value
class ByScore(Method):
    """Masks are chosen once, by a score that the subclass names.

    Args:
    sparsity: share of zeros; may be left out with an n:m pattern.
    allocation: how many weights each layer keeps, such as "uniform", "global", "lamp".
    pattern: where zeros may lie, such as "unstructured", "2:4", "4x1", "channel".
    minimum: least share of all units that every layer keeps (0.0005 = the minimum threshold of Global MP).
    """

    sparsity: Share | None = None
    allocation: AllocationField = "global"
    pattern: PatternField = "unstructured"
    minimum: Share = 0.0

    # Fields where a subclass makes them so.
    score = Score("magnitude")
    batches = 1
    temperature = 1.0

    stage = "one shot"
    labels = ("static", "dense-to-sparse", "simulated")
    executions = frozenset({"simulated", "sparse"})

    def begin(self, s: Sparsity) -> None:
        score: Any = self.score
        scores = score_sites(s, score, batches=self.batches, temperature=self.temperature)
        allocation = AtLeast(self.allocation, share=self.minimum) if self.minimum else self.allocation
        for site, mask in s.project(scores, allocation, self.sparsity, pool=pool_of(score)).items():
            s.keep(site, mask)


@register
@value
class Prune(ByScore):
    """Args:
    score: a registered name, such as "taylor".
    batches: how many batches of `data` make the gradient, for scores that need one (None: all).
    temperature: divides the model's output before the loss, for scores that need a gradient of it.
    See `ByScore` for the others.

    >>> import torch, rarefy
    >>> model = torch.nn.Linear(4, 2)
    >>> batches = [(torch.ones(3, 4), torch.zeros(3, 2))]
    >>> def loss(model, batch):
    ...     return (model(batch[0]) - batch[1]).square().mean()
    >>> int(rarefy.sparsify(model, Prune(0.5, score="taylor"), data=batches, loss=loss).masks["weight"].sum())
    4
    """

    score: ScoreField = "magnitude"
    batches: Annotated[int, Field(ge=1)] | None = 1
    temperature: Annotated[float, Field(gt=0)] = 1.0
