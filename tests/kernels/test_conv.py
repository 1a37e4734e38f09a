"""Sparse convolutions against torch's conv2d in float64: kernels, strides, padding, forms, dtypes, epilogues."""

import ctypes
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.reference import Built, activated, random_input, random_weight, same_bits, weight_struct
from rarefy.runtime import kernels
from rarefy.runtime.kernels import Activation, Conv2d, DType, Form

pytestmark = pytest.mark.usefixtures("isa")


@dataclass(frozen=True)
class Case:
    """One convolution."""

    channels: int
    height: int
    width: int
    out: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (0, 0)
    images: int = 1
    density: float = 0.3
    form: Form = Form.INDEX16
    block: int = 1
    dtype: DType = DType.F32
    x_dtype: torch.dtype = torch.float32
    threads: int = 1


SHAPES = [
    Case(1, 1, 1, 1, (1, 1)),
    Case(3, 5, 7, 9, (1, 1)),
    Case(64, 14, 14, 33, (1, 1), images=3),
    Case(130, 7, 7, 40, (1, 1)),
    Case(17, 1, 1, 20, (1, 1), images=50),
    Case(8, 9, 1, 5, (3, 3), pad=(1, 1)),
    Case(6, 1, 9, 5, (3, 3), pad=(1, 1), images=3),
    Case(16, 14, 14, 24, (3, 3), pad=(1, 1)),
    Case(40, 7, 7, 64, (3, 3), pad=(1, 1), images=3),
    Case(9, 29, 31, 10, (3, 3)),
    Case(5, 11, 40, 6, (1, 7), pad=(0, 3)),
    Case(5, 40, 11, 6, (7, 1), pad=(3, 0)),
    Case(4, 13, 12, 7, (5, 5), pad=(2, 2)),
    Case(4, 6, 6, 7, (5, 5), pad=(3, 3), stride=(2, 2)),
    Case(3, 33, 35, 12, (7, 7), pad=(3, 3), stride=(2, 2)),
    Case(12, 15, 14, 20, (1, 1), stride=(2, 2), images=3),
    Case(12, 15, 14, 20, (3, 3), stride=(2, 2), pad=(1, 1)),
    Case(12, 15, 14, 20, (3, 3), stride=(2, 1), pad=(1, 0), images=2),
    Case(7, 16, 17, 5, (2, 3), stride=(3, 4), pad=(2, 1)),
    Case(3, 2, 2, 4, (1, 1), stride=(3, 3), pad=(1, 1)),
    Case(2, 3, 3, 4, (3, 3), pad=(3, 3)),
    Case(700, 7, 7, 37, (1, 1), density=0.5),
    Case(260, 20, 20, 18, (1, 1), density=0.9),
]


def _library() -> ctypes.CDLL:
    library = kernels.library()
    assert library is not None
    return library


def _name(case: Case) -> str:
    sizes = f"{case.channels}x{case.height}x{case.width}-{case.out}-{case.kernel[0]}x{case.kernel[1]}"
    return f"{sizes}-s{case.stride[0]}{case.stride[1]}-p{case.pad[0]}{case.pad[1]}-n{case.images}"


def _weight(case: Case, mask: np.ndarray | None = None) -> Built:
    cols = case.channels * case.kernel[0] * case.kernel[1]
    weight, random = random_weight(case.out, cols, case.density)
    kept = random if mask is None else mask
    return weight_struct(weight, mask=kept, form=case.form, dtype=case.dtype, block=case.block)


def _images(case: Case) -> Tensor:
    x = random_input(case.images, case.channels * case.height * case.width, case.x_dtype)
    return x.view(case.images, case.channels, case.height, case.width)


