import copy

import pytest
import torch
from torch import Tensor, nn

from rarefy.methods.one_shot import originals as module
from rarefy.methods.one_shot.originals import Originals


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def odd_weight(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> nn.Parameter:
    """With NaN, infinities and zeros of both signs; laid out in rows, in columns or channels last."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 0.0]).to(dtype)
    if layout == "columns":
        weight = weight.t().contiguous().t()
    elif layout == "channels last":
        weight = weight.view(*shape, 1, 1).expand(*shape, 2, 2).contiguous(memory_format=torch.channels_last)
    return nn.Parameter(weight)


@pytest.mark.parametrize("layout", ["rows", "columns", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("in_memory", [0, 1 << 20])
@pytest.mark.parametrize("share", [None, 0.0, 0.4, 1.0])
def test_everything_comes_back_bit_for_bit(monkeypatch, layout, dtype, in_memory, share):
    monkeypatch.setattr(module, "_CHUNK", 100)  # in several pieces
    weight = odd_weight((31, 17), dtype, layout)
    before, twin = bits_of(weight), copy.deepcopy(weight)
    mask = None if share is None else torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < share
    with Originals(in_memory) as originals:
        originals.remember(weight, mask)
        originals.remember(twin)
        with torch.no_grad():
            weight.masked_fill_(torch.ones_like(weight).bool() if mask is None else ~mask, 0.0)
            twin.fill_(1.0)
        originals.restore()
    assert torch.equal(bits_of(weight), before)
    assert torch.equal(bits_of(twin), before)


def test_replaced_memory_is_put_back_and_was_not_copied():
    weight = nn.Parameter(torch.ones(3))
    memory = weight.data_ptr()
    with Originals() as originals:
        originals.replace(weight, torch.zeros(3))
        assert weight.eq(0).all()
        originals.restore()
    assert weight.data_ptr() == memory


def test_with_a_mask_only_what_is_dropped_is_kept():
    weight = nn.Parameter(torch.randn(100, 100))
    mask = torch.arange(10_000).view(100, 100) % 4 > 0
    with Originals() as originals:
        originals.remember(weight, mask)
        assert originals._store.memory == 4 * 2_500
