"""The encoder pruned without training, by every method at every sparsity, and what that does to its embeddings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from rarefy.bench.one_shot import Pruning, asked
from rarefy.bench.one_shot import pruned as prune
from rarefy.bench.sentences.documents import OneShot
from rarefy.bench.sentences.encoder import Encoder
from rarefy.bench.sentences.judge import Judge
from rarefy.core.method import Method
from rarefy.methods import ALPS, Magnitude, Random, SparseGPT, Wanda

__all__ = ["METHODS", "PATTERNS", "Case", "cases", "execute", "method_of", "pruned"]

PATTERNS = ("50 %", "70 %", "80 %", "2:4")

METHODS: dict[str, Callable[..., Method]] = {
    "Random": Random,
    "Magnitude": Magnitude,
    "Wanda": Wanda,
    "SparseGPT": SparseGPT,
    "ALPS": ALPS,
}
"""Random is the control: as many zeros, anywhere."""


@dataclass(frozen=True)
class Case:
    """A method and how much it prunes: "50 %" (unstructured) or n:m, n kept."""

    method: str
    pattern: str


def cases(patterns: tuple[str, ...] = PATTERNS) -> Iterator[Case]:
    """All of them."""
    for pattern in patterns:
        yield from (Case(method, pattern) for method in METHODS)


def method_of(case: Case) -> Method:
    """The method of a case; every layer is pruned alike.

    >>> method_of(Case("Wanda", "2:4")).sparsity is None
    True
    """
    return METHODS[case.method](**asked(case.pattern), allocation="uniform")


def pruned(encoder: Encoder, case: Case, data: list[dict[str, Tensor]]) -> tuple[Encoder, Pruning]:
    """A pruned copy, and what was done to it."""
    made = copy.deepcopy(encoder)
    return made, prune(made.model, method_of(case), lambda: data, seed=0)


def execute(encoder: Encoder, case: Case, data: list[dict[str, Tensor]], judge: Judge) -> OneShot:
    """Prune a copy and judge it."""
    made, done = pruned(encoder, case, data)
    return OneShot(
        method=case.method, pattern=case.pattern, kept=done.kept, total=done.total, seconds=round(done.seconds, 2),
        warnings=done.warnings, quality=judge(made),
    )  # fmt: skip
