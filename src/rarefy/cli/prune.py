"""`rarefy prune`: a model directory made sparse, without training."""

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import rich.text
import torch
import tyro

from rarefy.bench.memory import high_water
from rarefy.bench.progress import tracked
from rarefy.bench.words import grouped
from rarefy.cli.output import AsJson, console, grid, print_json, share
from rarefy.cli.quiet import quiet
from rarefy.cli.recipe import make_recipe, per_layer
from rarefy.io.calibration import SAMPLES
from rarefy.io.prune import prune as prune_directory
from rarefy.io.pruned import Pruned

__all__ = ["prune"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def prune(
    model_dir: tyro.conf.Positional[Path],
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    method: str = "wanda",
    sparsity: float | None = None,
    pattern: str = "unstructured",
    calibration: Path | None = None,
    allocation: str | None = None,
    attention: float | None = None,
    mlp: float | None = None,
    per_layer: str | None = None,
    refit: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    packed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    only: tuple[str, ...] = (),
    skip: tuple[str, ...] = (),
    samples: int = SAMPLES,
    length: int | None = None,
    seed: int = 0,
    field: str | None = None,
    bos: Literal["window", "none"] = "window",
    dtype: Literal["float32", "bfloat16"] | None = None,
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    as_json: AsJson = False,
) -> int:
    """Prune a pretrained model, without training: any directory that transformers loads, to one that it loads too.

    Weights in the repeated blocks are pruned; embeddings, norms and the head stay, unless --only names them.

    Args:
        model_dir: the directory of the model; it is only read.
        out: a new folder for the pruned model; it appears when it is complete.
        method: such as magnitude, wanda, sparsegpt; wanda+dsnot refines the mask of the one by the other.
        sparsity: share of zeros; not needed for n:m patterns.
        pattern: unstructured, 2:4 (2 kept of 4 inputs) and every n:m, 4x1 and other blocks.
        calibration: text for methods that look at activations: plain, .jsonl or .parquet. Kept apart from what is
            evaluated on.
        allocation: how many weights each layer keeps: uniform, owl, global, ...; by default uniform.
        attention: share of zeros of the attention's weights, if it is to be another.
        mlp: share of zeros of all other weights, if it is to be another.
        per_layer: JSON, or a file of it: share of zeros by name or glob; the others take --sparsity, or stay dense.
        refit: recompute the kept weights by least squares at the end.
        packed: write the packed format: smaller, and fast on the CPU after `import rarefy`.
        only: names or globs of weights or modules; prune these and no others.
        skip: names or globs; leave these as they are.
        samples: windows of calibration text.
        length: tokens in a window; by default the model's context, 2048 at most.
        seed: of the positions of the windows.
        field: of .jsonl and .parquet; by default text.
        bos: window: each window begins as the tokenizer begins a text; none: with the text itself.
        dtype: to compute in; weights are written in the dtype that they had.
        dry_run: say what would be pruned, and write nothing.
        as_json: what was done as JSON.
    """
    if out is None and not dry_run:
        raise ValueError("--out: say where the pruned model goes, such as -o pruned, or --dry-run to see what would be")
    shares = {name: x for name, x in (("attention", attention), ("mlp", mlp)) if x is not None}
    value = _recipe(method, sparsity, pattern, allocation, per_layer, refit, shares)
    with quiet(), tracked("pruning") as progress:
        found = prune_directory(
            model_dir,
            None if dry_run else out,
            value,
            calibration=calibration,
            length=length,
            samples=samples,
            field=field,
            bos=bos,
            only=only or None,
            skip=skip or None,
            shares=shares,
            seed=seed,
            dtype=None if dtype is None else _DTYPES[dtype],
            packed=packed,
            progress=progress,
        )
    if as_json:
        print_json({**found.to_dict(), "peak_memory": high_water()})
    else:
        _show(found, str(value))
    return 0


def _recipe(
    method: str,
    sparsity: float | None,
    pattern: str,
    allocation: str | None,
    layers: str | None,
    refit: bool,
    shares: dict[str, float],
) -> Any:
    ways = {"--allocation": allocation, "--per-layer": layers, "--attention/--mlp": shares or None}
    given = [name for name, x in ways.items() if x is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: each says how many weights a layer keeps; give one of them")
    for name, x in [("sparsity", sparsity), *shares.items()]:
        if x is not None and not 0 <= x < 1:
            raise ValueError(f"--{name} {x:g}: a share of zeros, at least 0 and below 1")
    chosen: Any = per_layer(layers) if layers is not None else allocation or "uniform"
    if sparsity is None and (layers is not None or shares):
        sparsity = 0.0
    return make_recipe(method, sparsity=sparsity, pattern=pattern, allocation=chosen, refit=refit)


def _show(found: Pruned, method: str) -> None:
    shown = console()
    shown.print(rich.text.Text(f"{found.source.name} · {method}", style="bold"))
    rows = [_row(k.name, str(k.sites), k.weights, k.asked, k.kept) for k in found.kinds]
    asked = [kind.asked for kind in found.kinds]
    total = sum(x for x in asked if x is not None) if None not in asked else None
    sites = str(sum(kind.sites for kind in found.kinds))
    rows.append(("",) * 6)
    rows.append(_row("all pruned layers", sites, found.weights, total, found.kept))
    if found.nonzero is not None:
        rows.append(_row("all parameters", "", found.parameters, None, found.nonzero))
    shown.print(grid(("layers", "count", "weights", "asked to keep", "kept", "zeros"), rows))
    shown.print(rich.text.Text(_footer(found), style="dim"))
    if found.out is None:
        shown.print("\nA dry run: nothing was pruned or written.")
        return
    at = shlex.quote(str(found.out))
    shown.print(f"\nWritten to {found.out}. What next:", markup=False, highlight=False)
    for line in (
        f"  rarefy eval {at} --text FILE      what it costs in perplexity; the same for {found.source.name}",
        f"  rarefy speed {at}                 dense against packed on this machine",
        f"  rarefy check {at}                 that every count is what rarefy.json says",
    ):
        shown.print(line, markup=False, highlight=False)


def _row(name: str, count: str, weights: int, asked: int | None, kept: int | None) -> tuple[str, ...]:
    zeros = "–" if kept is None else share(weights - kept, weights)
    return name, count, grouped(weights), *("–" if x is None else grouped(x) for x in (asked, kept)), zeros


def _rounding(found: Pruned) -> str:
    """Why the share of zeros is another than the one asked for, where rows keep whole numbers of inputs."""
    asked = found.sparsity
    if asked is None or found.kept is None or abs(1 - found.kept / found.weights - asked) < 5e-5:
        return ""
    return f" {100 * asked:g} % of zeros were asked for: every row keeps a whole number of its weights."


def _footer(found: Pruned) -> str:
    """Where the numbers come from."""
    data = found.calibration
    said = f"{found.seconds:.1f} s, {high_water() / 1e9:.2f} GB of memory at most.{_rounding(found)}"
    if data is None:
        return said
    drawn = (
        f" of {grouped(data['length'])} tokens from {data['source']}, seed {data['seed']}" if "length" in data else ""
    )
    return f"Calibrated on {data['windows']} windows{drawn} (sha256 {data['sha256'][:12]}…). {said}"
