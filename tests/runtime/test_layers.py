import copy
import io
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from rarefy.runtime.forms import encode, quantize, runnable, smallest
from rarefy.runtime.kernels import Form
from rarefy.runtime.layers import PackedConv2d, PackedLinear, from_description
from runtime.nets import have_kernels, sparse

pytestmark = pytest.mark.filterwarnings("ignore:packed layers run through torch")

FORMS = [(Form.BITMAP, 1), (Form.INDEX16, 1), (Form.INDEX16, 4), (Form.INDEX16, 16), (Form.DENSE, 1)]
DTYPES = ["float32", "bfloat16", "int8"]


def store(weight, form=Form.BITMAP, block=1, dtype="float32"):
    mask = None if form == Form.DENSE else weight.ne(0)
    if dtype == "int8":
        values, scales = quantize(weight, mask)
        return encode(values, mask=mask, form=form, block=block, scales=scales)
    return encode(weight.to(getattr(torch, dtype)), mask=mask, form=form, block=block)


def layer(rows=24, cols=40, *, form=Form.BITMAP, block=1, dtype="float32", bias=True, seed=0):
    """A dense layer and the same, packed."""
    dense = nn.Linear(cols, rows, bias=bias)
    with torch.no_grad():
        dense.weight.copy_(sparse((rows, cols), seed=seed, block=block))
        if bias:
            dense.bias.copy_(sparse((rows,), 1.0, seed))
    return dense, PackedLinear.convert(copy.deepcopy(dense), store(dense.weight.detach(), form, block, dtype))


def inputs(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2, "int8": 3e-2}


def close(found, exact, dtype="float32"):
    scale = exact.abs().max().clamp_min(1e-6)
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs().max() / scale).item() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("form", "block"), FORMS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 8, 33, 130])
def test_linear_is_the_dense_layer_within_the_error_of_its_dtype(form, block, dtype, tokens):
    dense, packed = layer(37, 90, form=form, block=block, dtype=dtype)
    x = inputs(tokens, 90)
    exact = functional.linear(x.double(), dense.weight.double(), dense.bias.double())
    close(packed(x), exact, dtype)