def _run(
    case: Case,
    built: Built,
    x: Tensor,
    *,
    bias: Tensor | None = None,
    activation: Activation = Activation.NONE,
    other: Tensor | None = None,
) -> Tensor:
    """What the kernel makes of images x; guards around the output must stay."""
    shape = _dense(case, built, x.double()).shape
    guarded = torch.full((math.prod(shape) + 32,), math.nan, dtype=x.dtype)
    pointer = None if bias is None else bias.data_ptr()
    conv = Conv2d(
        ctypes.pointer(built.struct), pointer, activation, DType.BF16 if x.dtype == torch.bfloat16 else DType.F32,
        case.channels, case.height, case.width, *case.kernel, *case.stride, *case.pad,
    )  # fmt: skip
    added = None if other is None else other.data_ptr()
    y = guarded[16:-16]
    code = _library().rarefy_conv(ctypes.byref(conv), x.data_ptr(), added, y.data_ptr(), len(x), case.threads)
    assert code == 0
    assert guarded[:16].isnan().all()
    assert guarded[-16:].isnan().all()
    return y.view(shape)


def _dense(case: Case, built: Built, x: Tensor, weight: np.ndarray | None = None) -> Tensor:
    w = torch.from_numpy(built.dense if weight is None else weight)
    w = w.view(case.out, case.channels, *case.kernel)
    return torch.nn.functional.conv2d(x, w, None, case.stride, case.pad)


def _check(
    case: Case,
    built: Built,
    x: Tensor,
    y: Tensor,
    *,
    bias: Tensor | None = None,
    activation: Activation = Activation.NONE,
    other: Tensor | None = None,
) -> None:
    want = _dense(case, built, x.double())
    size = _dense(case, built, x.double().abs(), np.abs(built.dense))
    if bias is not None:
        want, size = want + bias.double()[:, None, None], size + bias.double().abs()[:, None, None]
    want = torch.from_numpy(activated(want.numpy(), activation))
    if other is not None:
        want, size = want + other.double(), size + other.double().abs()
    bound = size * (4 + math.sqrt(built.struct.cols)) * 2.0**-23 + 1e-30
    if y.dtype == torch.bfloat16:
        bound = bound + (want.abs() + bound) * 2.0**-8
    error = (y.double() - want).abs()
    assert (error <= bound).all(), f"largest error {error.max():.3g}, allowed {bound[error > bound].min():.3g}"


def _verify(case: Case, **options: Tensor | Activation) -> None:
    built, x = _weight(case), _images(case)
    _check(case, built, x, _run(case, built, x, **options), **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("case", SHAPES, ids=_name)
@pytest.mark.parametrize("block", [1, 4, 8, 16])
def test_every_shape_and_block(case: Case, block: int) -> None:
    _verify(replace(case, block=block))


@pytest.mark.parametrize("case", SHAPES, ids=_name)
def test_bitmaps(case: Case) -> None:
    _verify(replace(case, form=Form.BITMAP))


@pytest.mark.parametrize("case", SHAPES[::3], ids=_name)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("dtype", [DType.BF16, DType.I8], ids=["BF16", "I8"])
@pytest.mark.parametrize("block", [1, 4, 16])
def test_narrow_values(case: Case, dtype: DType, x_dtype: torch.dtype, block: int) -> None:
    _verify(replace(case, dtype=dtype, x_dtype=x_dtype, block=block))
    if block == 1:
        _verify(replace(case, dtype=dtype, x_dtype=x_dtype, form=Form.BITMAP))


EPILOGUES = [Case(6, 9, 9, 10, (3, 3), pad=(1, 1), images=2), Case(6, 9, 9, 10, (1, 1), stride=(2, 2), images=3)]


@pytest.mark.parametrize("case", EPILOGUES, ids=_name)
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.I8], ids=["F32", "BF16", "I8"])
@pytest.mark.parametrize("block", [1, 4])
def test_bias_activation_and_other(case: Case, activation: Activation, dtype: DType, block: int) -> None:
    x_dtype = torch.bfloat16 if dtype == DType.BF16 else torch.float32
    case = replace(case, dtype=dtype, x_dtype=x_dtype, block=block)
    built, x = _weight(case), _images(case)
    bias = torch.from_numpy(np.random.default_rng(3).standard_normal(case.out).astype(np.float32))
    other = torch.randn(_dense(case, built, x.double()).shape, generator=torch.Generator().manual_seed(4)).to(x_dtype)
    for options in ({"bias": bias}, {"other": other}, {"bias": bias, "other": other}):
        y = _run(case, built, x, activation=activation, **options)
        _check(case, built, x, y, activation=activation, **options)


