"""`python -m rarefy.bench.vision`: the pretrained ResNet-20 pruned by every method, accuracy on CIFAR-10."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.text import Text

from rarefy.bench.cpu.document import now
from rarefy.bench.cpu.grids import markdown, rich_grids
from rarefy.bench.cpu.progress import steps_bar
from rarefy.bench.environment import environment
from rarefy.bench.publish import publish
from rarefy.bench.vision.cases import PATTERNS, Case, cases
from rarefy.bench.vision.runs import Bench, Result, Settings, Store, execute, open_bench
from rarefy.bench.vision.table import Table, compare, grids, sentences

__all__ = ["main", "make", "table"]


def table(
    json: Path = Path("results/pruning-resnet20.json"),
    data: Path | None = None,
    runs: Path = Path("rarefy-vision-runs"),
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    draws: int = 3,
    images: int = 10_000,
    threads: int = 2,
) -> None:
    """Prune the pretrained ResNet-20 by every method and tell its accuracy; continues where it was stopped.

    Args:
        json: the document that is written; the tables go beside it, as Markdown.
        data: the folder that holds cifar10/ and models/resnet_cifar10/, by default RAREFY_DATA.
        runs: a folder with a file for each run.
        quick: 50 % and 2:4, one calibration draw, the first 2,000 test images.
        draws: of 512 training images each.
        images: of the test set, the first so many.
        threads: of the processor.
    """
    error = Console(stderr=True)
    patterns = ("50 %", "2:4") if quick else PATTERNS
    settings = (
        Settings(images=2000, draws=1, threads=threads)
        if quick
        else Settings(images=images, draws=draws, threads=threads)
    )
    torch.set_num_threads(threads)
    try:
        bench = open_bench(_folder(data), settings)
    except (ValueError, OSError, ModuleNotFoundError) as problem:
        error.print(str(problem), markup=False, soft_wrap=True)
        raise SystemExit(1) from None
    store = Store(runs, bench.digest, [])
    found = make(bench, store, patterns)
    for problem in store.problems:
        error.print(problem, markup=False, soft_wrap=True)
    _tell(found, bench, json, quick)


def _folder(data: Path | None) -> Path:
    if data is None and not os.environ.get("RAREFY_DATA"):
        raise ValueError(
            "no data: RAREFY_DATA=DIR (or --data DIR) names a folder with cifar10/*.parquet and models/resnet_cifar10"
        )
    return data or Path(os.environ["RAREFY_DATA"])


def make(bench: Bench, store: Store, patterns: tuple[str, ...]) -> Table:
    """All results: those of the store, and the others made and stored one by one."""
    draws = range(bench.settings.draws)
    wanted = list(cases(patterns))
    results: dict[tuple[str, str], list[Result]] = {}
    with steps_bar((1 + len(wanted)) * len(draws)) as bar:

        def found(case: Case | None, draw: int) -> Result:
            bar.say(f"{'dense' if case is None else f'{case.variant} {case.pattern}'}, draw {draw}")
            result = store.found(case, draw, lambda: execute(bench, case, draw))
            bar.tick(1)
            return result

        dense = [found(None, draw) for draw in draws]
        for case in wanted:
            results[case.variant, case.pattern] = [found(case, draw) for draw in draws]
    return Table(dense, results)


def _tell(found: Table, bench: Bench, path: Path, quick: bool) -> None:
    settings, when = bench.settings, now()
    where = environment(threads=settings.threads, flush_denormal=False)
    shown, said = grids(found), sentences(compare(found))
    total = sum(run.images for run in found.dense)
    dense = 100 * sum((run.as_pruned or 0) * run.images for run in found.dense) / total
    footer = (
        f"The pretrained ResNet-20, {dense:.2f} % dense on {total:,} test images of CIFAR-10. Its convolutions in "
        "repeated blocks are pruned, without training; the first convolution and the head stay. A calibration draw: "
        f"{settings.samples} training images, cropped and flipped as in its training, for batch-norm statistics; the "
        f"methods see the first {settings.solving} of them. {where.processor}, {where.threads} threads, torch "
        f"{where.torch}, rarefy {where.rarefy}, {when}{', quick' if quick else ''}."
    )
    rule = (
        "Differences in points of accuracy, batch norms re-estimated. Resolved: over test images (p < 0.05 after "
        "Holm's correction for all comparisons) and, where there are several, over calibration draws (95 % interval)."
    )
    lines = "\n".join(f"- {sentence}" for sentence in said)
    text = f"# One-shot pruning of convolutions\n\n{footer}\n\n{markdown(shown)}\n{lines}\n\n{rule}\n"
    runs = [*found.dense, *(run for runs in found.results.values() for run in runs)]
    document = {
        "schema_version": 1, "quick": quick, "when": when, "environment": where.model_dump(),
        "settings": vars(settings), "key": bench.digest,
        "results": [run.model_dump(exclude={"correct"}) for run in runs], "sentences": said,
    }  # fmt: skip
    publish(path, document, text, rich_grids(shown), *map(Text, said), Text(f"{rule}\n{footer}", style="dim"))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command in `argv`, by default the process's own."""
    tyro.cli(table, prog="python -m rarefy.bench.vision", args=argv)


if __name__ == "__main__":
    main()
