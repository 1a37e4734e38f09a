"""IMP: iterative magnitude pruning with rewinding, the lottery-ticket procedure.

Frankle & Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", 2019, arXiv:1803.03635;
late rewinding: Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020, arXiv:1912.05671;
learning-rate rewinding: Renda et al., "Comparing Rewinding and Fine-tuning in Neural Network Pruning", 2020,
arXiv:2003.02389.

    train to θ_T; remove ceil(0.2·n) of the n active weights by global magnitude; θ ← M ⊙ θ_k; repeat

`rewind_to` = k. rewind="learning_rate" keeps the trained weights and replays the schedule of learning rates alone. In
both, `train` is called with `sparsity.step` = k, the step from which that schedule is to be replayed.

Deviations from the authors' code: exactly ceil(0.2·n) are removed (theirs: one more); the last round removes fewer
where that meets the sparsity asked for exactly.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rarefy.axes import AllocationField, PatternField, Share, count, value
from rarefy.core import choose
from rarefy.core.method import Driver, Method, register
from rarefy.core.sparsify import sparsify
from rarefy.core.sparsity import Sparsity

Train = Callable[[nn.Module, Sparsity], Any]


@value
class Ticket(Method):
    """What IMP runs inside a round: fixed masks, and a copy of the whole model after step `rewind_to` of round 0."""

    rewind_to: Annotated[int, Field(ge=0)] | None = 0
    pattern: PatternField = "unstructured"

    stage = "iterative"
    labels = ("static", "dense-to-sparse", "simulated")

    def begin(self, s: Sparsity) -> None:
        for site in s.sites:
            s.keep(site, torch.ones_like(site.mask))
        if self.rewind_to == 0:
            s.memory["snapshot"] = _snapshot(s.model)

    def on_weights(self, s: Sparsity) -> None:
        if s.step == self.rewind_to and "snapshot" not in s.memory:
            s.memory["snapshot"] = _snapshot(s.model)


@register
@value
class IMP(Driver):
    """Args:
    sparsity: after the last round. share: what part of the active weights each round removes.
    rewind: "weights" goes back to those of step `rewind_to`, "learning_rate" keeps them.
    rewind_to: k, the step that each round starts from.
    allocation, pattern: as for `Prune`; the paper's are global and unstructured.

    >>> def train(model, sparsity):
    ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ...     sparsity.attach(optimizer, steps=3)
    ...     for _ in range(sparsity.step, 3):
    ...         optimizer.zero_grad()
    ...         model(torch.ones(2, 8)).square().sum().backward()
    ...         optimizer.step()
    >>> sparsity = IMP(sparsity=0.5).run(nn.Linear(8, 4), train)
    >>> [round(entry["sparsity"], 2) for entry in sparsity.memory["history"]]
    [0.0, 0.22, 0.38, 0.5]
    """

    sparsity: Share
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    rewind: Literal["weights", "learning_rate"] = "weights"
    rewind_to: Annotated[int, Field(ge=0)] = 0
    allocation: AllocationField = "global"
    pattern: PatternField = "unstructured"

    paper = "Frankle & Carbin 2019, arXiv:1803.03635"
    extra_cost = "a whole training run per round (14 rounds for 95 %)"

    def __post_init__(self) -> None:
        if self.pattern.fixed:
            raise ValueError(f"the pattern {self.pattern} fixes its own count, so that no round could keep another one")

    def rounds(self, units: int) -> list[int]:
        """Kept units in each round, all of them first.

        >>> IMP(sparsity=0.5).rounds(100)
        [100, 80, 64, 51, 50]
        """
        final = count(self.sparsity, units)
        kept = [units]
        while kept[-1] > final:
            kept.append(max(final, kept[-1] - math.ceil(Fraction(repr(self.share)) * kept[-1])))
        return kept

    def run(
        self,
        model: nn.Module,
        train: Train,
        evaluate: Callable[[nn.Module], Any] | None = None,
        *,
        only: Any = None,
        skip: Any = None,
        seed: int = 0,
    ) -> Sparsity:
        """Train, prune and rewind until `sparsity` is reached and trained.

        train(model, sparsity) makes a fresh optimizer, calls `sparsity.attach(optimizer, steps)` and trains from step
        `sparsity.step` on. evaluate(model) is called after every round; its results, numbers or other JSON values, are
        in `.memory["history"]`. Returns the handle of the last round, detached. Raises ValueError for a budget that
        cannot be met, before training; RuntimeError if `train` attached no optimizer or took fewer than `rewind_to`
        steps.
        """
        ticket = Ticket(self.rewind_to if self.rewind == "weights" else None, self.pattern)
        s = sparsify(model, ticket, only=only, skip=skip, seed=seed)
        s.memory["history"] = []
        choose.allocate(s.sites, self.allocation, self.sparsity, {x: choose.pooled(x, x.weight) for x in s.sites})
        units = sum(site.pattern.units(site.pattern_shape) for site in s.sites)
        rounds = self.rounds(units)
        for index, kept in enumerate(rounds):
            if index > 0:
                self._prune(s, self.sparsity if kept == rounds[-1] else 1 - kept / units)
            self._round(s, index, train)
            score = evaluate(model) if evaluate is not None else None
            s.memory["history"].append({"round": index, "sparsity": s.sparsity, "evaluation": score})
        return s

    def _round(self, s: Sparsity, index: int, train: Train) -> None:
        before = s.ledger.steps
        try:
            train(s.model, s)
        finally:
            s.detach()
        taken = s.ledger.steps - before
        if not taken:
            raise RuntimeError(
                f"round {index} of {self}: train(model, sparsity) took no step under the handle. "
                "Call sparsity.attach(optimizer, steps) in it before the first step."
            )
        if self.rewind == "weights" and "snapshot" not in s.memory:
            raise RuntimeError(
                f"{self} rewinds to step {self.rewind_to}, but round 0 ended after {taken}: train longer, or rewind to "
                "an earlier step."
            )

    def _prune(self, s: Sparsity, sparsity: float) -> None:
        scores = {site: site.weight.abs() for site in s.sites}
        masks = s.project(scores, self.allocation, sparsity, nested={site: site.mask for site in s.sites})
        if self.rewind == "weights":
            _restore(s.model, s.memory["snapshot"])
        s.restart(self.rewind_to)
        for site, mask in masks.items():
            s.keep(site, mask)
        s.commit()


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in _tensors(model).items()}


def _restore(model: nn.Module, saved: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, t in _tensors(model).items():
            t.copy_(saved[name])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, those too that no state_dict holds."""
    return dict(model.named_parameters()) | dict(model.named_buffers())
