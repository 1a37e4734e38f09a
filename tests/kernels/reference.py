"""What the kernels are held against: weights in every form from a dense matrix, and the products in float64.

built = weight_struct(weight, mask=mask, form=Form.BITMAP, dtype=DType.I8)
y = product(built, Algorithm.FEW, x)
check(built, x, y)
"""

import ctypes
import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from rarefy.runtime import kernels
from rarefy.runtime.kernels import Activation, Algorithm, DType, Form, Weight

GROUP = 64  # columns of activations that share an int8 scale
LAYOUTS = ("tokens", "features", "padded")


@dataclass(frozen=True)
class Built:
    """A weight in a form: the structure, the memory that it points into, and what it says."""

    struct: Weight
    dense: np.ndarray  # [rows, cols] float64, what is stored: rounded to bf16, or scale * integer
    mask: np.ndarray  # [rows, cols] bool, the entries that are kept
    dtype: DType
    integers: np.ndarray | None  # int8: [rows, cols], zeros where nothing is kept
    scales: np.ndarray | None  # int8: [rows] float32
    memory: tuple[np.ndarray, ...]


def weight_struct(
    weight: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    form: Form = Form.DENSE,
    dtype: DType = DType.F32,
    block: int = 1,
) -> Built:
    """`weight` [rows, cols] in a form; `mask` [rows, cols] bool says what is kept, by default what is not 0.

    Every array has exactly the size that the header names, so that a reader past an end is seen under a sanitizer.
    """
    rows, cols = weight.shape
    kept = weight != 0 if mask is None else mask.copy()
    if block > 1:  # a unit is kept whole
        padded = np.zeros((-(-rows // block) * block, cols), bool)
        padded[:rows] = kept
        kept = padded.reshape(-1, block, cols).any(1).repeat(block, 0)[:rows]
    stored, dense, integers, scales = _values(np.where(kept, weight, 0).astype(np.float32), dtype)
    index, values, starts, units = _arrays(stored, kept, form, block)
    memory = [a for a in (index, values, starts, scales) if a is not None]
    struct = Weight(
        form, dtype, block, 0, rows, cols, units,
        *(None if a is None else a.ctypes.data for a in (index, values, starts, scales)),
    )  # fmt: skip
    return Built(struct, dense, kept, dtype, integers, scales, tuple(memory))


def looked_up(source: Built) -> Built:
    """The look-up form of a weight, in memory with exactly as many bytes as it asks for."""
    library = kernels.library()
    assert library is not None
    size = library.rarefy_lut_bytes(ctypes.byref(source.struct))
    assert size > 0
    memory = np.full(size + 128, 0xA5, np.uint8)
    start = -memory.ctypes.data % 64
    struct = Weight()
    assert library.rarefy_lut_build(ctypes.byref(source.struct), memory.ctypes.data + start, ctypes.byref(struct)) == 0
    assert (memory[:start] == 0xA5).all()
    assert (memory[start + size :] == 0xA5).all()
    assert (struct.form, struct.dtype, struct.rows, struct.cols, struct.units) == (
        Form.LUT, source.struct.dtype, source.struct.rows, source.struct.cols, source.struct.units,
    )  # fmt: skip
    memory.setflags(write=False)
    return Built(struct, source.dense, source.mask, source.dtype, source.integers, source.scales, (memory,))


def _values(weight: np.ndarray, dtype: DType) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """The entries as they are stored, what they say in float64, and for int8 the integers and the scales."""
    if dtype == DType.F32:
        return weight, weight.astype(np.float64), None, None
    if dtype == DType.BF16:
        rounded = torch.from_numpy(weight).bfloat16()
        return rounded.view(torch.int16).numpy(), rounded.double().numpy(), None, None
    largest = np.abs(weight).max(axis=1, initial=0)
    scales = np.where(largest > 0, largest / np.float32(127), 1).astype(np.float32)
    integers = np.rint(weight / scales[:, None]).clip(-127, 127).astype(np.int8)
    return integers, integers * scales[:, None].astype(np.float64), integers, scales


def _arrays(
    stored: np.ndarray, kept: np.ndarray, form: Form, block: int
) -> tuple[np.ndarray | None, np.ndarray, np.ndarray | None, int]:
    """Index, values, starts and the number of units."""
    rows, cols = stored.shape
    if form == Form.DENSE:
        return None, np.ascontiguousarray(stored), None, rows * cols
    if form == Form.BITMAP:
        bits = np.zeros((rows, -(-cols // 64) * 64), bool)
        bits[:, :cols] = kept
        index = np.packbits(bits, axis=1, bitorder="little").view(np.uint64)
        starts = np.concatenate([[0], kept.sum(1).cumsum()]).astype(np.uint32)
        return index, stored[kept], starts, int(kept.sum())
    assert form == Form.INDEX16
    padded = np.zeros((-(-rows // block) * block, cols), stored.dtype)
    padded[:rows] = stored
    units = np.stack([kept[r : r + block].any(0) for r in range(0, rows, block)])
    at = [np.flatnonzero(row) for row in units]
    values = [padded[i * block : (i + 1) * block, columns].T for i, columns in enumerate(at)]
    starts = np.concatenate([[0], units.sum(1).cumsum()]).astype(np.uint32)
    return np.concatenate(at).astype(np.uint16), np.ascontiguousarray(np.concatenate(values)), starts, int(units.sum())


def random_weight(rows: int, cols: int, density: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A normal float32 matrix and a mask that keeps each entry with probability `density`."""
    rng = np.random.default_rng([seed, rows, cols])
    return rng.standard_normal((rows, cols)).astype(np.float32), rng.random((rows, cols)) < density


def extreme_masks(some: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of a mask of more than 48 rows: it with empty rows, the last 10 columns alone, nothing, everything."""
    empty_rows, late = some.copy(), np.zeros_like(some)
    empty_rows[::3] = empty_rows[16:48] = False
    late[:, -10:] = True
    return empty_rows, late, np.zeros_like(some), np.ones_like(some)


def random_input(tokens: int, features: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal activations [tokens, features]."""
    rng = np.random.default_rng([seed, tokens, features, 1])
    return torch.from_numpy(rng.standard_normal((tokens, features)).astype(np.float32)).to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A copy of x [tokens, features]: one token behind the other, one feature behind the other, or with gaps."""
    if layout == "tokens":
        return x.clone(memory_format=torch.contiguous_format)
    if layout == "features":
        return x.t().clone(memory_format=torch.contiguous_format).t()
    wide = torch.full((len(x), x.shape[1] + 5), math.nan, dtype=x.dtype)
    wide[:, 3:-2] = x
    return wide[:, 3:-2]


def product(
    built: Built,
    algorithm: Algorithm,
    x: Tensor,
    *,
    bias: Tensor | None = None,
    activation: Activation = Activation.NONE,
    other: Tensor | None = None,
    layout: str = "tokens",
    threads: int = 1,
) -> Tensor:
    """y [tokens, rows] in `layout`, by the kernel; entries that it does not write stay NaN, gaps must stay NaN."""
    y = laid_out(torch.full((len(x), built.struct.rows), math.nan, dtype=x.dtype), layout)
    options = {"bias": bias, "activation": activation, "other": other, "threads": threads}
    assert kernels.linear(built.struct, algorithm, x, y, **options) == 0
    if layout == "padded" and len(x):
        around = torch.as_strided(y, (len(y), y.shape[1] + 5), y.stride(), y.storage_offset() - 3)
        assert around[:, :3].isnan().all()
        assert around[:, -2:].isnan().all()
    return y


def quantized(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The int8 activations that kernels make of x: integers [tokens, groups, 64] and float32 scales [tokens, groups].

    A token that is not finite has NaN for its scales and 0 for its integers.
    """
    tokens, cols = x.shape
    groups = -(-cols // GROUP)
    padded = np.zeros((tokens, groups * GROUP), np.float32)
    padded[:, :cols] = x.float().numpy()
    finite = np.isfinite(padded).all(1)
    padded[~finite] = 0
    grouped = padded.reshape(tokens, groups, GROUP)
    scales = (np.abs(grouped).max(2, initial=0) / np.float32(127)).astype(np.float32)
    safe = np.where(scales > 0, scales, 1)[..., None]
    integers = np.where(scales[..., None] > 0, np.rint(grouped / safe).clip(-127, 127), 0)
    scales[~finite] = np.nan
    return integers.astype(np.int64), scales


def activated(x: np.ndarray, activation: Activation) -> np.ndarray:
    """The activation in float64."""
    with np.errstate(all="ignore"):
        t = torch.from_numpy(x)
        if activation == Activation.RELU:
            return torch.where(t < 0, torch.zeros_like(t), t).numpy()
        if activation in (Activation.GELU, Activation.GELU_TANH):
            approximate = "tanh" if activation == Activation.GELU_TANH else "none"
            return torch.nn.functional.gelu(t, approximate=approximate).numpy()
        return torch.nn.functional.silu(t).numpy() if activation == Activation.SILU else x


def expected(
    built: Built,
    x: Tensor,
    *,
    bias: Tensor | None = None,
    activation: Activation = Activation.NONE,
    other: Tensor | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """y [tokens, rows] in float64, and the sum of the magnitudes of what is summed, on which rounding depends."""
    if built.dtype == DType.I8:
        assert built.integers is not None
        assert built.scales is not None
        y, size = _int8(built.integers, built.scales, x)
    else:
        inputs = (x.bfloat16() if built.dtype == DType.BF16 else x).double().numpy()
        y, size = inputs @ built.dense.T, np.abs(inputs) @ np.abs(built.dense).T
    if bias is not None:
        y, size = y + bias.double().numpy(), size + bias.double().abs().numpy()
    y = activated(y, activation)
    if other is not None:
        y, size = y + other.double().numpy(), size + other.double().abs().numpy()
    return y, size


def _int8(integers: np.ndarray, scales: np.ndarray, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    q, s = quantized(x)
    rows, cols = integers.shape
    padded = np.zeros((rows, q.shape[1] * GROUP), np.int64)
    padded[:, :cols] = integers
    grouped, factor = padded.reshape(rows, -1, GROUP), s[..., None].astype(np.float64) * scales.astype(np.float64)
    sums = [np.einsum("tgk,rgk->tgr", a, b, optimize=True) for a, b in ((q, grouped), (np.abs(q), np.abs(grouped)))]
    return (sums[0] * factor).sum(1), (sums[1] * factor).sum(1)


def check(
    built: Built,
    x: Tensor,
    y: Tensor,
    *,
    bias: Tensor | None = None,
    activation: Activation = Activation.NONE,
    other: Tensor | None = None,
) -> None:
    """y is the product, up to the rounding of float32 sums and of the dtype of y. Finite input only."""
    want, size = expected(built, x, bias=bias, activation=activation, other=other)
    terms = x.shape[1] if built.dtype != DType.I8 else -(-x.shape[1] // GROUP)
    bound = size * (4 + math.sqrt(terms)) * 2.0**-23 + 1e-30
    if y.dtype == torch.bfloat16:
        bound = bound + (np.abs(want) + bound) * 2.0**-8
    got = y.double().numpy()
    wrong = ~(np.abs(got - want) <= bound)
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} wrong, first at {tuple(np.argwhere(wrong)[0])}: "
        f"{got[wrong][0]} instead of {want[wrong][0]} ± {bound[wrong][0]:.2g}"
    )


def reached(built: Built, x: Tensor) -> np.ndarray:
    """The outputs [tokens, rows] that an entry of x that is not finite must reach: bool."""
    spoilt = ~x.isfinite().numpy()
    if built.dtype == DType.I8:
        return np.broadcast_to(spoilt.any(1)[:, None], (len(x), built.struct.rows))
    return (spoilt.astype(np.int64) @ built.mask.T.astype(np.int64)) > 0


def same_bits(outputs: list[Tensor]) -> bool:
    """Whether all are equal bit for bit."""
    kind = torch.int16 if outputs[0].dtype == torch.bfloat16 else torch.int32
    return all(torch.equal(a.contiguous().view(kind), b.contiguous().view(kind)) for a, b in pairwise(outputs))
