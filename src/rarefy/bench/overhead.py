"""What masks cost while training: time per step over the dense step, as ratios within one run.

Every variant trains its own copy of the same network. A round runs each for as many steps as lie between two updates of
the dynamic methods, one after the other, in an order that turns from round to round; a ratio is that of two of one
round, so that a machine that slows down slows both. `python -m rarefy.bench.overhead` writes JSON and prints a table.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import rarefy
from rarefy.bench.environment import environment
from rarefy.bench.files import write_whole
from rarefy.bench.models import SmallResNet, initialise, mlp, quiet
from rarefy.bench.progress import bar
from rarefy.bench.seeds import generator

_BLOCK = 100  # steps of a variant in a round: one default update interval
_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "LeNet-300-100": lambda: mlp((784, 300, 100, 10)),
    "ResNet-8": SmallResNet,
}
_VARIANTS: dict[str, rarefy.Method | None] = {
    "dense": None,
    "dense again": None,  # what the noise alone makes of 1.00
    "Random": rarefy.Random(sparsity=0.9),
    "RigL": rarefy.RigL(sparsity=0.9),
    "SET": rarefy.SET(sparsity=0.9),
    "GMP": rarefy.GMP(sparsity=0.9, schedule=rarefy.Cubic(initial=0.5, start=0, end=1.0)),
    "SRSTE 2:4": rarefy.SRSTE(),
}


class _Variant:
    """One network in training."""

    def __init__(self, make: Callable[[], nn.Module], method: rarefy.Method | None, batch: int, steps: int) -> None:
        self.model = quiet(make)
        initialise(self.model, generator("weights", 0))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.sparsity = None
        if method is not None:
            self.sparsity = rarefy.sparsify(self.model, method, optimizer=self.optimizer, steps=steps)
        source = generator("order", 0)
        self.inputs = torch.randn(batch, 1, 28, 28, generator=source)
        self.labels = torch.randint(0, 10, (batch,), generator=source)

    def seconds_per_step(self, steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            self.optimizer.zero_grad()
            functional.cross_entropy(self.model(self.inputs), self.labels).backward()
            self.optimizer.step()
        return (time.perf_counter() - begin) / steps


def measure_network(network: str, *, batch: int, rounds: int, tick: Callable[[int], object]) -> list[dict[str, object]]:
    """One row per variant: microseconds per step, ratio over dense (median and quartiles over rounds), mask bytes."""
    steps = 20 * (rounds + 1) * _BLOCK  # schedules are stretched far beyond the measurement: updates never run out
    variants = {name: _Variant(_NETWORKS[network], m, batch, steps) for name, m in _VARIANTS.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds + 1):
        names = list(variants)
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(variants[name].seconds_per_step(_BLOCK))
            tick(1)
    return [_row(network, batch, name, v, times) for name, v in variants.items()]


def _row(network: str, batch: int, name: str, variant: _Variant, times: dict[str, list[float]]) -> dict[str, object]:
    own, dense = times[name][1:], times["dense"][1:]  # the first round warms up
    ratios = sorted(a / b for a, b in zip(own, dense, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "network": network,
        "batch": batch,
        "variant": name,
        "method": variant.sparsity.method.to_dict() if variant.sparsity else None,
        "microseconds_per_step": round(statistics.median(own) * 1e6, 1),
        "ratio": round(middle, 4),
        "ratio_quartiles": [round(low, 4), round(high, 4)],
        "ratio_of_minima": round(min(own) / min(dense), 4),
        **_mask_bytes(variant),
    }


def _mask_bytes(variant: _Variant) -> dict[str, float | None]:
    """Bytes of masks in memory and on disk, per weight of all sites."""
    s = variant.sparsity
    if s is None:
        return {"mask_bytes_per_weight": None, "mask_bits_per_weight_on_disk": None}
    held = [
        t for site in s.sites for t in {id(t): t for t in (site.held.keep, site.held.train) if t is not None}.values()
    ]
    stored: Sequence[Tensor] = [saved["mask"] for saved in s.state_dict()["per_site"].values()]
    weights = sum(site.numel for site in s.sites)
    return {
        "mask_bytes_per_weight": round(sum(t.numel() * t.element_size() for t in held) / weights, 3),
        "mask_bits_per_weight_on_disk": round(8 * sum(t.numel() for t in stored) / weights, 3),
    }


def _table(rows: Sequence[dict[str, object]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for title in (
        "network",
        "batch",
        "variant",
        "µs a step",
        "over dense",
        "quartiles",
        "of minima",
        "mask B/weight",
    ):
        table.add_column(title, justify="left" if title in ("network", "variant") else "right", no_wrap=True)
    for r in rows:
        low, high = r["ratio_quartiles"]  # type: ignore[misc]
        size = "–" if r["mask_bytes_per_weight"] is None else f"{r['mask_bytes_per_weight']}"
        table.add_row(
            str(r["network"]), str(r["batch"]), str(r["variant"]), f"{r['microseconds_per_step']:,.0f}",
            f"{r['ratio']:.3f}×", f"{low:.3f}–{high:.3f}", f"{r['ratio_of_minima']:.3f}×", size,
        )  # fmt: skip
    return table


def overhead(
    out: Path = Path("results/overhead.json"),
    rounds: int = 30,
    batch: int = 128,
    threads: int = 1,
    as_json: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Time per training step of masked training over dense training.

    Args:
        out: the JSON file that is written.
        rounds: of 100 steps for every variant; a third of them for the ResNet.
        batch: images a step.
        threads: of the processor.
        as_json: print the JSON too, instead of the table.
    """
    torch.set_num_threads(threads)
    plan = {"LeNet-300-100": rounds, "ResNet-8": max(2, rounds // 3)}
    rows: list[dict[str, object]] = []
    with bar() as progress:
        progress.plan(sum((n + 1) * len(_VARIANTS) for n in plan.values()))
        for network, count in plan.items():
            rows += measure_network(network, batch=batch, rounds=count, tick=progress.tick)
    where = environment(threads=threads, flush_denormal=False).model_dump()
    document = {"rows": rows, "steps_per_round": _BLOCK, "rounds": plan, "environment": where}
    write_whole(out, (json.dumps(document, indent=1) + "\n").encode())
    console = Console(width=None if sys.stdout.isatty() else 130)
    if as_json:
        console.print_json(data=document)
    else:
        console.print(
            _table(rows), f"\nMedians over rounds; a ratio compares neighbours of one round. Written to {out}."
        )


if __name__ == "__main__":
    tyro.cli(overhead)
