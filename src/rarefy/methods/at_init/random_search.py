"""Random search: the best of K random masks, by the loss of the initial weights. The neutral baseline of every search.

"Random Search as a Baseline for Sparse Neural Network Architecture Search", 2024, arXiv:2403.08265.

    mask = argmin over k of loss(model ⊙ mask_k), all candidates of the same size

Its finding is that such sub-networks are neither better nor faster to train than a random one of the same sparsity, so a
method that searches must beat this one. One candidate is `Random` with the same seed.

Deviations: the paper searches over nodes; here over the pattern's units (`pattern="channel"` for nodes).
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from rarefy.axes import AllocationField, PatternField, Score, Share, value
from rarefy.core.gradients import evaluate_masked, take
from rarefy.core.method import Method, register
from rarefy.core.scoring import score_sites
from rarefy.core.sites import Site
from rarefy.core.sparsity import Sparsity


@register
@value
class RandomSearch(Method):
    """Args: candidates: how many masks are drawn and scored. batches: how many batches score each (None: all)."""

    sparsity: Share | None = None
    candidates: Annotated[int, Field(ge=1)] = 100
    allocation: AllocationField = "erdos_renyi_kernel"
    pattern: PatternField = "unstructured"
    batches: Annotated[int, Field(ge=1)] | None = 1

    needs = frozenset({"data", "loss"})
    stage = "at init"
    paper = "arXiv:2403.08265 (2024)"
    extra_cost = "one forward pass per candidate and batch"
    labels = ("static", "sparse-to-sparse", "simulated")

    def begin(self, s: Sparsity) -> None:
        batches = take(s.data, self.batches)
        best: tuple[float, dict[Site, Tensor]] | None = None
        for _ in range(self.candidates):
            masks = s.project(score_sites(s, Score("random")), self.allocation, self.sparsity)
            loss = evaluate_masked(s.model, masks, batches, s.loss, seed=s.seed)
            if best is None or loss < best[0]:
                best = (loss, masks)
        assert best is not None
        for site, mask in best[1].items():
            s.keep(site, mask)
