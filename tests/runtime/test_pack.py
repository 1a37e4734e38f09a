import copy

import pytest
import torch
from torch import nn

from rarefy.runtime import judge, measure, pack, unpack
from rarefy.runtime.kernels import Form
from rarefy.runtime.layers import PackedLinear
from rarefy.runtime.ways import Way
from runtime.nets import exists, have_kernels, mlp, ratio, same, state, thin
from runtime.test_layers import inputs

pytestmark = [
    pytest.mark.usefixtures("no_cache"),
    pytest.mark.skipif(not have_kernels(), reason="there is nothing to choose from without compiled kernels"),
    pytest.mark.filterwarnings("ignore:this process has loaded"),  # said once a process, by whichever packs first
]


@pytest.mark.parametrize(
    "fast", ["bitmap", "index few", "index", "dense few", "dense", "torch"], ids=lambda f: f.replace(" ", "-")
)
@pytest.mark.parametrize("tokens", [1, 5, 9, 64, 130])
def test_what_is_fastest_is_chosen_and_computes_the_same(clock, fast, tokens):
    timer = clock(fast)
    model = thin(mlp(64, 48, 32, 10))
    before, exact = state(model), copy.deepcopy(model)
    x = inputs(tokens, 64)
    report = pack(model, example=x)
    with torch.no_grad():
        assert torch.allclose(model(x), exact(x), atol=1e-5)
        for other in (1, 3, 20, 70, 200):  # buckets that no example had
            assert torch.allclose(model(inputs(other, 64)), exact(inputs(other, 64)), atol=1e-5)
    assert all(fast in row.choice for row in report.rows) or not any(
        name.startswith(fast) for asked in timer.asked for name in asked
    )
    assert "torch" in timer.asked[0]
    assert unpack(model) is model
    assert same(state(model), before)
    assert [type(m) for m in model] == [type(m) for m in exact]


def test_each_bucket_has_its_own_winner(clock, monkeypatch):
    timer = clock()
    model = thin(nn.Sequential(nn.Linear(64, 64)), 0.1)

    def price(name):
        asked = 1 if len(timer.asked) == 1 else 64
        return {("bitmap few", 1): 1e-6, ("bitmap expand", 64): 1e-6}.get((name, asked), 5e-6)

    timer.price = price
    report = pack(model, example=[inputs(1, 64), inputs(64, 64)])
    assert str(model[0].table[0]) == "bitmap few"
    assert str(model[0].table[3]) == "bitmap expand"
    assert all(way.form == Form.BITMAP for way in model[0].table)
    assert {c.tokens for c in report.rows[0].candidates} == {1, 64}


@pytest.mark.parametrize(("counts", "form"), [(None, "dense"), ([1, 1], "dense"), ([64, 1], "bitmap")], ids=str)
def test_examples_count_as_often_as_they_come_up(clock, counts, form):
    """A bitmap reads one token 2 us faster, and 64 tokens 10 us slower."""
    timer = clock()
    model = thin(nn.Sequential(nn.Linear(64, 64)), 0.1)

    def price(name):
        slow = len(timer.asked) > 1
        return {"bitmap": 30e-6 if slow else 4e-6, "dense": 20e-6 if slow else 6e-6}.get(name.split()[0], 9e-5)

    timer.price = price
    report = pack(model, example=[inputs(1, 64), inputs(64, 64)], counts=counts, quantize="int8")
    assert report.rows[0].choice.startswith(form)


@pytest.mark.parametrize("block", [1, 4, 8, 16])
def test_block_patterns_are_seen(clock, block):
    clock(f"index {block}×1" if block > 1 else "index few")
    model = thin(nn.Sequential(nn.Linear(64, 64)), 0.1, block=block)
    exact = copy.deepcopy(model)
    report = pack(model, example=inputs(1, 64))
    assert report.rows[0].pattern == ("unstructured" if block == 1 else f"{block}×1")
    assert isinstance(model[0], PackedLinear)
    assert model[0].stored.block == block
    assert torch.equal(model[0].weight, exact[0].weight)
    assert torch.allclose(model(inputs(40, 64)), exact(inputs(40, 64)), atol=1e-5)


def test_a_few_extra_zeros_may_fill_blocks_up(clock):
    clock("index 4×1")
    model = thin(nn.Sequential(nn.Linear(64, 64)), 0.1, block=4)
    with torch.no_grad():
        model[0].weight[0] = 0
    before = state(model)
    pack(model, example=inputs(1, 64))
    assert model[0].stored.block == 4
    assert same(state(unpack(model)), before)


