"""The tables of single matrices and of chains: first what dense costs, then what zeros save."""

from collections.abc import Iterator, Mapping, Sequence

from rarefy.bench.cpu.cases import DTYPES, Zeros
from rarefy.bench.cpu.document import LAYER, Row, Timing
from rarefy.bench.cpu.goals import best_dense
from rarefy.bench.cpu.grids import Grid, digits, duration, times_faster
from rarefy.bench.cpu.matrices import LLAMA
from rarefy.bench.cpu.own import DENSE

__all__ = ["chain_grid", "matrix_grids"]

_DENSE = (
    *(f"torch {d}" for d in DTYPES), *(f"{DENSE}{d}" for d in DTYPES), "onnxruntime fp32", "onnxruntime int8",
)  # fmt: skip
_LLAMA = tuple(f"{LLAMA}{kind}" for kind in ("BF16", "Q8_0", "Q4_0"))
_SPARSE = ("torch CSR", "sparseprop", "DeepSparse")
_NOTE = (
    "Medians in µs. rarefy: what pack chose, as a layer; in brackets the fastest kernel by itself. The two ratios are "
    "over torch fp32 and over the best dense of the same values (torch's or rarefy's own) with its 95 % interval; "
    "above 1 rarefy is faster. Where pack is not there, they are the fastest kernel's."
)


def matrix_grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """Two grids for each batch and regime: dense libraries by matrix, then sparse ones by matrix and zeros."""
    matrices = [row for row in rows if row.section == "matrix"]
    for batch, regime in dict.fromkeys((row.batch, row.regime) for row in matrices):
        chosen = [row for row in matrices if (row.batch, row.regime) == (batch, regime)]
        where = f"batch {batch}, {regime}"
        yield _dense(f"Dense, {where} (µs)", chosen, decode=batch == 1)
        yield _sparse(f"Sparse, {where} (µs)", chosen)


def _dense(heading: str, rows: Sequence[Row], *, decode: bool) -> Grid:
    columns = _DENSE + (_LLAMA if decode else ())
    cells = []
    for name in dict.fromkeys(row.name for row in rows):
        times = _joined(row for row in rows if row.name == name)
        cells.append((_title(name, rows), *(duration(times.get(column)) for column in columns)))
    return Grid(heading, ("matrix", *columns), tuple(cells))


def _joined(rows: Iterator[Row]) -> Mapping[str, Timing]:
    """Candidates of several rows, each with its least disturbed median."""
    found: dict[str, Timing] = {}
    for row in rows:
        for name, timing in row.times.items():
            if name not in found or timing.median < found[name].median:
                found[name] = timing
    return found


def _sparse(heading: str, rows: Sequence[Row]) -> Grid:
    columns = ["matrix", "zeros", *_SPARSE]
    for dtype in DTYPES:
        columns += [f"rarefy {dtype}", "× torch", f"× best {dtype}"]
    cells = []
    for name, pattern, sparsity in dict.fromkeys((r.name, r.pattern, r.sparsity) for r in rows):
        same = {r.dtype: r for r in rows if (r.name, r.pattern, r.sparsity) == (name, pattern, sparsity)}
        row = [_title(name, rows), str(Zeros(pattern, sparsity))]
        row += [duration(same["fp32"].times.get(peer)) if "fp32" in same else "–" for peer in _SPARSE]
        for dtype in DTYPES:
            row += _own(same.get(dtype))
        cells.append(tuple(row))
    return Grid(heading, tuple(columns), tuple(cells), left=2, note=_NOTE)


def _own(row: Row | None) -> list[str]:
    if row is None or row.own() is None:
        return ["–", "–", "–"]
    kernel = min(row.kernels(), key=lambda name: row.times[name].median, default=None)
    words = duration(row.times.get(LAYER))
    if kernel is not None:
        words += f" ({digits(row.times[kernel].median)} {kernel.removeprefix('kernel ')})"
    dense = best_dense(row)
    over = times_faster(row.ratios.get(dense[0]), interval=True) if dense else "–"
    return [words, times_faster(row.ratios.get("torch fp32")), over]


def _title(name: str, rows: Sequence[Row]) -> str:
    held_out = any(row.held_out for row in rows if row.name == name)
    return name.replace("x", "×") + (" (held out)" if held_out else "")


def chain_grid(rows: Sequence[Row]) -> Grid:
    """Four layers with bias and ReLU, per layer, and per image for convolutions."""
    columns = (
        "layers",
        "batch",
        "zeros",
        "torch fp32",
        "onnxruntime fp32",
        "DeepSparse",
        LAYER,
        "× torch",
        "× DeepSparse",
    )
    cells = []
    for row in (row for row in rows if row.section == "chain"):
        times = [duration(row.times.get(name)) for name in columns[3:7]]
        own = LAYER in row.times
        over = times_faster(row.ratios.get("torch fp32")) if own else "–"
        peer = times_faster(row.ratios.get("DeepSparse"), interval=True) if own else "–"
        cells.append((row.name, str(row.batch), str(Zeros(row.pattern, row.sparsity)), *times, over, peer))
    note = "Medians in µs per layer (convolutions: and per image), bias and ReLU included, weights hot, fp32."
    return Grid("Four layers in a row", columns, tuple(cells), note=note)
