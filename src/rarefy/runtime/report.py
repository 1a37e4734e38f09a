"""What `pack` returns: what was chosen for each layer, from which candidates, and what the whole model gained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class Candidate:
    """One way to run a layer for so many tokens; measured: or predicted by the cost model."""

    way: str
    tokens: int
    seconds: float
    measured: bool


@dataclass(frozen=True)
class Row:
    """One layer. before, after: seconds of all its calls in the examples, by torch as it was and as chosen; bytes of
    its weight likewise. max_error, rms_error: of the weight's values, where they were cast or quantised."""

    name: str
    kind: str
    shape: tuple[int, ...]
    sparsity: float
    pattern: str
    dtype: str
    choice: str
    candidates: tuple[Candidate, ...] = ()
    before: float | None = None
    after: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    max_error: float = 0.0
    rms_error: float = 0.0

    @property
    def speedup(self) -> float | None:
        """before / after; None for a layer that no example reached."""
        return None if not self.before or not self.after else self.before / self.after


@dataclass(frozen=True)
class Whole:
    """The whole model on one example: median seconds dense and packed, and the paired ratio dense / packed."""

    example: int
    dense: float
    packed: float
    ratio: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True)
class PackReport:
    """Print it with rich for the table; `str()` for plain text; `to_dict()` for JSON.

    reverted: the packed model lost against the dense one, which was put back. cold: weights came from memory while
    candidates were measured. plans: modules that run as one call.
    """

    rows: tuple[Row, ...]
    whole: tuple[Whole, ...] = ()
    threads: int = 1
    cold: bool = False
    reverted: bool = False
    plans: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    isa: str | None = None

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: everything, with totals."""
        rows: list[dict[str, Any]] = [
            {**asdict(row), "shape": list(row.shape), "candidates": [asdict(c) for c in row.candidates]}
            | {"speedup": row.speedup}
            for row in self.rows
        ]
        totals = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        told = {
            "threads": self.threads, "cold": self.cold, "reverted": self.reverted, "isa": self.isa,
            "plans": list(self.plans), "notes": list(self.notes),
        }  # fmt: skip
        return {"layers": rows, "whole": [asdict(each) for each in self.whole], "totals": totals, **told}

    def __str__(self) -> str:
        lines = [TITLES, *(cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(TITLES))]
        text = ["  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*text, *self.summary()])

    def summary(self) -> list[str]:
        """The totals, in sentences."""
        lines = [
            f"weights {size(self.bytes_before)} → {size(self.bytes_after)}; {self.threads} "
            f"thread{'s' * (self.threads != 1)}, {self.isa or 'no compiled kernels'}, "
            f"weights {'from memory' if self.cold else 'in the caches'}"
        ]
        for each in self.whole:
            number = f" {each.example + 1}" if len(self.whole) > 1 else ""
            lines.append(
                f"example{number}: dense {duration(each.dense)}, packed {duration(each.packed)}: {each.ratio:.2f}× "
                f"[{each.low:.2f}, {each.high:.2f}] over {each.pairs} pairs"
            )
        if self.reverted:
            lines.append("the packed model was slower: the dense one was put back")
        return [*lines, *self.notes]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        caption = "\n".join(self.summary())
        table = Table(caption=caption, caption_justify="left", box=None, header_style="bold", pad_edge=False)
        for title in TITLES:
            table.add_column(title, justify="left" if title in _LEFT else "right")
        for row in self.rows:
            table.add_row(*cells(row))
        yield table


TITLES = ("layer", "shape", "sparsity", "pattern", "dtype", "choice", "torch", "chosen", "speed-up", "bytes")
_LEFT = {"layer", "pattern", "dtype", "choice"}


def cells(row: Row) -> tuple[str, ...]:
    """The text of a row's columns."""
    speedup = "–" if row.speedup is None else f"{row.speedup:.2f}×"
    shape = "×".join(map(str, row.shape))
    return (
        row.name or "(itself)", shape, f"{row.sparsity:.1%}", row.pattern, row.dtype, row.choice,
        duration(row.before), duration(row.after), speedup, f"{size(row.bytes_before)} → {size(row.bytes_after)}",
    )  # fmt: skip


def duration(seconds: float | None) -> str:
    """In µs or ms.

    >>> duration(0.00123)
    '1.23 ms'
    """
    if seconds is None:
        return "–"
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def size(count: int) -> str:
    """In B, KiB or MiB.

    >>> size(2048)
    '2.0 KiB'
    """
    if count < 1024:
        return f"{count} B"
    return f"{count / 1024:.1f} KiB" if count < 1 << 20 else f"{count / (1 << 20):.1f} MiB"
