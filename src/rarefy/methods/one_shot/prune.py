"""One choice of masks: any score, any allocation, any pattern.

    mask = pattern.project(score(w, g), budget(allocation, sparsity))

Magnitude, Random, SNIP, GraSP are this with their own score and their papers' defaults.
"""

from typing import Annotated

from pydantic import Field

from rarefy.axes import AllocationField, AtLeast, PatternField, Score, ScoreField, Share, value
from rarefy.core.method import Method, register
from rarefy.core.scoring import score_sites
from rarefy.core.sparsity import Sparsity


@register
@value
class Prune(Method):
    """Args:
    sparsity: share of zeros; may be left out with an n:m pattern.
    score: a registered name, such as "taylor".
    allocation: how many weights each layer keeps, such as "uniform", "global", "lamp".
    pattern: where zeros may lie, such as "unstructured", "2:4", "4x1", "channel".
    minimum: least share of all units that every layer keeps (0.0005 = the minimum threshold of Global MP).
    batches: how many batches of `data` make the gradient, for scores that need one (None: all).
    """

    sparsity: Share | None = None
    score: ScoreField = "magnitude"
    allocation: AllocationField = "global"
    pattern: PatternField = "unstructured"
    minimum: Share = 0.0
    batches: Annotated[int, Field(ge=1)] | None = 1
    temperature: Annotated[float, Field(gt=0)] = 1.0

    stage = "one shot"
    labels = ("static", "dense-to-sparse", "simulated")

    def begin(self, s: Sparsity) -> None:
        score: Score = self.score
        scores = score_sites(s, score, batches=self.batches, temperature=self.temperature)
        allocation = AtLeast(self.allocation, share=self.minimum) if self.minimum else self.allocation
        for site, mask in s.project(scores, allocation, self.sparsity, pool=score.pool).items():
            s.keep(site, mask)
