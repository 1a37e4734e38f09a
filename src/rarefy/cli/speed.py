"""`rarefy speed`: dense against packed on this machine, for a network, a file of matrices, or a model directory."""

from pathlib import Path
from typing import Any, Literal

import rich.text
import torch
import tyro

from rarefy.bench.decode import Decoding, Timed, decode_speed
from rarefy.bench.memory import high_water
from rarefy.bench.progress import tracked
from rarefy.bench.speed import NETWORKS, load_subject
from rarefy.bench.speed import speed as run_speed
from rarefy.cli.output import AsJson, amount, console, grid, print_json
from rarefy.cli.quiet import quiet
from rarefy.io.directory import read_model
from rarefy.io.pretrained import read_config
from rarefy.runtime.report import duration

__all__ = ["speed"]


def speed(
    target: tyro.conf.Positional[str] = "digits-mlp",
    sparsity: float | None = None,
    batch: str = "1",
    dtype: Literal["bfloat16"] | None = None,
    quantize: Literal["int8"] | None = None,
    threads: int | None = None,
    prompt: int = 128,
    tokens: int = 32,
    rounds: int = 9,
    as_json: AsJson = False,
) -> int:
    """Pack a network for this machine and say how fast it is: dense against packed, interleaved.

    Of a model directory: time and bytes per token, writing text one token at a time and reading a prompt. Of other
    networks: what was chosen for each layer.

    Args:
        target: a model directory; or digits-mlp, lenet-300-100, mlp-1024, mlp-4096 or pointwise-256, or a safetensors
            file, whose matrices are timed one after another.
        sparsity: share of zeros of a built-in network, by default .9; files and directories have their own.
        batch: numbers of samples, separated by commas; a model directory is timed at 1.
        dtype: bfloat16 casts the weights, those of a model directory on both sides.
        quantize: int8 quantises those that are packed.
        threads: of the processor; by default what torch would use.
        prompt: of a model directory: tokens in the prompt.
        tokens: of a model directory: tokens written after the first.
        rounds: of a model directory: pairs of measurements.
        as_json: the report as JSON.
    """
    if target not in NETWORKS and Path(target).is_dir():
        return _directory(Path(target), sparsity, batch, dtype, quantize, threads, prompt, tokens, rounds, as_json)
    subject = load_subject(target, 0.9 if sparsity is None else sparsity)
    sizes = [_whole(text, "--batch") for text in batch.split(",") if text.strip()]
    with tracked("measuring") as progress:
        found = run_speed(subject, batches=sizes, dtype=dtype, quantize=quantize, threads=threads, progress=progress)
    if as_json:
        print_json({"network": subject.name, "batches": sizes, **found.to_dict()})
        return 0
    shown = console()
    shown.print(f"{subject.name}, batch {', '.join(map(str, sizes))}", style="bold")
    shown.print(found)
    return 0


def _directory(
    folder: Path,
    sparsity: float | None,
    batch: str,
    dtype: str | None,
    quantize: str | None,
    threads: int | None,
    prompt: int,
    tokens: int,
    rounds: int,
    as_json: bool,
) -> int:
    if sparsity is not None or batch != "1":
        raise ValueError(f"--sparsity and --batch are of built-in networks: {folder} has its own zeros, at batch 1")
    if dtype is not None and quantize is not None:
        raise ValueError(f"--dtype {dtype} and --quantize {quantize}: weights are cast or quantised, give one of them")
    if threads is not None and threads < 1:
        raise ValueError(f"--threads {threads}: at least one thread is needed")
    read_config(folder)
    with quiet(), tracked("measuring") as progress:
        found = decode_speed(
            read_model(folder),
            prompt=prompt,
            tokens=tokens,
            rounds=rounds,
            dtype=None if dtype is None else torch.bfloat16,
            quantize=quantize,
            threads=threads,
            progress=progress,
        )
    if as_json:
        print_json({"model": str(folder), "peak_memory": high_water(), **found.to_dict()})
    else:
        _show(folder.resolve().name, found)
    return 0


def _show(name: str, found: Decoding) -> None:
    shown = console()
    per = f"{found.dtype}{f', packed {found.quantize}' if found.quantize else ''}"
    shown.print(rich.text.Text(f"{name} · batch 1 · {per} · {found.threads} threads", style="bold"))
    columns = ("", "dense", "packed", "dense tokens/s", "packed tokens/s", "speed-up", "95 % interval")
    shown.print(grid(columns, [*map(_cells, found.rows), _bytes(found)]))
    shown.print(rich.text.Text(_words(found), style="dim"))


def _cells(row: Timed) -> tuple[str, ...]:
    ours = row.name.startswith(" ")
    count = 1 if row.unit == "token" else row.tokens
    rates = ("", "") if ours else tuple(f"{count / x:,.0f}" for x in (row.dense, row.packed))
    return (
        f"{row.name}, per token" if row.unit == "token" else row.name,
        duration(row.dense), duration(row.packed), *rates, f"{row.ratio:.2f}×", f"{row.low:.2f} to {row.high:.2f}",
    )  # fmt: skip


def _bytes(found: Decoding) -> tuple[Any, ...]:
    dense, packed = found.bytes_dense, found.bytes_packed
    return "weights read per token", amount(dense), amount(packed), "", "", f"{dense / packed:.2f}×", ""


def _words(found: Decoding) -> str:
    """What was compared, and what was not."""
    report, linear = found.report, len(found.report.rows)
    rounds = found.rows[0].rounds
    if report.reverted:
        chosen = "The packed model was slower as a whole, so the dense one was put back: both columns are dense."
    elif not found.packed_layers:
        chosen = "Nothing was faster than torch's dense layers here, so nothing was packed: both columns are dense."
    else:
        chosen = f"{found.packed_layers} of {linear} layers run by kernels chosen by measurement."
    quantised = " The packed side is quantised to int8, the dense side is not." if found.quantize else ""
    return (
        f"{chosen}{quantised} Medians of {rounds} rounds, dense and packed in turn; the interval is that of the "
        "median ratio. What is not inside packed layers is transformers' own work: attention, norms, Python. Token "
        f"ids are random. {report.isa or 'No compiled kernels'}, weights "
        f"{'from memory' if report.cold else 'in the caches'}; {high_water() / 1e9:.2f} GB of memory at most."
    )


def _whole(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{option}: {text!r} is no whole number; write numbers such as 1,32") from None
