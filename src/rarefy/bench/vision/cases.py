"""What the ResNet is pruned by: a method, an allocation, with and without refit, at every sparsity and at 2:4."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rarefy.bench.one_shot import METHODS, asked
from rarefy.core.method import Method
from rarefy.methods import Refit

__all__ = ["ALLOCATIONS", "PATTERNS", "REFITTED", "Case", "cases"]

PATTERNS = ("50 %", "60 %", "70 %", "80 %", "2:4")

REFITTED = ("Magnitude", "Wanda", "SparseGPT")  # ALPS solves for the weights that it keeps by itself
ALLOCATIONS = {"uniform": "uniform", "global": "global", "ERK": "erdos_renyi_kernel"}


@dataclass(frozen=True)
class Case:
    """pattern: "50 %" (unstructured) or n:m, n kept.

    >>> print(Case("Magnitude", "50 %", "global").variant, Case("Wanda", "2:4", refit=True).variant, sep="; ")
    Magnitude, global; Wanda + refit
    """

    method: str
    pattern: str
    allocation: str = "uniform"
    refit: bool = False

    @property
    def variant(self) -> str:
        """The row of the table."""
        return self.method + (f", {self.allocation}" if self.allocation != "uniform" else "") + " + refit" * self.refit

    def build(self) -> Method:
        """The method."""
        made = METHODS[self.method]({**asked(self.pattern), "allocation": ALLOCATIONS[self.allocation]})
        return Refit(made) if self.refit else made


def cases(patterns: tuple[str, ...]) -> Iterator[Case]:
    """All of them; n:m fixes what a layer keeps, and goes with no allocation of another kind."""
    for pattern in patterns:
        if ":" not in pattern:
            yield from (Case("Magnitude", pattern, allocation) for allocation in ("global", "ERK"))
        for method in METHODS:
            yield from (Case(method, pattern, refit=refit) for refit in (False, True)[: 1 + (method in REFITTED)])
