import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rarefy.runtime import ops
from rarefy.runtime.conv import Geometry
from rarefy.runtime.forms import encode
from rarefy.runtime.kernels import Form
from rarefy.runtime.layers import PackedConv2d
from rarefy.runtime.ways import TORCH
from runtime.nets import sparse
from runtime.test_layers import FORMS, inputs, layer

pytestmark = pytest.mark.filterwarnings("ignore:packed layers run through torch")
_SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("form", "block", "shape"),
    [(Form.BITMAP, 1, (1, 40)), (Form.INDEX16, 4, (2, 3, 40)), pytest.param(Form.DENSE, 1, (9, 40), marks=_SLOW)],
    ids=str,
)
def test_linear_is_an_operator_of_torch(form, block, shape):
    _, p = layer(form=form, block=block)
    x = inputs(*shape).requires_grad_()
    arguments = (x, p.packed_weight, p.bias.float(), 24, 40, p._algorithms)
    torch.library.opcheck(torch.ops.rarefy.linear.default, arguments)
    torch.library.opcheck(
        torch.ops.rarefy.linear_input_gradient.default,
        (inputs(*shape[:-1], 24).requires_grad_(), p.packed_weight, 24, 40),
    )


def test_conv2d_is_an_operator_of_torch():
    weight = sparse((10, 6, 3, 3))
    geometry = Geometry(10, 6, 3, 3, 2, 1, 1, 0)
    stored = encode(weight.flatten(1))
    arguments = (inputs(2, 6, 9, 8).requires_grad_(), stored.bytes, inputs(10), list(geometry), "conv")
    torch.library.opcheck(torch.ops.rarefy.conv2d.default, arguments)
    gradient = inputs(*geometry.result((2, 6, 9, 8)))
    torch.library.opcheck(
        torch.ops.rarefy.conv2d_input_gradient.default, (gradient, stored.bytes, list(geometry), [2, 6, 9, 8])
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("form", "block"), FORMS, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_gradients_of_input_and_bias(form, block, dtype, tokens):
    dense, p = layer(form=form, block=block, dtype=dtype)
    with torch.no_grad():
        dense.weight.copy_(p.weight)  # as cast or quantised
    gradient = inputs(tokens, 24, seed=9)
    x, y = inputs(tokens, 40).requires_grad_(), inputs(tokens, 40).requires_grad_()
    dense(x).backward(gradient)
    bias = p.bias.float().requires_grad_()
    ops.linear(y, p.packed_weight, bias, 24, 40, p._algorithms).backward(gradient)
    assert torch.allclose(x.grad, y.grad, atol=1e-5)
    assert torch.allclose(dense.bias.grad, bias.grad, atol=1e-5)


def test_second_gradients_flow():
    dense, p = layer(bias=False)
    found = []
    for each in (dense, p):
        x = inputs(3, 40).requires_grad_()
        (g,) = torch.autograd.grad(each(x).square().sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), x)
        found.append(h)
    assert torch.allclose(*found, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_convolution():
    dense = nn.Conv2d(6, 10, 3, padding=1)
    with torch.no_grad():
        dense.weight.copy_(sparse((10, 6, 3, 3)))
    p = PackedConv2d.from_stored(
        encode(dense.weight.detach().flatten(1)), bias=dense.bias.detach(), in_channels=6, out_channels=10,
        kernel_size=(3, 3), padding=(1, 1), stride=(1, 1),
    )  # fmt: skip
    x, y = inputs(2, 6, 8, 8).requires_grad_(), inputs(2, 6, 8, 8).requires_grad_()
    dense(x).square().sum().backward()
    p(y).square().sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-4)


def test_written_bytes_are_read_anew():
    dense, p = layer(bias=False)
    _, q = layer(bias=False, seed=8)
    x = inputs(3, 40)
    arguments = (24, 40, [TORCH] * 5)
    holder = torch.zeros(max(p.packed_weight.numel(), q.packed_weight.numel()), dtype=torch.uint8)
    results = []
    for source in (p, q, p):
        view = holder[: source.packed_weight.numel()]
        view.copy_(source.packed_weight)
        results.append(ops.linear(x, view, None, *arguments))
    assert torch.allclose(results[0], dense(x), atol=1e-6)
    assert torch.allclose(results[1], q(x), atol=1e-6)
    assert torch.equal(results[0], results[2])
    holder.zero_()
    with pytest.raises(ValueError, match="something else"):
        ops.linear(x, holder[: p.packed_weight.numel()], None, *arguments)


def test_what_was_made_of_bytes_goes_with_them():
    before = len(ops._known)
    for seed in range(20):
        _, p = layer(seed=seed)
        ops.linear(inputs(1, 40), p.packed_weight, None, 24, 40, p._algorithms)
        del p
    assert len(ops._known) <= before + 2


def test_transforms_and_modes_go_through_the_operator():
    _, p = layer()
    x = inputs(4, 40)
    with torch.inference_mode():
        assert torch.equal(p(x), p(x.clone()))
    with FlopCounterMode(display=False):
        y = p(x)
    assert torch.allclose(y, p(x), atol=1e-6)
