import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import rarefy
from rarefy.runtime import pack, unpack
from rarefy.runtime.conv import Geometry
from rarefy.runtime.direct import DirectLinear
from rarefy.runtime.layers import PackedConv2d, PackedLinear
from runtime.nets import GatedMLP, conv_net, have_kernels, same, state, thin
from runtime.test_layers import inputs

pytestmark = [
    pytest.mark.usefixtures("no_cache"),
    pytest.mark.skipif(not have_kernels(), reason="there is nothing to choose from without compiled kernels"),
    pytest.mark.filterwarnings("ignore:this process has loaded"),  # said once a process, by whichever packs first
]


def test_convolutions_are_packed_where_a_kernel_takes_them(clock):
    clock("bitmap 1 conv", "bitmap 1 product expand")
    model = thin(conv_net())
    exact, before = copy.deepcopy(model), state(model)
    x = inputs(2, 3, 9, 9)
    report = pack(model, example=x)
    assert [row.kind for row in report.rows] == ["Conv2d", "Conv2d", "Linear"]  # a grouped one is left alone
    assert isinstance(model[0], PackedConv2d)
    assert isinstance(model[3], PackedConv2d)
    assert type(model[5]) is nn.Conv2d
    assert model[0].geometry == Geometry(8, 3, 3, 3, 1, 1, 1, 1)
    with torch.no_grad():
        assert torch.allclose(model(x), exact(x), atol=1e-5)
        channels_last = x.to(memory_format=torch.channels_last)
        assert torch.allclose(model(channels_last), exact(x), atol=1e-5)
    assert same(state(unpack(model)), before)


def test_masks_come_from_a_handle(clock):
    clock("bitmap")
    model = thin(nn.Sequential(nn.Linear(32, 32)), 1.0)
    handle = rarefy.sparsify(model, rarefy.Magnitude(sparsity=0.75))
    with torch.no_grad():
        model[0].weight[handle.masks["0.weight"]] = torch.linspace(0, 1, 256)
    report = pack(model, example=inputs(1, 32), sparsity=handle)
    assert report.rows[0].sparsity == 0.75
    assert model[0].stored.units == 256
    assert torch.equal(model[0].stored.mask(), handle.masks["0.weight"])


def test_masks_come_from_a_live_handle(clock):
    clock("bitmap")
    model = thin(nn.Sequential(nn.Linear(32, 32)), 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = rarefy.sparsify(model, rarefy.SET(sparsity=0.5, every=10), optimizer=optimizer, steps=10)
    with torch.no_grad():
        model[0].weight.zero_()
    assert pack(model, example=inputs(1, 32)).rows[0].sparsity == 0.5
    handle.detach()


def test_pruning_of_torch_is_folded(clock):
    clock("bitmap")
    model = thin(nn.Sequential(nn.Linear(32, 32)), 1.0)
    prune.l1_unstructured(model[0], "weight", amount=0.75)
    with torch.no_grad():
        model[0].weight_orig[0] = 0  # kept, and zero
        exact = model(inputs(3, 32))
    mask = model[0].weight_mask.bool()
    pack(model, example=inputs(1, 32))
    assert torch.equal(model[0].stored.mask(), mask)
    assert torch.allclose(model(inputs(3, 32)), exact, atol=1e-6)
    unpack(model)
    assert sorted(model.state_dict()) == ["0.bias", "0.weight"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"quantize": "int8"}], ids=str)
def test_tied_weights_stay_tied(clock, options):
    clock("bitmap", "dense few")
    model = thin(Tied())
    tokens = torch.arange(4)[None]
    exact = model(tokens)
    pack(model, example=tokens, **options)
    assert model.head.weight is model.embed.weight
    assert type(model.head) is DirectLinear
    assert isinstance(model.body, PackedLinear)
    with torch.no_grad():
        assert torch.allclose(model(tokens), exact, atol=1e-5 if not options else 0.3)
        model.embed.weight.mul_(2)
        changed = model(tokens)
        dense = unpack(model)(tokens)
        assert (changed - dense).abs().max() <= (0.02 if options else 1e-5) * dense.abs().max()


def test_a_direct_layer_is_a_linear_layer(clock):
    clock("dense few")
    model = thin(nn.Sequential(nn.Linear(32, 16)), 1.0)
    exact = copy.deepcopy(model)
    pack(model, example=inputs(1, 32))
    layer = model[0]
    assert type(layer) is DirectLinear
    x = inputs(1, 32)
    with torch.no_grad():
        assert torch.allclose(model(x), exact(x), atol=1e-6)
        assert torch.allclose(copy.deepcopy(model)(x), exact(x), atol=1e-6)
    model(x).sum().backward()
    assert layer.weight.grad is not None
    model.load_state_dict({name: 2 * value for name, value in exact.state_dict().items()})
    with torch.no_grad():
        assert torch.allclose(model(x), 2 * exact(x), atol=1e-5)
    model.bfloat16()
    with torch.no_grad():
        assert model(x.bfloat16()).dtype is torch.bfloat16
    assert type(unpack(model)[0]) is nn.Linear


def test_the_model_is_left_as_it_was_but_for_its_layers(clock):
    clock("bitmap")
    model = thin(conv_net()).train()
    model[0].weight.requires_grad_(False)
    before, numbers = state(model[1]), torch.get_rng_state()
    threads = torch.get_num_threads()
    pack(model, example=inputs(2, 3, 9, 9), threads=1)
    assert all(m.training for m in model.modules())
    assert same(state(model[1]), before)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert torch.get_num_threads() == threads
    unpack(model)
    assert [p.requires_grad for p in model[0].parameters()] == [False, True]


def test_layers_that_the_example_does_not_reach_stay(clock):
    clock("bitmap")
    model = thin(GatedMLP())
    model.spare = thin(nn.Linear(8, 8))
    report = pack(model, example=inputs(1, 24))
    assert type(model.spare) is nn.Linear
    assert any("spare" in note for note in report.notes)


def test_examples_may_be_tuples_and_dicts(clock):
    clock("bitmap")

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(24, 24)

        def forward(self, x, y=None):
            return self.a(x) + (0 if y is None else y)

    for example in ((inputs(1, 24), inputs(1, 24)), {"x": inputs(1, 24), "y": inputs(1, 24)}, [(inputs(1, 24),)]):
        model = thin(Two())
        pack(model, example=example)
        assert isinstance(model.a, PackedLinear)


def test_subclasses_and_computed_weights_are_left_alone(clock):
    clock("bitmap")

    class Own(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    model = nn.Sequential(Own(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    report = pack(model.eval(), example=inputs(1, 8))
    assert [row.name for row in report.rows] == ["2"]
