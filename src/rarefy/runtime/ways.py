"""How a layer may be run: a form and an algorithm for each bucket of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rarefy.runtime import kernels
from rarefy.runtime.kernels import Algorithm, DType, Form

TORCH = -1
"""In the place of an algorithm: torch multiplies the dense weight."""

_FORMS = {Form.DENSE: "dense", Form.BITMAP: "bitmap", Form.INDEX16: "index", Form.LUT: "look-up"}
_ALGORITHMS = {TORCH: "torch", Algorithm.FEW: "few", Algorithm.MANY: "many", Algorithm.EXPAND: "expand"}


@dataclass(frozen=True)
class Way:
    """A form (of units of `block` rows) and an algorithm for it.

    >>> print(Way(Form.INDEX16, Algorithm.MANY, 4))
    index 4×1 many
    >>> Way.parse("index 4×1 many").block
    4
    """

    form: Form
    algorithm: int
    block: int = 1

    def __str__(self) -> str:
        block = f" {self.block}×1" if self.block > 1 else ""
        return f"{_FORMS[self.form]}{block} {_ALGORITHMS[self.algorithm]}"

    @classmethod
    def parse(cls, text: str) -> Way:
        """The inverse of `str`. Raises ValueError for anything else."""
        words = text.split()
        block = words.pop(1) if len(words) == 3 else "1×1"
        forms = {name: form for form, name in _FORMS.items()}
        algorithms = {name: algorithm for algorithm, name in _ALGORITHMS.items()}
        if len(words) != 2 or words[0] not in forms or words[1] not in algorithms or not block.endswith("×1"):
            raise ValueError(f"{text!r} is no way to run a layer, such as 'bitmap few' or 'index 4×1 many'")
        return cls(forms[words[0]], algorithms[words[1]], int(block[:-2]))

    def exists(self, dtype: DType) -> bool:
        """Whether this process has it: a kernel in the instruction set in use, or torch."""
        if self.algorithm == TORCH:
            return self.form == Form.DENSE
        return kernels.runs(self.form, dtype, Algorithm(self.algorithm))


Table = tuple[Way, ...]
"""One way for each bucket of tokens."""

# The first that exists is taken where nothing has been measured or predicted: few tokens, then many.
_ORDER = {
    False: (Algorithm.FEW, Algorithm.MANY, Algorithm.EXPAND),
    True: (Algorithm.MANY, Algorithm.EXPAND, Algorithm.FEW),
}


def ways_of(form: Form, dtype: DType, block: int = 1) -> Iterator[Way]:
    """All that exist for a form."""
    for algorithm in Algorithm:
        way = Way(form, int(algorithm), block)
        if way.exists(dtype):
            yield way


def plain_table(form: Form, dtype: DType, block: int = 1) -> Table | None:
    """What is usual for a form, for layers about which nothing is known; None where a kernel is missing."""
    found: list[Way] = []
    for bucket in range(kernels.BUCKETS):
        ways = {way.algorithm: way for way in ways_of(form, dtype, block)}
        usual = [ways[a] for a in _ORDER[bucket >= 2] if a in ways]
        if not usual:
            return None
        found.append(usual[0])
    return tuple(found)
