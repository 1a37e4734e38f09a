"""`python -m rarefy.bench.language {train,table,corpus}`: the language model that pruning is judged on."""

import json as jsonlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.text import Text

from rarefy.bench.cpu.document import now
from rarefy.bench.cpu.grids import markdown, rich_grids
from rarefy.bench.cpu.progress import steps_bar
from rarefy.bench.environment import environment
from rarefy.bench.language.cases import PATTERNS, QUICK_PATTERNS, cases
from rarefy.bench.language.corpus import HELD_OUT, standard_library
from rarefy.bench.language.runs import Bench, Result, Settings, Store, execute, open_bench
from rarefy.bench.language.table import Table, compare, grid, sentences
from rarefy.bench.language.train import Recipe
from rarefy.bench.language.train import train as run
from rarefy.bench.progress import tracked, without_bars
from rarefy.bench.publish import publish


def train(out: tyro.conf.Positional[Path], minutes: float = 50.0, threads: int = 2) -> None:
    """Train the model on the standard library's source and write it to OUT.

    Args:
        out: a folder that is not there yet, or empty.
        minutes: how long to train.
        threads: of the processor.
    """
    import torch

    torch.set_num_threads(threads)
    with tracked("training") as progress:
        said = run(standard_library(), out, Recipe(minutes=minutes), progress)
    print(jsonlib.dumps(said, indent=1))  # noqa: T201


def table(
    model_dir: tyro.conf.Positional[Path],
    json: Path = Path("results/pruning-language.json"),
    runs: Path | None = None,
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    seeds: int = 3,
    length: int = 256,
    threads: int = 2,
) -> None:
    """Prune the model of a directory by every method and tell the perplexities; continues where it was stopped.

    Args:
        model_dir: as `train` writes it, or any transformers directory of a causal language model.
        json: the document that is written; the table goes beside it, as Markdown.
        runs: a folder with a file for each run, by default rarefy-language-runs.
        quick: 50 % and 2:4, one calibration draw, fewer windows.
        seeds: calibration draws.
        length: tokens of a window.
        threads: of the processor.
    """
    import torch

    torch.set_num_threads(threads)
    settings = Settings(length=length, seeds=seeds, threads=threads)
    if quick:
        settings = Settings(length=length, seeds=1, threads=threads, samples=8, windows=32, characters=2_000_000)
    error = Console(stderr=True)
    corpus = standard_library()
    try:
        bench = open_bench(model_dir, corpus, settings)
    except (ValueError, OSError) as problem:
        error.print(str(problem), markup=False, soft_wrap=True)
        raise SystemExit(1) from None
    store = Store(runs or Path("rarefy-language-runs"), bench.digest, [])
    found = make(bench, store, QUICK_PATTERNS if quick else PATTERNS)
    for problem in store.problems:
        error.print(problem, markup=False, soft_wrap=True)
    _tell(found, bench, corpus.digest(), json, quick)


def make(bench: Bench, store: Store, patterns: tuple[str, ...]) -> Table:
    """All results: those of the store, and the others made and stored one by one."""
    wanted = [(case, seed) for case in cases(patterns) for seed in case.seeds(bench.settings.seeds)]
    by_run: dict[tuple[str, str], list[Result]] = {}
    with without_bars(), steps_bar(1 + len(wanted)) as bar:
        bar.say("dense")
        dense = store.found(None, 0, lambda: execute(bench, None, 0))
        bar.tick(1)
        for case, seed in wanted:
            bar.say(f"{case.variant} {case.pattern}, draw {seed}")
            result = store.found(case, seed, lambda case=case, seed=seed: execute(bench, case, seed))
            by_run.setdefault((case.variant, case.pattern), []).append(result)
            bar.tick(1)
    return Table(dense, by_run)


def _tell(found: Table, bench: Bench, corpus: str, path: Path, quick: bool) -> None:
    where = environment(threads=bench.settings.threads, flush_denormal=False)
    shown, said = grid(found), sentences(compare(found))
    settings = bench.settings
    footer = (
        f"{_trained(bench.folder)} on the standard library of Python {where.python}; held out: {', '.join(HELD_OUT)}. "
        f"Calibration: {settings.samples} windows of {settings.length} tokens from the training part; judged on "
        f"{len(bench.judged)} windows of {settings.length} tokens without overlap. {where.processor}, "
        f"{where.threads} threads, torch {where.torch}, rarefy {where.rarefy}, {now()}{', quick' if quick else ''}."
    )
    rule = (
        "Resolved: over windows (p < 0.05 after Holm's correction for all comparisons) and, where there are several, "
        "over calibration draws (95 % interval). Percentages are changes of the perplexity. With a "
        "single draw nothing is known of other calibration text."
    )
    lines = "\n".join(f"- {sentence}" for sentence in said)
    text = f"# Pruning a small language model\n\n{footer}\n\n{markdown([shown])}\n{lines}\n\n{rule}\n"
    document = {
        "schema_version": 1, "quick": quick, "when": now(), "environment": where.model_dump(), "corpus": corpus,
        "key": bench.digest, "dense": found.dense.model_dump(),
        "results": [run.model_dump() for runs in found.results.values() for run in runs], "sentences": said,
    }  # fmt: skip
    publish(path, document, text, rich_grids([shown]), *map(Text, said), Text(f"{rule}\n{footer}", style="dim"))


def _trained(folder: Path) -> str:
    """The model's name, and how long it was trained where `train` has made it."""
    path = folder / "training.json"
    if not path.is_file():
        return folder.name
    said = jsonlib.loads(path.read_text())
    return (
        f"{folder.name} ({said['parameters'] / 1e6:.1f} million parameters, trained for {said['seconds'] / 60:.0f} "
        f"minutes: {said['steps']:,} steps, {said['tokens'] / 1e6:.1f} million tokens)"
    )


def corpus() -> None:
    """The sha256 of the text that this machine has."""
    print(standard_library().digest())  # noqa: T201


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command in `argv`, by default the process's own."""
    commands = {"train": train, "table": table, "corpus": corpus}
    tyro.extras.subcommand_cli_from_dict(
        commands, prog="python -m rarefy.bench.language", description="Pruning judged on real text.", args=argv
    )


if __name__ == "__main__":
    main()
