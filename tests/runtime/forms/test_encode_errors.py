"""What cannot be stored is refused with what would work; quantisation and its errors."""

import pytest
import torch

from rarefy.runtime import kernels
from rarefy.runtime.forms import FileForm, encode, quantize
from rarefy.runtime.kernels import Form


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.complex64])
def test_other_dtypes(dtype: torch.dtype):
    with pytest.raises(ValueError, match=r"dtype=torch\.float32 or dtype=torch\.bfloat16"):
        encode(torch.zeros(2, 2, dtype=dtype))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,), (2, 2, 2), ()])
def test_other_shapes(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="at least one entry"):
        encode(torch.zeros(shape))


def test_other_devices():
    with pytest.raises(ValueError, match=r"weight.cpu\(\)"):
        encode(torch.zeros(2, 2, device="meta"))


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bool), torch.ones(6, dtype=torch.bool)]
)
def test_other_masks(mask: torch.Tensor):
    with pytest.raises(ValueError, match=r"a mask is boolean, on the CPU, of the weight's shape \(2, 3\)"):
        encode(torch.zeros(2, 3), mask=mask)


@pytest.mark.parametrize("value", [1.0, float("nan"), 1e-45])
def test_a_mask_that_leaves_out_what_is_not_zero(value: float):
    weight = torch.zeros(5, 7)
    weight[3, 2] = value
    with pytest.raises(ValueError, match=r"the first at \[3, 2\].*masked_fill_"):
        encode(weight, mask=torch.zeros(5, 7, dtype=torch.bool))


def test_dense_takes_no_mask():
    with pytest.raises(ValueError, match="DENSE keeps every entry"):
        encode(torch.zeros(2, 2), mask=torch.ones(2, 2, dtype=torch.bool), form=Form.DENSE)


@pytest.mark.parametrize("form", [Form.INDEX16, FileForm.PANEL8])
def test_columns_beyond_16_bits(form: Form):
    assert encode(torch.zeros(1, 65536), form=form).units == 0
    with pytest.raises(ValueError, match="has up to 65536 columns, got 65537; BITMAP has no such limit"):
        encode(torch.zeros(1, 65537), form=form)
    assert encode(torch.zeros(1, 65537)).units == 0


@pytest.mark.parametrize(
    ("form", "block"), [(Form.BITMAP, 4), (Form.DENSE, 4), (Form.INDEX16, 2), (FileForm.PANEL8, 0)]
)
def test_other_blocks(form: Form, block: int):
    with pytest.raises(ValueError, match=f"stores blocks of .* rows; got {block}"):
        encode(torch.zeros(8, 8), form=form, block=block)


def test_the_look_up_form_needs_compiled_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: None)
    with pytest.raises(ValueError, match="compiled kernels"):
        encode(torch.zeros(8, 8), form=Form.LUT)


def test_the_look_up_form_of_too_many_columns():
    with pytest.raises(ValueError, match="65536 columns" if kernels.available() else "compiled kernels"):
        encode(torch.zeros(1, 70000), form=Form.LUT)


def test_a_full_panel():
    weight = torch.zeros(1, 512)
    weight[0, 256:] = 1
    with pytest.raises(ValueError, match="up to 255 units of 256 columns"):
        encode(weight, form=FileForm.PANEL8)
    weight[0, 511] = 0
    assert torch.equal(encode(weight, form=FileForm.PANEL8).dense(), weight)


def test_scales():
    values = torch.ones(2, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match="int8 weights have scales="):
        encode(values)
    with pytest.raises(ValueError, match="int8 weights have scales="):
        encode(torch.ones(2, 3), scales=torch.ones(2))
    for scales in (torch.ones(3), torch.ones(2, dtype=torch.float64), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ValueError, match=r"scales are finite float32 \[2\]"):
            encode(values, scales=scales)
    with pytest.raises(ValueError, match="got -128"):
        encode(-128 * values, scales=torch.ones(2))


def test_quantize_rounds_halves_to_even_and_reaches_127():
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -2.5, -127.0], [0.0] * 6])
    values, scales = quantize(weight)
    assert values.tolist() == [[127, 0, 2, 2, -2, -127], [0] * 6]
    assert scales.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_quantize_is_within_half_a_step(dtype: torch.dtype):
    weight = torch.randn(33, 130, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.rand(33, 130, generator=torch.Generator().manual_seed(1)) < 0.5
    values, scales = quantize(weight, mask)
    exact = weight.double().masked_fill(~mask, 0)
    error = (values.double() * scales.double()[:, None] - exact).abs()
    assert (error <= scales.double()[:, None] * (0.5 + 1e-5)).all()
    assert torch.equal(values.abs().amax(1), torch.full((33,), 127, dtype=torch.int8))
    assert not values[~mask].any()


def test_a_kept_weight_that_rounds_to_zero_stays_kept():
    weight = torch.tensor([[1.0, 1e-4, 0.0]])
    mask = torch.tensor([[True, True, False]])
    values, scales = quantize(weight, mask)
    stored = encode(values, mask=mask, scales=scales)
    assert stored.units == 2
    assert torch.equal(stored.mask(), mask)


def test_rows_too_small_for_a_scale_become_zero():
    values, scales = quantize(torch.tensor([[1e-45, 0.0]]))
    assert values.tolist() == [[0, 0]]
    assert scales.tolist() == [1.0]


@pytest.mark.parametrize("bad", [torch.tensor([[float("nan")]]), torch.tensor([[float("inf")]])])
def test_quantize_refuses_what_no_scale_holds(bad: torch.Tensor):
    with pytest.raises(ValueError, match="finite weights"):
        quantize(bad)


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(2, 2, dtype=torch.int8)])
def test_quantize_refuses_other_tensors(bad: torch.Tensor):
    with pytest.raises(ValueError, match="floating matrix"):
        quantize(bad)
