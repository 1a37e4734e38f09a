"""`python -m rarefy.bench.cpu {matrices,models,training,peers}`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from rarefy.bench.cpu import goals, matrix_tables
from rarefy.bench.cpu.accuracy import int8_goals
from rarefy.bench.cpu.cases import DTYPES, cells, parse_shape
from rarefy.bench.cpu.chains import chains, measure_chain
from rarefy.bench.cpu.context import open_context
from rarefy.bench.cpu.document import Document
from rarefy.bench.cpu.grids import Grid, goal_grid, left_out, markdown, rich_grids
from rarefy.bench.cpu.matrices import measure_cell
from rarefy.bench.cpu.model_cases import model_cases
from rarefy.bench.cpu.model_tables import model_grids
from rarefy.bench.cpu.models import measure_model
from rarefy.bench.cpu.peers.environments import folder, install
from rarefy.bench.cpu.progress import steps_bar
from rarefy.bench.cpu.runs import begin, finish, plan
from rarefy.bench.cpu.training import measure_training, training_cases, training_grid

__all__ = ["main", "matrices", "models", "peers", "training"]

Quick = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Shown = Literal["goals", "all"]


def matrices(
    json: Path = Path("results/cpu-matrices.json"),
    quick: Quick = False,
    threads: int = 2,
    shapes: tuple[str, ...] = (),
    batches: tuple[int, ...] = (),
    dtypes: tuple[str, ...] = DTYPES,
    chains_too: bool = True,
    show: Shown = "all",
) -> None:
    """Single matrices: sparse against dense and against other libraries.

    Args:
        json: the document that is written; the tables go beside it, as Markdown.
        quick: fewer shapes and rounds, a few minutes.
        threads: of every candidate.
        shapes: only these, out x in, as in 1024x1024.
        batches: only these.
        dtypes: of rarefy's values: fp32, bf16, int8.
        chains_too: four layers in a row, against DeepSparse.
        show: all tables, or the goals alone.
    """
    chosen = cells(quick=quick, shapes=[parse_shape(text) for text in shapes], batches=batches, dtypes=dtypes)
    more = chains(quick=quick) if chains_too else []
    settings = {
        "threads": threads,
        "shapes": list(shapes),
        "batches": [str(b) for b in batches],
        "dtypes": list(dtypes),
    }
    document, found = begin("matrices", threads, quick, settings)
    with (
        steps_bar(sum(len(cell.zeros) for cell in chosen) + len(more)) as bar,
        open_context(threads, plan(quick), document.machine, found, bar.say) as context,
    ):
        for cell in chosen:
            for row in measure_cell(cell, context):
                document.rows.append(row)
                bar.tick(1)
            document.write(json)  # hours of work are not lost with the last row
        for chain in more:
            document.rows.append(measure_chain(chain, context))
            bar.tick(1)
    document.goals = goals.matrix_goals(document.rows)
    tables = [*matrix_tables.matrix_grids(document.rows), matrix_tables.chain_grid(document.rows)]
    _end(document, json, tables, show)


def models(
    json: Path = Path("results/cpu-models.json"),
    quick: Quick = False,
    threads: int = 2,
    only: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = DTYPES,
    show: Shown = "all",
) -> None:
    """Whole networks: dense against packed and against other libraries.

    Args:
        json: the document that is written; the tables go beside it, as Markdown.
        quick: fewer networks, zeros and rounds, a few minutes.
        threads: of every candidate.
        only: networks whose names begin so: mobilenet, resnet, bert, llama.
        dtypes: of rarefy's values: fp32, bf16, int8.
        show: all tables, or the goals alone.
    """
    chosen = model_cases(quick=quick, only=only, dtypes=dtypes)
    document, found = begin("models", threads, quick, {"threads": threads, "only": list(only), "dtypes": list(dtypes)})
    with (
        steps_bar(sum(len(case.zeros) for case in chosen)) as bar,
        open_context(threads, plan(quick), document.machine, found, bar.say) as context,
    ):
        for case in chosen:
            for row in measure_model(case, context):
                document.rows.append(row)
                bar.tick(1)
            document.write(json)
    document.goals = int8_goals()
    _end(document, json, list(model_grids(document.rows)), show)


def training(
    json: Path = Path("results/cpu-training.json"), quick: Quick = False, threads: int = 2, show: Shown = "all"
) -> None:
    """Steps of training: dense, sparseprop, and truly sparse.

    Args:
        json: the document that is written; the tables go beside it, as Markdown.
        quick: fewer sparsities and rounds.
        threads: of every candidate.
        show: all tables, or the goals alone.
    """
    cases = training_cases(quick=quick)
    document, found = begin("training", threads, quick, {"threads": threads})
    with (
        steps_bar(len(cases)) as bar,
        open_context(threads, plan(quick), document.machine, found, bar.say) as context,
    ):
        for case in cases:
            document.rows.append(measure_training(case, context))
            bar.tick(1)
    document.goals = goals.training_goals(document.rows)
    _end(document, json, [training_grid(document.rows)], show)


def peers(
    do: Annotated[Literal["install"], tyro.conf.Positional], where: Annotated[Path | None, tyro.conf.Positional] = None
) -> None:
    """Install what rarefy is compared with, in environments of its own; takes minutes, llama.cpp is compiled.

    Args:
        do: install.
        where: the folder, by default RAREFY_PEERS, else .peers.
    """
    console = Console(stderr=True)
    target = where or folder()
    problems = install(target, say=lambda text: console.print(text, markup=False))
    for problem in problems:
        console.print(problem, markup=False, soft_wrap=True)
    console.print(f"Set RAREFY_PEERS={target.resolve()} for the benchmarks to find them.", markup=False, soft_wrap=True)
    if problems:
        raise SystemExit(1)


def _end(document: Document, json: Path, tables: Sequence[Grid], show: Shown) -> None:
    judged = [goal_grid(document.goals)] if document.goals else []
    everything = [*judged, *tables, left_out(document.rows)]
    finish(document, json, markdown(everything))
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(rich_grids(everything if show == "all" or not judged else judged))
    console.print(f"Written to {json} and {json.with_suffix('.md')}.", markup=False, highlight=False)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command in `argv`, by default the process's own."""
    commands = {"matrices": matrices, "models": models, "training": training, "peers": peers}
    tyro.extras.subcommand_cli_from_dict(
        commands, prog="python -m rarefy.bench.cpu", description="Speed on the processor, measured.", args=argv
    )


if __name__ == "__main__":
    main()
