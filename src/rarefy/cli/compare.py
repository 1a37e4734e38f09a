"""Comparing methods: `rarefy demo | bench | methods | report`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import rich.table
import rich.text
import tyro

from rarefy.bench.files import write_whole
from rarefy.bench.leaderboard import Table, make_tables
from rarefy.bench.lineup import DEMO, known_names, method_class, parse_names
from rarefy.bench.progress import bar
from rarefy.bench.report import write_report
from rarefy.bench.results import CONTROLS, Control, load_results
from rarefy.bench.runner import Outcome, run_all, settings
from rarefy.bench.runs import sweep
from rarefy.bench.speed import Demonstrated, demonstrate
from rarefy.bench.store import Store
from rarefy.bench.tables import markdown, rich_table
from rarefy.bench.tasks import Task, parse_task
from rarefy.bench.words import heading, sentences
from rarefy.cli.output import AsJson, console, print_json

__all__ = ["bench", "demo", "methods", "report"]

_NEXT = """What to try next:
  rarefy bench digits --methods {methods} --sparsities .95,.98 --seeds 5 --controls shuffled,small_dense
  rarefy speed mlp-1024 --sparsity .9     dense against packed on this machine, and what was chosen
  rarefy report {out} -o report.html      accuracy against density and training FLOPs, as a page
  rarefy methods                          all methods, what they need and cost"""


def demo(
    out: Path = Path("rarefy-demo"), seeds: int = 3, steps: int | None = None, threads: int = 1, as_json: AsJson = False
) -> int:
    """Six methods against the baselines on real digits, 95 % of the weights zero: a first look, in about a minute.

    Args:
        out: folder for the results, one file per run; runs that are there already are read.
        seeds: how often each method is run.
        steps: batches per run, instead of the task's 1500.
        threads: of the processor; one is about as fast as two for so small a network.
        as_json: the table as JSON.
    """
    task = parse_task("digits", steps=steps)
    data = task.load(None)
    runs = sweep(task, DEMO, [0.95], seeds, [])
    with settings(threads) as environment, bar() as progress:
        outcome = run_all(runs, Store(out, data, environment), progress)
        table = next(iter(make_tables(outcome.results)), None)
        packed = None if table is None else demonstrate(table, runs, data)
    _show(make_tables(outcome.results), outcome, as_json, packed)
    if not as_json:
        print("\n" + _NEXT.format(methods=",".join(DEMO), out=out))
    return 1 if outcome.failures else 0


def bench(
    task: tyro.conf.Positional[str],
    methods: str = ",".join(DEMO),
    sparsities: str = ".9,.95",
    seeds: int = 5,
    controls: str = "",
    out: Path | None = None,
    data: Path | None = None,
    steps: int | None = None,
    threads: int = 1,
    judge: Literal["test", "validation"] = "test",
    as_json: AsJson = False,
) -> int:
    """Compare methods on a task, at the same budgets, over seeds; stopped at any time, the same command goes on.

    Dense, random, random search and magnitude are in every table.

    Args:
        task: digits, fashion-mnist or fashion-mnist-resnet.
        methods: names, separated by commas; `rarefy methods` lists them.
        sparsities: shares of zeros, separated by commas.
        seeds: how often each is run; the seeds are 0, 1, ...
        controls: of shuffled, reinitialised, extended, small_dense, separated by commas.
        out: folder for the results, one file per run; rarefy-TASK if left out.
        data: folder with FashionMNIST/raw/*.gz; else RAREFY_DATA; else the files are downloaded and checked.
        steps: batches per run, instead of the task's own.
        threads: of the processor.
        judge: "validation" judges on held-out training images and leaves the test images alone: for choosing settings.
        as_json: the tables as JSON.
    """
    shares = [_share(text) for text in sparsities.split(",") if text.strip()]
    chosen: list[Control] = [_control(text.strip()) for text in controls.split(",") if text.strip()]
    value = parse_task(task, steps=steps, judge=judge)
    outcome = _compare(
        value, parse_names(methods), shares, seeds, chosen, out or Path(f"rarefy-{task}"), data, threads, as_json
    )
    return 1 if outcome.failures else 0


def methods(as_json: AsJson = False) -> int:
    """List the methods: when they act, what they need, what they cost beside training, and the paper.

    Args:
        as_json: the list as JSON.
    """
    rows = [_described(name) for name in known_names()]
    if as_json:
        print_json(rows)
        return 0
    grid = rich.table.Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("name", "stage", "needs", "extra cost", "paper"):
        grid.add_column(column)
    for row in rows:
        needs = ", ".join(row["needs"]) or "–"
        grid.add_row(*map(rich.text.Text, (row["name"], row["stage"], needs, row["extra_cost"] or "–", row["paper"])))
    console().print(grid)
    return 0


def report(
    folder: tyro.conf.Positional[Path],
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html"),
    as_json: AsJson = False,
) -> int:
    """Write all results of a folder as one page: HTML that needs no network, or Markdown for a name that ends in .md.

    Args:
        folder: what `rarefy bench --out` wrote.
        output: the page.
        as_json: say as JSON what was written.
    """
    results, problems = load_results(folder)
    for problem in problems:
        sys.stderr.write(f"rarefy: left out: {problem}\n")
    tables = make_tables(results)
    if not tables:
        raise ValueError(f"{folder} holds no result: `rarefy bench digits --out {folder}` makes some")
    if output.suffix == ".md":
        write_whole(output, markdown(tables).encode())
    else:
        write_report(tables, output)
    said = {"report": str(output), "results": len(results), "tables": len(tables), "left_out": problems}
    print_json(said) if as_json else print(f"{output}: {len(tables)} tables of {len(results)} results")
    return 0


# --- the work behind them --------------------------------------------------------------------------------------------


def _compare(
    task: Task,
    names: Sequence[str],
    sparsities: Sequence[float],
    seeds: int,
    controls: Sequence[Control],
    out: Path,
    data: Path | None,
    threads: int,
    as_json: bool,
) -> Outcome:
    runs = sweep(task, names, sparsities, seeds, controls)
    with settings(threads) as environment, bar() as progress:
        outcome = run_all(runs, Store(out, task.load(data), environment), progress)
    _show(make_tables(outcome.results), outcome, as_json)
    return outcome


def _show(tables: Sequence[Table], outcome: Outcome, as_json: bool, packed: Demonstrated | None = None) -> None:
    if as_json:
        listed = [{"heading": heading(t), **t.to_dict(), "sentences": sentences(t)} for t in tables]
        read = len(outcome.results) - outcome.made
        said = {"tables": listed, "made": outcome.made, "read": read, "failures": outcome.failures}
        print_json(said if packed is None else {**said, "packed": packed.to_dict()})
        return
    shown = console()
    for table in tables:
        shown.print(rich_table(table), "")
    if packed is not None:
        shown.print(str(packed), markup=False, highlight=False)
    for failure in outcome.failures:
        shown.print(f"Failed: {failure}", markup=False, highlight=False)


def _described(name: str) -> dict[str, Any]:
    cls = method_class(name)
    return {
        "name": name,
        "class": cls.__name__,
        "stage": cls.stage,
        "needs": sorted(cls.needs),
        "extra_cost": cls.extra_cost,
        "labels": list(cls.labels),
        "paper": cls.paper,
    }


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--sparsities: {text!r} is no number; write shares of zeros, such as .9,.95") from None


def _control(text: str) -> Control:
    for control in CONTROLS:
        if text.replace("-", "_") == control:
            return control
    raise ValueError(f"--controls: no control is named {text!r}; there are {', '.join(CONTROLS)}")
