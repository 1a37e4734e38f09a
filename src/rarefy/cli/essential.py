"""`rarefy essential`: how much of a model directory can be removed at once before its perplexity turns up."""

from pathlib import Path
from typing import Annotated, Any

import rich.text
import tyro

from rarefy.bench.essential import write_essential
from rarefy.bench.perplexity import perplexity, read_windows
from rarefy.bench.progress import tracked
from rarefy.cli.output import AsJson, console, grid, print_json
from rarefy.cli.quiet import quiet
from rarefy.cli.recipe import make_recipe
from rarefy.io.calibration import default_length, windows
from rarefy.io.directory import read_model
from rarefy.io.pretrained import context_length, read_config, read_tokenizer
from rarefy.io.prune import chosen_sites
from rarefy.methods.iterative.essential_sparsity import Essential, EssentialSparsity, Point

__all__ = ["essential"]

_GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def essential(
    model_dir: tyro.conf.Positional[Path],
    text: Path,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("essential.html"),
    methods: tuple[str, ...] = ("magnitude",),
    grid: tuple[float, ...] = _GRID,
    tolerance: float = 0.01,
    calibration: Path | None = None,
    samples: int = 64,
    length: int | None = None,
    windows: int | None = 64,
    allocation: str | None = None,
    refit: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    seed: int = 0,
    as_json: AsJson = False,
) -> int:
    """Prune a language model to more and more zeros, without training, and plot its perplexity: where is the knee?

    Args:
        model_dir: the directory of the model; it is only read.
        text: what to predict, as for rarefy eval.
        out: the page with the plot.
        methods: one curve each, such as magnitude, wanda, sparsegpt.
        grid: shares of zeros, ascending from 0.
        tolerance: how much worse is still well, as a share of the dense perplexity.
        calibration: text for methods that look at activations.
        samples: windows of calibration text.
        length: tokens in a window; by default the model's context, 2048 at most.
        windows: of the text, at most.
        allocation: how many weights each layer keeps.
        refit: recompute the kept weights by least squares.
        seed: of the positions of the calibration windows.
        as_json: the points as JSON.
    """
    sweeps = {
        name: EssentialSparsity(
            make_recipe(
                name, sparsity=0.5, pattern="unstructured", allocation=allocation or "uniform", refit=refit
            ), grid=grid, tolerance=tolerance, better="lower",
        )
        for name in methods
    }  # fmt: skip
    with quiet():
        found = _swept(model_dir, text, sweeps, calibration, samples, length, windows, seed)
    title = f"Essential sparsity of {model_dir.resolve().name} on {text.name}"
    write_essential(found, out, "perplexity per token", title, log=True)
    if as_json:
        print_json(
            {"model": str(model_dir), "text": text.name, **{name: each.to_dict() for name, each in found.items()}}
        )
    else:
        _show(found, title, out)
    return 0


def _swept(
    model_dir: Path, text: Path, sweeps: dict[str, EssentialSparsity], calibration: Path | None, samples: int,
    length: int | None, count: int | None, seed: int,
) -> dict[str, Essential]:  # fmt: skip
    config = read_config(model_dir)
    tokenizer, long = read_tokenizer(model_dir), length or default_length(context_length(config))
    judged = read_windows(text, tokenizer, long, count=count)
    data: Any = None
    if any("data" in each.method.needs for each in sweeps.values()):
        if calibration is None:
            raise ValueError("--calibration: a method that looks at activations needs text of its own, not --text's")
        data = windows(calibration, tokenizer, long, samples, seed).batches
    model = read_model(model_dir)
    names = chosen_sites(model)
    found: dict[str, Essential] = {}
    with tracked("pruning and evaluating") as progress:
        total = sum(len(each.grid) for each in sweeps.values())
        for name, sweep in sweeps.items():
            told: list[Point] = []

            def tell(point: Point, name: str = name, told: list[Point] = told) -> None:
                told.append(point)
                done = sum(len(each.points) for each in found.values()) + len(told)
                progress(done, total, f"{name}, {100 * point.sparsity:g} %")

            found[name] = sweep.run(
                model, lambda pruned: perplexity(pruned, judged.windows).value, data=data, only=names, seed=seed,
                progress=tell,
            )  # fmt: skip
    return found


def _show(found: dict[str, Essential], title: str, out: Path) -> None:
    shown = console()
    shown.print(rich.text.Text(title, style="bold"))
    names = list(found)
    rows: list[tuple[str, ...]] = [
        (f"{100 * points[0].sparsity:g} %", *(f"{point.metric:.2f}" for point in points))
        for points in zip(*(found[name].points for name in names), strict=True)
    ]
    rows.append(("still well up to", *(f"{100 * found[name].tolerated:g} %" for name in names)))
    rows.append(("knee", *(f"{100 * found[name].knee:g} %" for name in names)))
    shown.print(grid(("zeros", *names), rows))
    shown.print(f"\nThe plot: {out}.", markup=False, highlight=False)