def test_no_images() -> None:
    case = Case(3, 5, 5, 4, (3, 3), images=0)
    assert _run(case, _weight(case), _images(case)).shape == (0, 4, 3, 3)


@pytest.mark.parametrize("form", [Form.INDEX16, Form.BITMAP])
@pytest.mark.parametrize("kept", ["nothing", "everything", "some rows"])
def test_empty_and_full_weights(form: Form, kept: str) -> None:
    case = Case(20, 8, 9, 22, (3, 3), pad=(1, 1), form=form, images=2)
    mask = np.full((22, 180), kept == "everything")
    if kept == "some rows":
        mask[[3, 21]] = True
    built, x = _weight(case, mask), _images(case)
    bias = torch.arange(22.0)
    _check(case, built, x, _run(case, built, x, bias=bias), bias=bias)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.I8], ids=["F32", "BF16", "I8"])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("activation", [Activation.NONE, Activation.RELU])
def test_what_is_not_finite_spreads(bad: float, dtype: DType, block: int, activation: Activation) -> None:
    """It reaches every output that keeps a weight there, and no other."""
    case = Case(5, 9, 8, 12, (3, 3), pad=(1, 1), images=2, density=0.1, dtype=dtype, block=block)
    built, x = _weight(case), _images(case)
    clean = _run(case, built, x, activation=activation)
    x[1, 2, 4, 5] = bad
    y = _run(case, built, x, activation=activation)
    kept = built.mask & (built.dense != 0)
    touched = torch.zeros_like(x, dtype=torch.float64)
    touched[1, 2, 4, 5] = 1
    reached = _dense(case, built, touched, kept.astype(np.float64)) > 0
    assert reached.any()
    if activation == Activation.NONE or math.isnan(bad):
        assert not y[reached].isfinite().any()
    assert same_bits([torch.where(reached, clean, y), clean])


@pytest.mark.parametrize("case", SHAPES, ids=_name)
@pytest.mark.parametrize(("form", "block"), [(Form.INDEX16, 1), (Form.INDEX16, 4), (Form.BITMAP, 1)])
def test_threads_change_nothing(case: Case, form: Form, block: int) -> None:
    case = replace(case, form=form, block=block, out=case.out + 120)
    built, x = _weight(case), _images(case)
    assert same_bits([_run(replace(case, threads=n), built, x) for n in (1, 2, 3, 7)])


def test_images_do_not_depend_on_the_batch() -> None:
    case = Case(30, 7, 7, 40, (3, 3), pad=(1, 1), images=5)
    built, x = _weight(case), _images(case)
    alone = torch.cat([_run(replace(case, images=1), built, image[None]) for image in x])
    assert same_bits([alone, _run(case, built, x)])


def test_what_has_no_kernel() -> None:
    case = Case(3, 4, 4, 5, (3, 3))
    x, y = torch.zeros(1, 3, 4, 4), torch.zeros(1, 5, 2, 2)

    def code(built: Built, x_dtype: DType = DType.F32, channels: int = 3, size: int = 4) -> int:
        conv = Conv2d(ctypes.pointer(built.struct), None, 0, x_dtype, channels, size, size, 3, 3, 1, 1, 0, 0)
        return _library().rarefy_conv(ctypes.byref(conv), x.data_ptr(), None, y.data_ptr(), 1, 1)

    assert code(_weight(case)) == 0
    assert code(_weight(replace(case, form=Form.DENSE))) == 1
    assert code(_weight(case), DType.BF16) == 1  # float32 values take float32 activations alone
    assert code(_weight(case), channels=2) == 1  # the weight has other columns
    assert code(_weight(case), size=2) == 1  # no output
