"""The JSON document of the pruning benchmark, and what its rows say of the goals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from rarefy.bench.cpu.document import Goal
from rarefy.bench.cpu.grids import Grid, digits
from rarefy.bench.environment import Environment
from rarefy.bench.files import write_whole

__all__ = ["Document", "Masks", "Row", "block_goals", "block_grid", "footer", "mask_grid", "read_document"]

TIE = 1e-6
MOST = {"solver": {"Wanda": 0.5, "SparseGPT": 0.5}, "whole": {"Wanda": 1.0, "SparseGPT": 0.85}, "memory": 0.6}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Masks(_Model):
    """How rarefy's masks differ from the reference's; see `compare_masks`."""

    dtype: str
    width: int
    different: int
    of: int
    wrong: int
    gap: float

    @property
    def equal(self) -> bool:
        """But for ties."""
        return self.gap <= TIE


class Row(_Model):
    """A method on a block. Seconds by side, one a round, both sides in each; peak: bytes by side."""

    width: int
    tokens: int
    method: str
    sparsity: float
    dtype: str
    solver: dict[str, list[float]]
    whole: dict[str, list[float]]
    peak: dict[str, int]
    masks: list[Masks]

    @property
    def key(self) -> tuple[int, int, str, str, float]:
        """What was measured."""
        return self.width, self.tokens, self.dtype, self.method, self.sparsity

    def ratio(self, what: str) -> float:
        """rarefy over the reference: the median over rounds."""
        both = self.solver if what == "solver" else self.whole
        return median(a / b for a, b in zip(both["rarefy"], both["reference"], strict=True))

    @property
    def memory(self) -> float:
        """rarefy's peak over the reference's."""
        return self.peak["rarefy"] / self.peak["reference"]


class Document(_Model):
    """The benchmark's rows, of one run or of several (see `read_document`). when: the last of them."""

    schema_version: Literal[2] = 2
    quick: bool
    when: str
    environment: Environment
    rows: list[Row] = []
    goals: list[Goal] = []

    def write(self, path: Path) -> None:
        """The whole document or nothing."""
        write_whole(path, (self.model_dump_json(indent=1) + "\n").encode())

    def put(self, row: Row) -> None:
        """Add a row, in the place of an earlier one of the same block and method; the least wide come first."""
        if any(each.key == row.key for each in self.rows):
            self.rows = [row if each.key == row.key else each for each in self.rows]
        else:
            self.rows = sorted([*self.rows, row], key=lambda each: (each.width, each.tokens))
        self.goals = block_goals(self.rows)


def read_document(path: Path, fresh: Document) -> Document:
    """What an earlier run for other blocks wrote to `path`, brought up to date; `fresh` where there is none, or one of
    other code, another machine or other settings."""
    try:
        found = Document.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return fresh
    if (found.quick, found.environment.decisive()) != (fresh.quick, fresh.environment.decisive()):
        return fresh
    return found.model_copy(update={"when": fresh.when})


def footer(document: Document) -> str:
    """Under which conditions the figures were taken, and what they mean."""
    where = document.environment
    rounds = " or ".join(map(str, sorted({len(row.whole["rarefy"]) for row in document.rows})))
    return (
        f"{where.processor}, {where.threads} threads, torch {where.torch}, rarefy {where.rarefy}; "
        f"{rounds} rounds, both sides in turn, {document.when}{', quick' if document.quick else ''}. One "
        "Llama block (random weights, four query heads a key head), both sides in the same dtype on the same "
        "sequences, each on a copy of its own. Solver: from the end of the first run of all sequences to the "
        "beginning of the second; whole block: both runs and it. Times are medians (least) of rounds, ratios medians "
        "of ratios. Memory: the high-water mark of the resident set (VmHWM, set back by clear_refs) over what is "
        "resident with the model alone, in a process for each side; activations count. The goals are meant for widths "
        "from 1024 on."
    )


def block_grid(rows: Sequence[Row]) -> Grid:
    """Seconds, bytes and ratios."""
    columns = (
        "block", "method", "rounds", "solver s: reference", "rarefy", "ratio", "whole block s: reference", "rarefy",
        "ratio", "peak MB: reference", "rarefy", "ratio",
    )  # fmt: skip
    return Grid("Pruning one block", columns, tuple(tuple(_cells(row)) for row in rows), left=2)


def _cells(row: Row) -> Iterator[str]:
    yield f"{row.width}, {row.tokens // 1024}k tokens, {row.dtype}"
    yield f"{row.method} {100 * row.sparsity:g} %"
    yield f"{len(row.whole['rarefy'])}"
    for what, both in (("solver", row.solver), ("whole", row.whole)):
        for side in ("reference", "rarefy"):
            yield f"{digits(median(both[side]))} ({digits(min(both[side]))})"
        yield f"{row.ratio(what):.2f}"
    for side in ("reference", "rarefy"):
        yield digits(row.peak[side] / 1e6)
    yield f"{row.memory:.2f}"


def mask_grid(rows: Sequence[Row]) -> Grid:
    """Entries in which masks differ."""
    cells = tuple(
        (f"{m.width}, {m.dtype}", row.method, f"{m.different:,} of {m.of:,}", f"{m.wrong:,}", f"{m.gap:.1e}")
        for row in rows
        for m in row.masks
    )
    note = (
        "Beyond the bound: entries of rarefy's mask on the other side of the bound between kept and dropped, by the "
        "reference's scores after the same earlier choices; gap: the largest relative distance from it. A choice that "
        "differs at one near tie moves all weights of its row after it, so more entries can differ than lie beyond."
    )
    return Grid("Masks", ("block", "method", "different", "beyond the bound", "gap"), cells, left=2, note=note)


def block_goals(rows: Sequence[Row]) -> list[Goal]:
    """Each goal of each row, met or not."""
    return [goal for row in rows for goal in _goals(row)]


def _goals(row: Row) -> Iterator[Goal]:
    where = f"{row.method} {row.width}"
    for what, words in (("solver", "solver without forward"), ("whole", "whole block")):
        most, found = MOST[what][row.method], row.ratio(what)
        yield Goal(point=f"{where} {what}", goal=f"{words} ≤ {most}×", measured=f"{found:.2f}×", met=found <= most)
    found = row.memory
    words = f"peak memory ≤ {MOST['memory']}×"
    yield Goal(point=f"{where} memory", goal=words, measured=f"{found:.2f}×", met=found <= MOST["memory"])
    for masks in row.masks:
        yield Goal(
            point=f"{row.method} {masks.width} masks {masks.dtype}",
            goal="masks equal but for ties within 1e-6",
            measured=f"{masks.different} of {masks.of} differ, gap {masks.gap:.1e}",
            met=masks.equal,
            reason="" if masks.equal or masks.dtype == "float64" else _ROUNDING,
        )


_ROUNDING = "near ties are decided by the rounding of H and of its factors in float32; see the row in float64"
