"""The tables of whole networks: torch dense, best dense, packed, best peer, and what no weight kernel can remove."""

from collections.abc import Iterator, Sequence

from rarefy.bench.cpu.cases import Zeros
from rarefy.bench.cpu.document import LAYER, Row, Timing
from rarefy.bench.cpu.grids import Grid, digits
from rarefy.bench.cpu.models import WITHOUT
from rarefy.bench.cpu.own import DENSE

__all__ = ["best_dense_of", "best_peer_of", "model_grids"]

_PEERS = ("onnxruntime", "DeepSparse", "llama.cpp")
_COLUMNS = (
    "values", "zeros", "torch fp32", "torch bf16", "best dense", "packed", "× torch", "× best dense", "best peer",
    "× best peer", WITHOUT, "error", "MB",
)  # fmt: skip
_NOTE = (
    "Medians in ms, batch norms folded everywhere. best dense: of rarefy's own, torch and onnxruntime, in the values "
    "of the row. × torch: over torch in the row's values, where it has them. In brackets the 95 % interval. "
    "error: ‖packed − dense with the same zeros‖ / ‖dense‖. MB: the packed layers' weights. "
    "4x1 rows speak of speed only: pruned at once, 4x1 costs far more quality than unstructured zeros do."
)


def model_grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """One grid for each network and batch."""
    found = [row for row in rows if row.section == "model"]
    for name, batch in dict.fromkeys((row.name, row.batch) for row in found):
        same = [row for row in found if (row.name, row.batch) == (name, batch)]
        cells = tuple(_cells(row, same) for row in same)
        yield Grid(f"{name}, batch {batch} (ms)", _COLUMNS, cells, left=2, note=_NOTE)


def _cells(row: Row, same: Sequence[Row]) -> tuple[str, ...]:
    dense, peer = best_dense_of(row), best_peer_of(row)
    speed_only = " (speed only)" if row.pattern == "4x1" else ""
    torch_name = f"torch {row.dtype}"
    return (
        row.dtype, str(Zeros(row.pattern, row.sparsity)) + speed_only, _ms(_any(same, "torch fp32")),
        _ms(_any(same, "torch bf16")), _named(row, dense), _ms(row.times.get(LAYER)), _ratio(row, torch_name),
        _ratio(row, dense), _named(row, peer), _ratio(row, peer), _ms(row.times.get(WITHOUT)),
        _error(row), "–" if row.bytes is None else digits(row.bytes / 1e6),
    )  # fmt: skip


def best_dense_of(row: Row) -> str | None:
    """The fastest dense of the row's values, wherever it comes from."""
    return row.fastest(f"torch {row.dtype}", f"{DENSE}{row.dtype}", f"onnxruntime {row.dtype}")


def best_peer_of(row: Row) -> str | None:
    """The fastest other library but torch."""
    return row.fastest(*_PEERS)


def _any(rows: Sequence[Row], name: str) -> Timing | None:
    return next((row.times[name] for row in rows if name in row.times), None)


def _ms(timing: Timing | None) -> str:
    return "–" if timing is None else digits(timing.median / 1000)


def _named(row: Row, name: str | None) -> str:
    if name is None:
        return "–"
    short = name.removesuffix(f" {row.dtype}").replace("rarefy dense", "own")
    return f"{_ms(row.times[name])} {short}"


def _ratio(row: Row, name: str | None) -> str:
    ratio = None if name is None or LAYER not in row.times else row.ratios.get(name)
    return "–" if ratio is None else f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _error(row: Row) -> str:
    error = row.facts.get("error")
    return f"{100 * error:.2g} %" if isinstance(error, float) else "–"
