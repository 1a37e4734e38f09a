"""`python -m rarefy.bench.decoding MODEL_DIR`: the decode table, and what each of its settings costs in perplexity."""

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from rarefy.bench.cpu.document import now
from rarefy.bench.cpu.grids import markdown, rich_grids
from rarefy.bench.cpu.machine import pin
from rarefy.bench.cpu.peers.environments import peers
from rarefy.bench.cpu.progress import steps_bar
from rarefy.bench.decoding.cost import costs, judged_bench
from rarefy.bench.decoding.runs import ZEROS, Decode, measure_all, steps
from rarefy.bench.decoding.shape import Shape
from rarefy.bench.decoding.table import decode_grid
from rarefy.bench.environment import environment
from rarefy.bench.language.corpus import standard_library
from rarefy.bench.language.runs import Bench
from rarefy.bench.publish import publish
from rarefy.core import native

__all__ = ["main", "table"]

SMALL = Shape(vocabulary=512, width=256, inner=512, depth=2, heads=8, shared=2)


def table(
    model_dir: Annotated[Path | None, tyro.conf.Positional] = None,
    json: Path = Path("results/decode.json"),
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    rounds: int = 5,
    threads: int = 2,
) -> None:
    """Time decoding of a Llama of 1.1 thousand million parameters, and judge the trained small model at each setting.

    Args:
        model_dir: the trained model, as `python -m rarefy.bench.language train` writes it; without it, no perplexity.
        json: the document that is written; the table goes beside it, as Markdown.
        quick: a small shape, less text: whether everything runs.
        rounds: of each measurement.
        threads: of every candidate.
    """
    torch.set_num_threads(threads)
    try:
        bench = None if model_dir is None else judged_bench(model_dir, standard_library(), threads=threads, quick=quick)
    except (ValueError, OSError) as problem:
        Console(stderr=True).print(str(problem), markup=False, soft_wrap=True)
        raise SystemExit(1) from None
    pin(threads)
    plan = Decode(SMALL if quick else Shape(), rounds=rounds, threads=threads)
    found = peers()
    with warnings.catch_warnings(), _own_cache(), steps_bar(steps(plan) + 3 * (bench is not None)) as bar:
        warnings.simplefilter("ignore")  # of other libraries' OpenMP in this process: peers are here on purpose

        def say(text: str) -> None:
            bar.say(text)
            bar.tick(1)

        settings, llama, reasons = measure_all(plan, found, say)
        cost = {} if bench is None else _costs(bench, say)
    grid = decode_grid(settings, llama, cost, "A small Llama" if quick else "Llama 1.1 B")
    where = environment(threads=threads, flush_denormal=False)
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items() if "llama" in name)
    footer = (
        f"A Llama of transformers, {_parameters(plan.shape) / 1e9:.2f} thousand million parameters, random weights "
        f"with zeros in exact numbers, {plan.prompt} tokens before, {plan.tokens} generated, {plan.rounds} rounds. "
        f"{where.processor}, {threads} threads, torch {where.torch}, {versions or 'no llama.cpp'}, rarefy "
        f"{where.rarefy} (kernels {native.status().isa or native.status().reason}), "
        f"{now()}{', quick' if quick else ''}."
    )
    document = {
        "schema_version": 1, "quick": quick, "when": now(), "environment": where.model_dump(),
        "settings": [each.model_dump() for each in settings], "llama": llama, "left_out": reasons, "perplexity": cost,
        "prompt": plan.prompt, "tokens": plan.tokens, "shape": vars(plan.shape), "peers": found.versions,
    }  # fmt: skip
    text = f"# Decoding with a sparse language model\n\n{footer}\n\n{markdown([grid])}"
    publish(json, document, text, rich_grids([grid]), footer, width=200)


def _costs(bench: Bench, say: Callable[[str], object]) -> dict[str, tuple[float, float | None, float | None]]:
    """By "values sparsity"."""
    found: dict[str, tuple[float, float | None, float | None]] = {}
    for sparsity in (0.0, *(zeros.sparsity for zeros in ZEROS if zeros.pattern == "unstructured")):
        say(f"perplexity at {100 * sparsity:g} %")
        for values, each in costs(bench, sparsity).items():
            found[f"{values} {sparsity}"] = (each.value, each.low, each.high)
    return found


@contextmanager
def _own_cache() -> Iterator[None]:
    """What pack has measured before, perhaps on a busy machine, decides nothing here."""
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["XDG_CACHE_HOME"]
            else:
                os.environ["XDG_CACHE_HOME"] = before


def _parameters(s: Shape) -> int:
    keys = s.shared * s.width // s.heads
    block = 2 * s.width * s.width + 2 * keys * s.width + 3 * s.inner * s.width + 2 * s.width
    return s.depth * block + 2 * s.vocabulary * s.width + s.width


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command in `argv`, by default the process's own."""
    tyro.cli(table, prog="python -m rarefy.bench.decoding", args=argv)


if __name__ == "__main__":
    main()
