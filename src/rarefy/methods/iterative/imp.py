"""IMP: iterative magnitude pruning with rewinding, the lottery-ticket procedure.

Frankle & Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", 2019, arXiv:1803.03635;
late rewinding: Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020, arXiv:1912.05671;
learning-rate rewinding: Renda et al., "Comparing Rewinding and Fine-tuning in Neural Network Pruning", 2020,
arXiv:2003.02389.

    train to θ_T; remove ceil(0.2·n) of the n active weights by global magnitude; θ ← M ⊙ θ_k; repeat

`rewind_to` = k. rewind="learning_rate" keeps the trained weights and replays the schedule. In both, `train` is called
with `sparsity.step` = the step from which the learning-rate schedule is to be replayed (k, or 0).

Deviations from the authors' code: exactly ceil(0.2·n) are removed (theirs: one more); the last round removes fewer where
that meets the sparsity asked for exactly.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rarefy.axes import AllocationField, PatternField, Share, value
from rarefy.core.method import Driver, Method, register
from rarefy.core.sparsify import sparsify
from rarefy.core.sparsity import Sparsity

Train = Callable[[nn.Module, Sparsity], Any]


@value
class Ticket(Method):
    """What IMP runs inside a round: fixed masks, and a snapshot of the whole model after step `rewind_to` of round 0."""

    rewind_to: Annotated[int, Field(ge=0)] = 0
    pattern: PatternField = "unstructured"

    stage = "iterative"

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
    allocation, pattern: as for `Prune`; the paper's are global and unstructured.
    """

    sparsity: Share
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    rewind: Literal["weights", "learning_rate"] = "weights"
    rewind_to: Annotated[int, Field(ge=0)] = 0
    allocation: AllocationField = "global"
    pattern: PatternField = "unstructured"

    paper = "Frankle & Carbin 2019, arXiv:1803.03635"
    extra_cost = "a whole training run per round (14 rounds for 95 %)"

    def rounds(self, units: int) -> list[int]:
        """Kept units in each round, all of them first.

        >>> IMP(sparsity=0.5).rounds(100)
        [100, 80, 64, 51, 50]
        """
        final = math.floor((1 - Fraction(repr(self.sparsity))) * units + Fraction(1, 2))
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
        `sparsity.step` on. evaluate(model) is called after every round; its results are in `.memory["history"]`.
        Returns the handle of the last round, detached. Raises RuntimeError if `train` attached no optimizer.
        """
        s = sparsify(model, Ticket(self.rewind_to, self.pattern), only=only, skip=skip, seed=seed)
        s.memory["history"] = []
        units = sum(site.pattern.units(site.pattern_shape) for site in s.sites)
        for index, kept in enumerate(self.rounds(units)):
            if index > 0:
                self._prune(s, 1 - kept / units)
            before = s.ledger.steps
            train(model, s)
            if s.ledger.steps == before:
                raise RuntimeError(
                    f"round {index} of {self}: train(model, sparsity) took no step under the handle. "
                    "Call sparsity.attach(optimizer, steps) in it before the first step."
                )
            s.detach()
            score = evaluate(model) if evaluate is not None else None
            s.memory["history"].append({"round": index, "sparsity": s.sparsity, "evaluation": score})
        return s

    def _prune(self, s: Sparsity, sparsity: float) -> None:
        scores = {site: site.weight.abs() for site in s.sites}
        masks = s.project(scores, self.allocation, sparsity, nested={site: site.mask for site in s.sites})
        if self.rewind == "weights":
            _restore(s.model, s.memory["snapshot"])
        s.restart(self.rewind_to if self.rewind == "weights" else 0)
        for site, mask in masks.items():
            s.keep(site, mask)
        s.commit()


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def _restore(model: nn.Module, saved: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, t in model.state_dict().items():
            t.copy_(saved[name])
