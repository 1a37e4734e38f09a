"""The cost model: seconds of a product by form, algorithm and sizes, good enough to leave out what cannot win.

    few    max(bytes / bandwidth, work / rate of decoding) + call
    many   2 · kept · tokens / (peak · share · n / (n + n½)) + call, n kept entries per row, tokens in whole vectors
    expand many of the dense form + entries / rate of expanding

What is close is measured (choose.py). Constants are for one core of a Zen 4 with AVX-512, fitted to measurements; they
only have to be right relative to each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from rarefy.runtime.kernels import Algorithm, DType, Form
from rarefy.runtime.ways import TORCH, Way

CALL = 3e-6
"""Seconds of a call, whatever it does."""

PEAK = {DType.F32: 117e9, DType.BF16: 235e9, DType.I8: 400e9}
"""Multiply-adds count twice; per second and core."""

WIDTH = {DType.F32: 4, DType.BF16: 2, DType.I8: 1}
"""Bytes of a value."""

COLD, HOT = 45e9, 75e9
"""Bytes per second: from memory, all cores together; from caches, a core."""

EXPAND = 21e9
"""Entries per second and core, from a form to a dense tile."""

DECODE = {
    Form.DENSE: {DType.F32: 16e9, DType.BF16: 37e9, DType.I8: 63e9},
    Form.BITMAP: {DType.F32: 8.8e9, DType.BF16: 27e9, DType.I8: 45e9},
    Form.INDEX16: {DType.F32: 2.5e9, DType.BF16: 2.5e9, DType.I8: 2.5e9},
    Form.LUT: {DType.F32: 10e9, DType.BF16: 19e9, DType.I8: 24e9},
}
"""Few tokens: entries per second and core; of all entries (dense, bitmap) or of the kept ones (index, look-up)."""

BLOCK_GAIN = {1: 1.0, 4: 3.0, 8: 5.0, 16: 8.0}
"""Few tokens, index form: how much faster a kept entry is in a block."""

SHARE = {
    (Form.DENSE, 1): (0.85, 0.0),
    (Form.BITMAP, 1): (0.66, 8.0),
    (Form.INDEX16, 1): (0.74, 6.0),
    (Form.INDEX16, 4): (0.95, 4.0),
    (Form.INDEX16, 8): (0.95, 4.0),
    (Form.INDEX16, 16): (0.95, 4.0),
}
"""Many tokens: share of the peak, and n½."""

LOOK_UP = (0.43, 0.115)
"""The same of the look-up form, whose lists are filled up: share of the peak, and the density at which half is lost."""


@dataclass(frozen=True)
class Sizes:
    """A product to be predicted: kept counts stored entries, zeros that fill blocks up included."""

    rows: int
    cols: int
    kept: int
    dtype: DType
    tokens: int
    threads: int
    cold: bool = False


def stored_bytes(form: Form, sizes: Sizes, block: int = 1) -> float:
    """Bytes that a product reads of a weight."""
    width = WIDTH[sizes.dtype]
    entries = sizes.rows * sizes.cols
    return {
        Form.DENSE: entries * width,
        Form.BITMAP: entries / 8 + sizes.kept * width,
        Form.INDEX16: sizes.kept / block * 2 + sizes.kept * width,
        Form.LUT: sizes.kept * (width + 1) * 1.6,
    }[form]


def seconds(way: Way, sizes: Sizes) -> float:
    """The predicted time of one product.

    >>> few = Sizes(1024, 1024, 100_000, DType.F32, tokens=1, threads=2)
    >>> seconds(Way(Form.LUT, Algorithm.FEW), few) < seconds(Way(Form.DENSE, Algorithm.FEW), few)
    True
    """
    if way.algorithm == TORCH:
        own = Way(Form.DENSE, Algorithm.FEW if sizes.tokens < 8 else Algorithm.MANY)
        return seconds(own, sizes) * (2.0 if sizes.tokens < 8 else 1.2)
    if way.algorithm == Algorithm.FEW:
        return CALL + max(_few(way, sizes), _reading(way, sizes))
    if way.algorithm == Algorithm.EXPAND:
        dense = Way(Form.DENSE, Algorithm.MANY)
        made = sizes.rows * sizes.cols / (EXPAND * sizes.threads)
        return CALL + made + max(_many(dense, sizes), _reading(way, sizes))
    return CALL + max(_many(way, sizes), _reading(way, sizes))


def _reading(way: Way, sizes: Sizes) -> float:
    size = stored_bytes(way.form, sizes, way.block)
    return size / (COLD if sizes.cold else HOT * sizes.threads)


def _few(way: Way, sizes: Sizes) -> float:
    whole = way.form in (Form.DENSE, Form.BITMAP)
    entries = sizes.rows * sizes.cols if whole else sizes.kept
    rate = DECODE[way.form][sizes.dtype] * sizes.threads
    if way.form == Form.INDEX16:
        rate *= BLOCK_GAIN[way.block]
    shared = 1 + 0.35 * (sizes.tokens - 1)  # the tokens of a call share the decoding
    return entries / rate * shared


def _many(way: Way, sizes: Sizes) -> float:
    dense = way.form == Form.DENSE
    kept = sizes.rows * sizes.cols if dense else sizes.kept
    tokens = -(-sizes.tokens // 16) * 16
    per_row = kept / max(1, sizes.rows)
    if way.form == Form.LUT:
        share, half, tokens = LOOK_UP[0], LOOK_UP[1] * sizes.cols, sizes.tokens
    else:
        share, half = SHARE[way.form, way.block]
    useful = share * per_row / (per_row + half) if kept else 1.0
    if dense:
        useful *= tokens / (tokens + 40)
    return 2 * kept * tokens / (PEAK[sizes.dtype] * sizes.threads * useful)
