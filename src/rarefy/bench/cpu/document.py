"""The JSON document of a benchmark: environment, limits of the machine, peers, rows of times, goals.

Times are microseconds per call. A ratio is another candidate's time over rarefy's, so above 1 rarefy is faster.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from rarefy.bench.cpu.machine import Machine
from rarefy.bench.cpu.timing import Ratio, Samples, paired_ratio
from rarefy.bench.environment import Environment
from rarefy.bench.files import write_whole

__all__ = ["KERNEL", "LAYER", "Comparison", "Document", "Goal", "Row", "Timing", "make_row", "now"]

LAYER = "rarefy"
"""The candidate that is `rarefy.pack`'s own choice, called as a module."""
KERNEL = "kernel "
"""Beginning of the names of single kernels of this library, called without a module around them."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Timing(_Model):
    """Microseconds per call over rounds: the least, the median, the quartiles; each sample is a mean over `calls`."""

    minimum: float
    median: float
    low: float
    high: float
    rounds: int
    calls: int

    @classmethod
    def of(cls, samples: Samples) -> "Timing":
        """From seconds, to four significant digits after the point."""
        low, high = samples.quartiles
        least, middle, low, high = (round(s * 1e6, 4) for s in (samples.minimum, samples.median, low, high))
        return cls(minimum=least, median=middle, low=low, high=high, rounds=len(samples.seconds), calls=samples.calls)


class Comparison(_Model):
    """Median ratio over rounds and the 95 % interval of that median."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratio: Ratio) -> "Comparison":
        """Four digits are more than the clock can see."""
        return cls(median=round(ratio.median, 4), low=round(ratio.low, 4), high=round(ratio.high, 4))


class Row(_Model):
    """One piece of work, timed with all its candidates in the same rounds.

    section: matrix, chain, model or training. regime: "hot" (the same weights again and again) or "cold" (weights come
    from memory). dtype: of rarefy's values. held_out: a shape that no constant was tuned on. bytes: of the packed
    weight. times: by candidate. ratios: candidate over rarefy, in the same rounds; over the fastest kernel where
    `rarefy` itself was not measured. choice: what pack chose. left_out: candidates without a time, and why.
    """

    section: Literal["matrix", "chain", "model", "training"]
    name: str
    batch: int
    regime: Literal["hot", "cold"]
    dtype: str
    pattern: str
    sparsity: float
    shape: list[int] = []
    held_out: bool = False
    nonzeros: int = 0
    operations: float = 0.0
    bytes: int | None = None
    choice: str | None = None
    times: dict[str, Timing] = {}
    ratios: dict[str, Comparison] = {}
    left_out: dict[str, str] = {}
    facts: dict[str, float | str] = {}

    def kernels(self) -> dict[str, Timing]:
        """Times of this library's sparse kernels, by name."""
        return {name: t for name, t in self.times.items() if name.startswith(KERNEL)}

    def own(self) -> str | None:
        """The candidate that stands for rarefy: pack's choice, else the fastest kernel, else None."""
        if LAYER in self.times:
            return LAYER
        return min(self.kernels(), key=lambda name: self.times[name].median, default=None)

    def fastest(self, *beginnings: str) -> str | None:
        """The fastest candidate by median among those whose names begin so, None where there is none."""
        names = [name for name in self.times if name.startswith(beginnings)]
        return min(names, key=lambda name: self.times[name].median, default=None)


class Goal(_Model):
    """One goal: what is asked, what was measured, met or not (None: not measured), and why not."""

    point: str
    goal: str
    measured: str
    met: bool | None
    reason: str = ""


class Document(_Model):
    """One run of a benchmark."""

    schema_version: Literal[1] = 1
    benchmark: Literal["matrices", "models", "training"]
    quick: bool
    when: str
    settings: dict[str, float | int | str | list[str]]
    environment: Environment
    kernels: str
    machine: Machine
    peers: dict[str, str]
    missing_peers: dict[str, str]
    rows: list[Row] = []
    goals: list[Goal] = []

    def write(self, path: Path) -> None:
        """The whole document or nothing, wherever the process is killed."""
        write_whole(path, (self.model_dump_json(indent=1, exclude_defaults=False) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> "Document":
        """Raises ValueError for a file that is not such a document."""
        return cls.model_validate_json(path.read_text())


def now() -> str:
    """The time of a document, to the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def make_row(row: Row, samples: dict[str, Samples], left_out: dict[str, str]) -> Row:
    """The row with times, and with ratios over what stands for rarefy."""
    times = {name: Timing.of(taken) for name, taken in samples.items()}
    filled = row.model_copy(update={"times": times, "left_out": {**row.left_out, **left_out}})
    own = filled.own()
    if own is None:
        return filled
    ratios = {name: Comparison.of(paired_ratio(taken, samples[own])) for name, taken in samples.items() if name != own}
    return filled.model_copy(update={"ratios": ratios})