def test_a_model_that_loses_is_put_back_bit_for_bit(clock):
    clock("bitmap", whole=0.9)
    model = thin(mlp(64, 48, 10))
    before, parameters = state(model), list(model.parameters())
    report = pack(model, example=inputs(1, 64))
    assert report.reverted
    assert same(state(model), before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(row.choice == "torch" for row in report.rows)
    assert report.bytes_after == report.bytes_before
    assert "forward" not in model.__dict__
    assert "put back" in str(report)


def test_plans_that_lose_are_taken_back_first(clock, monkeypatch):
    clock("bitmap")
    model = thin(mlp(64, 48, 10))
    monkeypatch.setattr(measure, "ratios", lambda *_, **__: ratio(0.5 if "forward" in model.__dict__ else 2.0)(*_))
    real, seen = judge.Judge._compare, []

    def compare(self):
        seen.append(bool(self.plans))
        value = 0.5 if self.plans else 2.0
        monkeypatch.setattr(measure, "ratios", ratio(value))
        return real(self)

    monkeypatch.setattr(judge.Judge, "_compare", compare)
    report = pack(model, example=inputs(1, 64))
    assert seen == [True, False]
    assert (report.reverted, report.plans) == (False, ())
    assert isinstance(model[0], PackedLinear)


def test_dense_layers_are_cast_too_where_that_is_faster(clock):
    clock("dense few")
    model = thin(nn.Sequential(nn.Linear(32, 32)), 1.0)
    exact = model[0].weight.detach().bfloat16().float()
    report = pack(model, example=inputs(1, 32), dtype="bfloat16")
    assert report.rows[0].pattern == "dense"
    assert model[0].stored.form == Form.DENSE
    assert torch.equal(model[0].weight, exact)


@pytest.mark.parametrize(("dtype", "quantize", "name"), [("bfloat16", None, "bfloat16"), (None, "int8", "int8")])
def test_casting_and_quantising_are_reported_and_stay(clock, dtype, quantize, name):
    clock("bitmap")
    model = thin(mlp(64, 64, 64))
    exact = copy.deepcopy(model)
    report = pack(model, example=inputs(9, 64), dtype=dtype, quantize=quantize)
    for row, layer, before in zip(report.rows, (model[0], model[2]), (exact[0], exact[2]), strict=True):
        difference = (layer.weight - before.weight).double()
        assert (row.dtype, row.choice.split()[0]) == (name, "bitmap")
        assert row.max_error == pytest.approx(difference.abs().max().item())
        assert row.rms_error == pytest.approx(difference.square().mean().sqrt().item())
        assert 0 < row.max_error <= before.weight.abs().max() / 100
        assert row.bytes_after < row.bytes_before / 2
        assert torch.equal(layer.stored.mask(), before.weight != 0)  # what rounds to 0 stays kept
    assert model(inputs(9, 64)).dtype is torch.float32
    values = [model[0].weight.clone(), model[2].weight.clone()]
    unpack(model)
    assert torch.equal(model[0].weight, values[0])
    assert torch.equal(model[2].weight, values[1])
    assert model[0].weight.dtype is torch.float32
    assert torch.equal(model[0].bias, exact[0].bias)


def test_layers_of_one_kind_are_measured_once(clock):
    timer = clock("bitmap")
    model = nn.Sequential(*[thin(nn.Linear(32, 32), seed=0) for _ in range(6)])
    pack(model, example=inputs(1, 32))
    assert len(timer.asked) == 1


def test_memory_for_speed_keeps_a_second_copy(clock):
    if not exists("look-up few"):
        pytest.skip("this build has no look-up kernel")
    clock("look-up few", "bitmap expand")
    model = thin(nn.Sequential(nn.Linear(128, 64)), 0.1)
    exact = copy.deepcopy(model)
    pack(model, example=[inputs(1, 128), inputs(64, 128)], memory="speed")
    assert {str(way) for way in model[0].table} >= {"look-up few", "bitmap expand"}
    for tokens in (1, 5, 9, 64):
        assert torch.allclose(model(inputs(tokens, 128)), exact(inputs(tokens, 128)), atol=1e-5)
    assert torch.allclose(copy.deepcopy(model)(inputs(1, 128)), exact(inputs(1, 128)), atol=1e-5)
    assert list(model.state_dict()) == ["0.packed_weight", "0.packed_bias"]


def test_measured_for_real_it_gives_the_same_values():
    model = thin(mlp(64, 64, 10))
    exact = copy.deepcopy(model)
    report = pack(model, example=[inputs(1, 64), inputs(16, 64)])
    assert all(c.measured and c.seconds > 0 for row in report.rows for c in row.candidates)
    with torch.no_grad():
        assert torch.allclose(model(inputs(5, 64)), exact(inputs(5, 64)), atol=1e-5)


def test_ways_have_names():
    for text in ("dense torch", "bitmap few", "index 16×1 many", "look-up few"):
        assert str(Way.parse(text)) == text
    for text in ("bitmap", "bitmap slow", "index 4 many", "tree few"):
        with pytest.raises(ValueError, match="no way to run"):
            Way.parse(text)
