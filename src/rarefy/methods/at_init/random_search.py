"""Random search: the best of K random masks, by the loss of the initial weights. The neutral baseline of every search.

Farahani, "Random Search as a Baseline for Sparse Neural Network Architecture Search", 2024, arXiv:2403.08265.

    mask = argmin over k of loss(model ⊙ mask_k), all candidates of the same size

Its finding is that such sub-networks are neither better nor faster to train than a random one of the same sparsity, so
a method that searches must beat this one. One candidate is `Random` with the same seed.

In the code: mask_k is drawn anew from the state that the generator had before it, so that no K masks are kept.

Deviations: the paper searches over nodes; here over the pattern's units (`pattern="channel"` for nodes).
"""

import math
from typing import Annotated

from pydantic import Field
from torch import Tensor

from rarefy.axes import AllocationField, PatternField, Share, value
from rarefy.core.gradients import evaluate_masked, take
from rarefy.core.method import Method, register
from rarefy.core.scoring import random_masks
from rarefy.core.sparsity import Sparsity


@register
@value
class RandomSearch(Method):
    """Needs `data`, which must not be the test data, and `loss`.

    Args:
    candidates: K, how many masks are drawn and scored. batches: how many of `data` score each (None: all).

    >>> import torch, rarefy
    >>> def loss(model, batch):
    ...     return model(batch).square().mean()
    >>> model = torch.nn.Linear(8, 4)
    >>> sparsity = rarefy.sparsify(model, RandomSearch(sparsity=0.75), data=[torch.ones(2, 8)], loss=loss)
    >>> int(sparsity.masks["weight"].sum())
    8
    """

    sparsity: Share | None = None
    candidates: Annotated[int, Field(ge=1)] = 100
    allocation: AllocationField = "erdos_renyi_kernel"
    pattern: PatternField = "unstructured"
    batches: Annotated[int, Field(ge=1)] | None = 1

    needs = frozenset({"data", "loss"})
    stage = "at init"
    paper = "Farahani 2024, arXiv:2403.08265"
    extra_cost = "one forward pass per candidate and batch"
    labels = ("static", "sparse-to-sparse", "simulated")
    executions = frozenset({"simulated", "sparse"})

    def begin(self, s: Sparsity) -> None:
        s.generator.set_state(self._best(s))
        for site, mask in random_masks(s, self.allocation, self.sparsity).items():
            s.keep(site, mask)

    def _best(self, s: Sparsity) -> Tensor:
        """The generator's state before the best candidate; of equal ones before the first."""
        batches = take(s.data, self.batches)
        best, least = s.generator.get_state(), math.inf
        for _ in range(self.candidates):
            state = s.generator.get_state()
            masks = random_masks(s, self.allocation, self.sparsity)
            loss = evaluate_masked(s.model, masks, batches, s.loss, seed=s.seed)
            if loss < least:
                best, least = state, loss
        if not math.isfinite(least):
            raise ValueError(f"{self}: every candidate has a NaN or infinite loss: look at the data and the weights.")
        return best
