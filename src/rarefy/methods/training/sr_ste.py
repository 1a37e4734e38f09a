"""SR-STE: learn n:m sparsity from scratch; a sparse forward, a dense backward, and decay where the mask is false.

Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", 2021, arXiv:2102.04010.

    W̃ = M(W) ⊙ W, M chosen anew from |W| at every step;   W ← W − γ (∂L/∂W̃ + λ (1 − M) ⊙ W),  λ = 2·10⁻⁴

In the code: W = `site.master`, W̃ = the parameter itself, so (1 − M) ⊙ W is their difference. λ = 0 is the plain
straight-through estimator.

Deviations from the authors' code: ties go to the earlier weight (theirs: the later); a last partial group keeps
ceil(n·length/m). `decoupled=True` applies γλ outside the optimizer, for Adam and its kin, whose normalised gradient
makes λ vanish otherwise. The term is added when gradients are final, after clipping (theirs: in the backward pass).
"""

from typing import Annotated

import torch
from pydantic import Field

from rarefy.axes import AllocationField, PatternField, Share, value
from rarefy.core.held import local
from rarefy.core.method import Method, register
from rarefy.core.sparsity import Sparsity


@register
@value
class SRSTE(Method):
    """Args:
    pattern: n:m usually; any other with its sparsity and allocation.
    decay: λ. decoupled: whether λ acts outside the optimizer, scaled by the learning rate.

    >>> import torch, rarefy
    >>> model = torch.nn.Linear(8, 4)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> sparsity = rarefy.sparsify(model, SRSTE(pattern="1:4"), optimizer=optimizer)
    >>> sparsity.masks["weight"].view(4, 2, 4).sum(2)
    tensor([[1, 1], [1, 1], [1, 1], [1, 1]])
    """

    sparsity: Share | None = None
    pattern: PatternField = "2:4"
    decay: Annotated[float, Field(ge=0)] = 2e-4
    decoupled: bool = False
    allocation: AllocationField = "uniform"

    needs = frozenset({"optimizer", "master"})
    stage = "training"
    paper = "Zhou et al. 2021, arXiv:2102.04010"
    extra_cost = "dense gradients and a dense copy of the weights; masks at every step"
    labels = ("dynamic", "dense-to-sparse", "simulated")
    dense_backward = True

    def begin(self, s: Sparsity) -> None:
        self._choose(s)

    def on_gradients(self, s: Sparsity) -> None:
        if self.decoupled or not self.decay:
            return
        for site in s.ready:
            if site.master is not None and site.parameter.grad is not None:
                site.gradient.add_(site.master, alpha=self.decay)
                site.gradient.sub_(local(site.parameter).detach(), alpha=self.decay)

    def on_weights(self, s: Sparsity) -> None:
        if self.decoupled and self.decay:
            self._decay_apart(s)
        self._choose(s)

    def _decay_apart(self, s: Sparsity) -> None:
        with torch.no_grad():
            for site in s.sites:
                if site.master is not None:
                    hidden = site.master - local(site.parameter)
                    site.master.sub_(hidden, alpha=s.learning_rate(site) * self.decay)

    def _choose(self, s: Sparsity) -> None:
        masks = s.project({site: site.weight.abs() for site in s.sites}, self.allocation, self.sparsity)
        for site, mask in masks.items():
            s.keep(site, mask, trainable="everywhere")
