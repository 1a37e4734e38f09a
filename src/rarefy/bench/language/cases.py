"""What the language model is pruned by: every method, with and without refit and OWL, at every sparsity and pattern."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rarefy.bench.one_shot import METHODS, asked
from rarefy.core.method import Method
from rarefy.methods import Refit

__all__ = ["PATTERNS", "QUICK_PATTERNS", "Case", "cases"]

PATTERNS = ("50 %", "60 %", "70 %", "80 %", "4:8", "2:4")
QUICK_PATTERNS = ("50 %", "2:4")


@dataclass(frozen=True)
class Case:
    """A method, what goes with it, and how much is pruned.

    pattern: "50 %" (unstructured) or n:m, n kept.

    >>> print(Case("Wanda", "2:4", refit=True, owl=True).variant)
    Wanda + OWL + refit
    """

    method: str
    pattern: str
    refit: bool = False
    owl: bool = False

    @property
    def variant(self) -> str:
        """The row of the table."""
        return self.method + " + OWL" * self.owl + " + refit" * self.refit

    def build(self) -> Method:
        """The method. Allocations are uniform unless they are OWL's."""
        made = METHODS[self.method]({**asked(self.pattern), "allocation": "owl" if self.owl else "uniform"})
        return Refit(made) if self.refit else made

    def seeds(self, count: int) -> range:
        """The calibration draws that matter: one for a method that reads no data."""
        return range(count if "data" in self.build().needs else 1)


def cases(patterns: tuple[str, ...]) -> Iterator[Case]:
    """Each method as it is, with refit, and with OWL, which goes with methods that see inputs alone."""
    for pattern in patterns:
        for method in METHODS:
            yield from (Case(method, pattern), Case(method, pattern, refit=True))
            if method != "Magnitude":
                yield Case(method, pattern, owl=True)