@given(
    st.integers(1, 40), st.integers(1, 70), st.integers(1, 40), st.sampled_from(FORMS), st.floats(0, 1), st.booleans()
)
def test_linear_of_any_size_and_density(rows, cols, tokens, form, density, bias):
    weight = sparse((rows, cols), density, seed=rows)
    packed = PackedLinear.from_stored(
        store(weight, *form), bias=inputs(rows) if bias else None, in_features=cols, out_features=rows
    )
    x = inputs(tokens, cols)
    exact = x.double() @ weight.double().t() + (inputs(rows).double() if bias else 0)
    assert torch.allclose(packed(x).double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_keep_their_dtype(dtype):
    dense, packed = layer(dtype=dtype)
    for kind, tolerance in ((torch.float16, 2e-3), (torch.float64, 1e-6), (torch.bfloat16, 2e-2)):
        y = packed(inputs(5, 40).to(kind))
        assert y.dtype is kind
        exact = dense(inputs(5, 40).to(kind).float()).double()
        assert (y.double() - exact).abs().max() <= max(tolerance, TOLERANCE[dtype]) * exact.abs().max()


def test_shapes_and_strides_of_the_input():
    dense, packed = layer()
    for x in (
        inputs(40),
        inputs(2, 3, 40),
        inputs(2, 3, 5, 40),
        inputs(9, 80)[:, ::2],
        inputs(9, 80)[:, 7:47],
        inputs(40, 9).t(),
        inputs(40, 1).t(),
        inputs(40, 6).t().view(2, 3, 40),
        inputs(0, 40),
    ):
        y = packed(x)
        assert y.shape == (*x.shape[:-1], 24)
        assert torch.allclose(y, dense(x), atol=1e-6)
    if have_kernels():
        assert packed(inputs(40, 9).t()).t().is_contiguous()  # feature-major in, feature-major out


def test_a_wrong_input_says_what_was_wanted():
    _, packed = layer()
    for x in (inputs(3, 41), inputs(41, 3).t(), inputs()):
        with pytest.raises((ValueError, RuntimeError), match=r"40|0D"):
            packed(x)


@pytest.mark.parametrize("geometry", [(1, 1, 0), (3, 1, 1), (3, 2, 1), (1, 2, 0), (5, 1, 0)], ids=str)
@pytest.mark.parametrize(("form", "block"), [(Form.BITMAP, 1), (Form.INDEX16, 1), (Form.INDEX16, 4)], ids=str)
def test_conv_is_the_dense_convolution(form, block, geometry):
    kernel, stride, padding = geometry
    dense = nn.Conv2d(6, 10, kernel, stride, padding)
    with torch.no_grad():
        dense.weight.copy_(sparse(tuple(dense.weight.shape), seed=3, block=block))
    stored = encode(dense.weight.detach().flatten(1), form=form, block=block)
    packed = PackedConv2d.convert(copy.deepcopy(dense), stored)
    for x in (inputs(2, 6, 9, 11), inputs(6, 9, 11), inputs(2, 6, 9, 11).to(memory_format=torch.channels_last)):
        exact = dense.double()(x.double())
        assert torch.allclose(packed(x).double(), exact, atol=1e-5)
    dense.float()
    with pytest.raises((ValueError, RuntimeError), match="6"):
        packed(inputs(2, 5, 9, 9))


def test_weight_and_bias_read_as_they_were():
    dense, packed = layer()
    assert torch.equal(packed.weight, dense.weight)
    assert torch.equal(packed.bias, dense.bias)
    assert not packed.weight.requires_grad
    assert not packed.bias.requires_grad
    with pytest.raises(AttributeError, match="unpack"):
        packed.weight = nn.Parameter(torch.zeros(24, 40))
    with pytest.raises(AttributeError, match="unpack"):
        packed.bias = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_restore_gives_back_every_bit_and_everything_else(dtype):
    dense = nn.Linear(40, 24).to(dtype)
    with torch.no_grad():
        dense.weight.copy_(sparse((24, 40)))
    dense.bias.requires_grad_(False)
    dense.eval()
    dense.register_buffer("mine", torch.ones(2))
    calls = []
    dense.register_forward_hook(lambda *_: calls.append(1))
    before = {name: p.detach().clone() for name, p in dense.state_dict().items()}
    kind = torch.float32 if dtype is torch.float16 else dtype
    packed = PackedLinear.convert(dense, encode(dense.weight.detach().to(kind)))
    assert packed is dense
    assert not list(packed.parameters())
    packed(inputs(1, 40).to(dtype))
    restored = packed.restore()
    assert type(restored) is nn.Linear
    assert not restored.training
    assert [name for name, _ in restored.named_parameters()] == ["weight", "bias"]
    assert (restored.weight.requires_grad, restored.bias.requires_grad) == (True, False)
    assert restored.state_dict().keys() == before.keys()
    assert all(torch.equal(p, before[name]) and p.dtype == before[name].dtype for name, p in dense.state_dict().items())
    assert set(restored.__dict__) == set(nn.Linear(1, 1).__dict__)
    assert len(calls) == 1


def test_copies_and_states_are_layers_of_their_own():
    dense, packed = layer()
    x = inputs(3, 40)
    y = packed(x)
    twin = copy.deepcopy(packed)
    assert twin.packed_weight.data_ptr() != packed.packed_weight.data_ptr()
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    other = layer(seed=5)[1]
    other.load_state_dict(packed.state_dict())
    assigned = layer(seed=6)[1]
    assigned.load_state_dict(packed.state_dict(), assign=True)
    packed.packed_weight = torch.zeros(0, dtype=torch.uint8)
    for each in (twin, loaded, other, assigned):
        assert torch.equal(each(x), y)
        assert torch.equal(each.weight, dense.weight)


def test_a_state_may_bring_another_form():
    dense, packed = layer()
    _, other = layer(form=Form.INDEX16, block=4, seed=7)
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other.weight, dense.weight)
    assert torch.allclose(other(inputs(9, 40)), dense(inputs(9, 40)), atol=1e-6)


