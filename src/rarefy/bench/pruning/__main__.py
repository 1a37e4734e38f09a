"""`python -m rarefy.bench.pruning block`: seconds and memory of pruning a block, beside straightforward code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from rarefy.bench.cpu.document import now
from rarefy.bench.cpu.grids import goal_grid, markdown, rich_grids
from rarefy.bench.cpu.machine import pin
from rarefy.bench.cpu.progress import Steps, steps_bar
from rarefy.bench.environment import environment
from rarefy.bench.files import write_whole
from rarefy.bench.pruning.blocks import FULL, QUICK, Model, Shape, make
from rarefy.bench.pruning.document import Document, Masks, Row, block_grid, footer, mask_grid, read_document
from rarefy.bench.pruning.sides import METHODS, SIDES, Method, Pruned, compare_masks, peak, run_side

__all__ = ["block", "main"]

SPARSITY = 0.5


def block(
    json: Path = Path("results/prune-blocks.json"),
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    rounds: int = 3,
    threads: int = 2,
    widths: tuple[int, ...] = (),
    tokens: int | None = None,
) -> None:
    """Llama-shaped blocks pruned by Wanda and SparseGPT: rarefy beside straightforward implementations.

    Args:
        json: the document that is written; the tables go beside it, as Markdown. Other blocks that it has already,
            by this code on this machine, stay.
        quick: small blocks, a minute.
        rounds: of timing, in each both sides, in turn.
        threads: of both sides.
        widths: only these.
        tokens: to calibrate with, a multiple of 2048; default: 64k, and 16k for a width of 4096.
    """
    pin(threads)
    shapes = [s for s in (QUICK if quick else FULL) if not widths or s.width in widths]
    if not shapes:
        known = ", ".join(str(s.width) for s in (QUICK if quick else FULL))
        raise SystemExit(f"--widths {' '.join(map(str, widths))}: there are blocks of {known}")
    if tokens is not None:
        if tokens % 2048 or tokens < 2048:
            raise SystemExit(f"--tokens {tokens}: whole sequences of 2048, such as {max(1, tokens // 2048) * 2048}")
        shapes = [replace(shape, tokens=tokens) for shape in shapes]
    where = environment(threads=threads, flush_denormal=False)
    document = read_document(json, Document(quick=quick, when=now(), environment=where))
    with steps_bar(sum(_work(shape, rounds) for shape in shapes)) as bar:
        for shape in shapes:
            model, batches = make(shape)
            for method in METHODS:
                document.put(_measure(shape, method, model, batches, rounds, threads, quick, bar))
                _write(document, json)  # an hour of work is not lost with the last row
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(rich_grids([block_grid(document.rows), mask_grid(document.rows), goal_grid(document.goals)]))
    console.print(footer(document), markup=False, style="dim")
    console.print(f"Written to {json} and {json.with_suffix('.md')}.", markup=False, highlight=False)


def _cost(shape: Shape) -> int:
    """Of one run of one side, in units that grow about as its time does."""
    return max(1, shape.tokens * shape.width**2 >> 30)


def _work(shape: Shape, rounds: int) -> int:
    return len(METHODS) * len(SIDES) * _cost(shape) * (rounds + 1)


def _measure(
    shape: Shape, method: Method, model: Model, batches: Sequence[torch.Tensor], rounds: int, threads: int,
    quick: bool, bar: Steps,
) -> Row:  # fmt: skip
    solver: dict[str, list[float]] = {side: [] for side in SIDES}
    whole: dict[str, list[float]] = {side: [] for side in SIDES}
    last: dict[str, Pruned] = {}
    for index in range(rounds):
        for side in SIDES if index % 2 == 0 else SIDES[::-1]:
            bar.say(f"{method} {shape}: {side}, round {index + 1} of {rounds}")
            last.pop(side, None)
            last[side] = run_side(side, model, batches, method, SPARSITY)
            solver[side].append(last[side].cost.solver)
            whole[side].append(last[side].cost.whole)
            bar.tick(_cost(shape))
    bar.say(f"{method} {shape}: masks")
    masks = [_masks(shape.width, model, last, method)]
    last.clear()
    if shape.width in (QUICK[0].width, FULL[0].width):
        small = QUICK[0] if quick else QUICK[1]
        exact, few = make(small, torch.float64)
        sides = {side: run_side(side, exact, few, method, SPARSITY) for side in SIDES}
        masks.append(_masks(small.width, exact, sides, method))
    found = {}
    for side in SIDES:
        bar.say(f"{method} {shape}: memory of {side}")
        found[side] = peak(shape, method, side, SPARSITY, threads)
        bar.tick(_cost(shape))
    return Row(
        width=shape.width, tokens=shape.tokens, method=method, sparsity=SPARSITY, dtype="float32", solver=solver,
        whole=whole, peak=found, masks=masks,
    )  # fmt: skip


def _masks(width: int, model: Model, sides: dict[str, Pruned], method: Method) -> Masks:
    found = compare_masks(model, sides, method, SPARSITY)
    dtype = str(next(model.block.parameters()).dtype).removeprefix("torch.")
    return Masks.model_validate({"dtype": dtype, "width": width, **found})


def _write(document: Document, path: Path) -> None:
    document.write(path)
    grids = [goal_grid(document.goals), block_grid(document.rows), mask_grid(document.rows)]
    text = f"# Pruning a block\n\n{footer(document)}\n\n{markdown(grids)}\n"
    write_whole(path.with_suffix(".md"), text.encode())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command in `argv`, by default the process's own."""
    tyro.extras.subcommand_cli_from_dict(
        {"block": block}, prog="python -m rarefy.bench.pruning", description="What pruning costs.", args=argv
    )


if __name__ == "__main__":
    main()
