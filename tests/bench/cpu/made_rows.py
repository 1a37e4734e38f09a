"""Rows of results made up for tests."""

from rarefy.bench.cpu.document import Row
from rarefy.bench.cpu.document import make_row as fill
from rarefy.bench.cpu.timing import Samples


def made(times: dict[str, float], **row) -> Row:
    """A row whose candidates took that many microseconds in each of nine rounds."""
    defaults = {
        "section": "matrix", "name": "1024x1024", "shape": [1024, 1024], "batch": 1, "regime": "hot", "dtype": "fp32",
        "pattern": "unstructured", "sparsity": 0.9,
    }  # fmt: skip
    return fill(Row(**{**defaults, **row}), {n: Samples((t * 1e-6,) * 9, 1) for n, t in times.items()}, {})