def test_a_bad_state_is_refused_and_changes_nothing():
    dense, packed = layer()
    x, y = inputs(3, 40), packed(inputs(3, 40))
    with pytest.raises(RuntimeError, match=r"packed and the state is dense.*unpack"):
        packed.load_state_dict(dense.state_dict())
    state = packed.state_dict()
    damaged = state["packed_weight"].clone()
    damaged[200] ^= 1  # one kept entry more or less than are stored
    for name, value, words in (
        ("packed_weight", damaged, "packed_weight"),
        ("packed_weight", state["packed_weight"][:100], "cut short"),
        ("packed_weight", torch.zeros(3), "uint8"),
        ("packed_weight", layer(8, 40)[1].packed_weight, "none for a layer"),
        ("packed_bias", torch.zeros(3, dtype=torch.uint8), "packed bias"),
        ("extra", torch.zeros(3), "Unexpected"),
    ):
        with pytest.raises(RuntimeError, match=words):
            packed.load_state_dict({**state, name: value})
    with pytest.raises(RuntimeError, match="Missing"):
        packed.load_state_dict({"packed_bias": state["packed_bias"]})
    assert torch.equal(packed(x), y)


def test_bytes_are_never_cast():
    _, packed = layer()
    before = packed.packed_weight.clone()
    for change in (
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.type(torch.float16),
    ):
        change(packed)
        assert torch.equal(packed.packed_weight, before)
        assert packed.packed_bias is not None
        assert packed.packed_bias.dtype is torch.uint8
    assert torch.allclose(packed(inputs(2, 40)), layer()[0](inputs(2, 40)), atol=1e-6)


def test_other_devices_are_refused_before_anything_moves():
    _, packed = layer()
    with pytest.raises(RuntimeError, match=r"cannot go to cuda:0.*unpack"):
        packed._apply(lambda t: SimpleNamespace(device=torch.device("cuda:0")))
    assert packed.packed_weight.is_cpu


def test_meta_has_shapes_and_takes_a_state():
    dense, packed = layer()
    state = {name: value.clone() for name, value in packed.state_dict().items()}
    packed.to("meta")
    assert packed.weight.shape == (24, 40)
    assert packed(inputs(3, 40).to("meta")).shape == (3, 24)
    assert "no values" in repr(packed)
    with pytest.raises(RuntimeError, match="meta"):
        packed(inputs(3, 40))
    packed.load_state_dict(state)
    assert torch.allclose(packed(inputs(3, 40)), dense(inputs(3, 40)), atol=1e-6)


def test_packed_weights_are_frozen():
    _, packed = layer()
    with pytest.raises(RuntimeError, match="frozen"):
        packed.requires_grad_()
    packed.requires_grad_(False)


def test_adapters_train_through_a_packed_layer():
    dense, packed = layer()
    results = []
    for middle in (dense.requires_grad_(False), packed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 40), middle, nn.Tanh())
        model(inputs(6, 40)).square().sum().backward()
        results.append([p.grad for p in model[0].parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_description_makes_the_layer_again_from_the_form_of_a_file(dtype):
    _, packed = layer(form=Form.INDEX16, block=4, dtype=dtype)
    made = from_description(smallest(packed.stored), bias=packed.bias, **packed.describe())
    assert torch.equal(made.weight, packed.weight)
    assert made.describe() == packed.describe()
    conv = PackedConv2d.from_stored(
        store(sparse((8, 12)), dtype=dtype), bias=inputs(8), in_channels=3, out_channels=8, kernel_size=[2, 2],
        stride=[1, 1], padding=[1, 1],
    )  # fmt: skip
    again = from_description(runnable(conv.stored, Form.INDEX16), bias=conv.bias, **conv.describe())
    assert torch.equal(again.weight, conv.weight)
    assert again.geometry == conv.geometry


def test_a_wrong_description_is_refused():
    stored = store(sparse((8, 12)))
    for description in (
        {"kind": "Conv3d"}, {"kind": "Linear"}, {"kind": "Linear", "in_features": 12, "out_features": 9},
        {"kind": "Linear", "in_features": 12, "out_features": 8, "weight_dtype": "float8"},
        {"kind": "Linear", "in_features": 12, "out_features": 8, "colour": 1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"packed layer|Linear|stored weight|weight_dtype"):
            from_description(stored, **description)
    with pytest.raises(ValueError, match="bias"):
        PackedLinear.from_stored(stored, bias=inputs(3), in_features=12, out_features=8)


def test_several_threads_may_call_one_layer():
    _, packed = layer(64, 96)
    xs = [inputs(tokens, 96, seed=tokens) for tokens in (1, 2, 9, 40)]
    exact = [packed(x) for x in xs]
    wrong = []

    def work(which):
        for _ in range(200):
            for x, y in zip(xs[which:] + xs[:which], exact[which:] + exact[:which], strict=True):
                if not torch.equal(packed(x), y):
                    wrong.append(which)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
