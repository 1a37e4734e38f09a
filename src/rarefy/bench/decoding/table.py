"""The decode table: milliseconds per token in four columns, and the perplexity that goes with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rarefy.bench.cpu.grids import Grid, digits
from rarefy.bench.decoding.runs import KINDS, Setting

__all__ = ["decode_grid"]

Cost = Mapping[str, Sequence[float | None]]
"""Perplexity, and its interval over windows, by "values sparsity", such as "bf16 0.5"."""

_NOTE = (
    "ms per token at batch 1, medians. torch dense: bf16, the same model with its zeros stored, in the same rounds. "
    "our dense kernel: what pack makes of the model without zeros, in those values. × torch: of the row, with the 95 % "
    "interval where it was paired. inside: the packed layers alone, called on the inputs that they have in the model; "
    "transformers' own: the difference, attention, norms, the cache, Python, and the head where it is not packed. "
    "llama.cpp: a whole step with its own graph, all weights of that type, measured first. "
    "Perplexity: of the trained small model, "
    "pruned by SparseGPT, all of its blocks' layers packed in those values; in brackets the change against bf16 dense. "
    "It tells what a setting costs that model; it is no measure of a model of the size that is timed."
)


def decode_grid(
    settings: Sequence[Setting], llama: Mapping[str, float], cost: Cost, model: str = "Llama 1.1 B"
) -> Grid:
    """Three rows for each setting with zeros."""
    own = {each.values: each for each in settings if not each.sparsity}
    dense = cost.get("bf16 0.0")
    rows: list[tuple[str, ...]] = []
    for each in settings:
        if each.sparsity:
            rows += _rows(each, own.get(each.values), llama, _costs(each, cost, dense))
    columns = ("values", "zeros", "ms per token", "torch dense", "our dense kernel", "packed", "× torch", "llama.cpp")
    dense_costs = [f"{cost[key][0]:.2f} in {key[:-4]}" for key in ("bf16 0.0", "int8 0.0") if key in cost]
    note = _NOTE + (f" Without zeros: {', '.join(dense_costs)}." if dense_costs else "")
    return Grid(f"{model}, decoding", (*columns, "perplexity"), tuple(rows), left=3, note=note)


def _rows(each: Setting, own: Setting | None, llama: Mapping[str, float], cost: str) -> list[tuple[str, ...]]:
    name = f"{100 * each.sparsity:g} %" if each.pattern == "unstructured" else _speed_only(each)
    peers = ", ".join(f"{_ms(llama[kind])} {kind}" for kind in KINDS[each.values] if kind in llama) or "–"
    total = (each.total_dense, own and own.total_packed, each.total_packed)
    inside = (each.inside_dense, own and own.inside_packed, each.inside_packed)
    ratio = f"{each.ratio:.2f} [{each.low:.2f}, {each.high:.2f}]"
    within = "–" if not each.inside_packed or not each.inside_dense else f"{each.inside_dense / each.inside_packed:.2f}"
    rest = [None if a is None or b is None else a - b for a, b in zip(total, inside, strict=True)]
    return [
        (each.values, name, "generate, end to end", *map(_ms, total), ratio, peers, cost),
        ("", "", "inside packed layers", *map(_ms, inside), within, "", ""),
        ("", "", "transformers' own", *map(_ms, rest), "", "", ""),
    ]


def _speed_only(each: Setting) -> str:
    return f"{each.pattern} {100 * each.sparsity:g} % (speed only)"


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else digits(1e3 * seconds)


def _costs(each: Setting, cost: Cost, dense: Sequence[float | None] | None) -> str:
    found = cost.get(f"{each.values} {each.sparsity}") if each.pattern == "unstructured" else None
    if found is None or dense is None or found[0] is None or dense[0] is None:
        return "–"
    bounds = "" if found[1] is None or found[2] is None else f" [{found[1]:.2f}, {found[2]:.2f}]"
    return f"{found[0]:.2f}{bounds} ({100 * (found[0] / dense[0] - 1):+.1f} %)"
