import copy
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import rarefy
from rarefy.runtime import judge, measure, pack, unpack, warn
from rarefy.runtime.conv import Geometry
from rarefy.runtime.direct import DirectLinear
from rarefy.runtime.kernels import Form
from rarefy.runtime.layers import PackedConv2d, PackedLinear
from rarefy.runtime.ways import Way
from runtime.nets import Clock, GatedMLP, exists, have_kernels, mlp, ratio, thin
from runtime.test_layers import inputs

pytestmark = [
    pytest.mark.skipif(not have_kernels(), reason="there is nothing to choose from without compiled kernels"),
    pytest.mark.filterwarnings("ignore:this process has loaded"),  # said once a process, by whichever packs first
]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("RAREFY_CACHE", "0")


@pytest.fixture
def clock(monkeypatch):
    """`clock(prefix, ...)`: candidates that begin so are fast, the first ones most; packed models are faster."""

    def install(*fast, whole=2.0):
        def price(name):
            order = next((i for i, prefix in enumerate(fast) if name.lower().startswith(prefix)), None)
            return (1 + order) * 1e-7 if order is not None else 8e-6 if name == "torch" else 9e-5

        made = Clock(price)
        monkeypatch.setattr(measure, "times", made.times)
        monkeypatch.setattr(measure, "ratios", ratio(whole))
        return made

    return install


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


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


def test_dense_layers_are_cast_too_where_that_is_faster(clock):
    clock("dense few")
    model = thin(nn.Sequential(nn.Linear(32, 32)), 1.0)
    exact = model[0].weight.detach().bfloat16().float()
    report = pack(model, example=inputs(1, 32), dtype="bfloat16")
    assert report.rows[0].pattern == "dense"
    assert model[0].stored.form == Form.DENSE
    assert torch.equal(model[0].weight, exact)


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


def test_layers_of_one_kind_are_measured_once(clock):
    timer = clock("bitmap")
    model = nn.Sequential(*[thin(nn.Linear(32, 32), seed=0) for _ in range(6)])
    pack(model, example=inputs(1, 32))
    assert len(timer.asked) == 1


def test_memory_for_speed_keeps_a_second_copy(clock):
    if not exists("look-up few"):
        pytest.skip("this build has no look-up kernel")
    clock("look-up", "bitmap expand")
    model = thin(nn.Sequential(nn.Linear(128, 64)), 0.1)
    exact = copy.deepcopy(model)
    pack(model, example=[inputs(1, 128), inputs(64, 128)], memory="speed")
    assert {str(way) for way in model[0].table} >= {"look-up few", "bitmap expand"}
    for tokens in (1, 5, 9, 64):
        assert torch.allclose(model(inputs(tokens, 128)), exact(inputs(tokens, 128)), atol=1e-5)
    assert torch.allclose(copy.deepcopy(model)(inputs(1, 128)), exact(inputs(1, 128)), atol=1e-5)
    assert list(model.state_dict()) == ["0.packed_weight", "0.packed_bias"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float8"}, "bfloat16"),
        ({"quantize": "int4"}, "int8"),
        ({"dtype": "bfloat16", "quantize": "int8"}, "one of them"),
        ({"threads": 0}, "at least one thread"),
        ({"memory": "all"}, "'size'"),
        ({"example": []}, "no example"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for(options, words):
    model = thin(mlp(8, 8))
    with pytest.raises(ValueError, match=words):
        pack(model, **{"example": inputs(1, 8), **options})
    assert type(model[0]) is nn.Linear


def test_models_that_cannot_be_packed(clock):
    clock("bitmap")
    model = thin(mlp(8, 8, 8))
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="'2' has NaN"):
        pack(model, example=inputs(1, 8))
    with pytest.raises(ValueError, match="meta"):
        pack(mlp(8, 8).to("meta"), example=inputs(1, 8))
    with torch.no_grad():
        model[2].weight[0, 0] = 0
    pack(model, example=inputs(1, 8))
    with pytest.raises(ValueError, match="packed already"):
        pack(model, example=inputs(1, 8))
    unpack(model)
    pack(model, example=inputs(1, 8))


def test_subclasses_and_computed_weights_are_left_alone(clock):
    clock("bitmap")

    class Own(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    model = nn.Sequential(Own(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    report = pack(model.eval(), example=inputs(1, 8))
    assert [row.name for row in report.rows] == ["2"]


def test_the_report_is_json_and_a_table(clock):
    clock("bitmap")
    report = pack(thin(mlp(64, 48, 10)), example=inputs(1, 64))
    content = json.loads(json.dumps(report.to_dict()))
    assert [row["name"] for row in content["layers"]] == ["0", "2"]
    assert content["layers"][0]["candidates"][0].keys() == {"way", "tokens", "seconds", "measured"}
    assert content["totals"]["bytes_after"] == report.bytes_after < report.bytes_before
    assert content["whole"][0]["ratio"] == 2.0
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "shape", "sparsity", "pattern", "dtype", "choice", "torch", "chosen",
                                "speed-up", "bytes"]  # fmt: skip
    assert "48×64" in lines[1]
    assert "2.00×" in lines[-1]


def test_progress_is_told(clock):
    clock("bitmap")
    told = []
    pack(thin(mlp(8, 8, 8)), example=inputs(1, 8), progress=lambda *now: told.append(now))
    assert told == [(0, 2, "0"), (1, 2, "2"), (2, 2, "")]


def test_measured_for_real_it_gives_the_same_values():
    model = thin(mlp(64, 64, 10))
    exact = copy.deepcopy(model)
    report = pack(model, example=[inputs(1, 64), inputs(16, 64)])
    assert all(c.measured and c.seconds > 0 for row in report.rows for c in row.candidates)
    with torch.no_grad():
        assert torch.allclose(model(inputs(5, 64)), exact(inputs(5, 64)), atol=1e-5)


def test_several_threads_run_one_packed_model(clock):
    clock("bitmap")
    model = thin(mlp(64, 48, 10))
    pack(model, example=inputs(1, 64))
    xs = [inputs(tokens, 64, seed=tokens) for tokens in (1, 4, 9)]
    with torch.no_grad():
        exact = [model(x) for x in xs]
    wrong = []

    def work():
        with torch.no_grad():
            for _ in range(100):
                wrong.extend(1 for x, y in zip(xs, exact, strict=True) if not torch.equal(model(x), y))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _in_child(model, x, queue):
    with torch.no_grad():
        queue.put(model(x).tolist())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_runs_what_was_packed_before(clock):
    clock("bitmap")
    model = thin(mlp(64, 48, 10))
    pack(model, example=inputs(1, 64))
    x = inputs(3, 64)
    with torch.no_grad():
        exact = model(x)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(model, x, queue))
    child.start()
    found = torch.tensor(queue.get())
    child.join(30)
    assert child.exitcode == 0
    assert torch.equal(found, exact)


def test_a_second_openmp_runtime_is_warned_of(tmp_path, monkeypatch):
    maps = tmp_path / "maps"
    line = "7f00-7f01 r-xp 00000000 08:01 123  {}\n"
    maps.write_text(line.format("/site/torch/lib/libgomp-a34b.so.1") * 2 + line.format("/x/libc.so.6"))
    assert warn.openmp_runtimes(maps) == ["libgomp-a34b.so.1"]
    with maps.open("a") as file:
        file.write(line.format("/usr/lib/libiomp5.so") + line.format("/usr/lib/libomp.so.5"))
    assert len(warn.openmp_runtimes(maps)) == 3
    assert warn.openmp_runtimes(tmp_path / "none") == []
    monkeypatch.setattr(warn, "openmp_runtimes", lambda: ["libgomp.so.1", "libiomp5.so"])
    warn.warn_once.cache_clear()
    warnings.simplefilter("always")
    with pytest.warns(UserWarning, match="2 OpenMP runtimes"):
        warn.warn_once()
    warn.warn_once()  # once


_WITHOUT = """
import warnings, torch, rarefy
from rarefy.runtime.forms import encode
from rarefy.runtime.layers import PackedLinear
model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU()).eval()
with torch.no_grad():
    model[0].weight[:, 4:] = 0
x = torch.randn(3, 16)
y = model(x)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    report = rarefy.pack(model, example=x)
    layer = PackedLinear.convert(model[0], encode(model[0].weight.detach()))
    for _ in range(2):
        assert torch.allclose(model(x), y, atol=1e-6)
    z = x.clone().requires_grad_()
    model(z).sum().backward()
print(len([w for w in caught if "torch" in str(w.message)]), report.rows[0].choice, z.grad.abs().sum() > 0)
rarefy.unpack(model)
assert torch.equal(model(x), y)
"""


def test_without_kernels_torch_does_it_and_says_so():
    environment = {**os.environ, "RAREFY_NATIVE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "torch", "tensor(True)"]


def test_ways_have_names():
    for text in ("dense torch", "bitmap few", "index 16×1 many", "look-up few"):
        assert str(Way.parse(text)) == text
    for text in ("bitmap", "bitmap slow", "index 4 many", "tree few"):
        with pytest.raises(ValueError, match="no way to run"):
            Way.parse(text)


def test_a_model_in_sparse_training_is_refused():
    model = nn.Sequential(nn.Linear(32, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = rarefy.Random(sparsity=0.5, allocation="uniform")
    sparsity = rarefy.sparsify(model, method, optimizer=optimizer, steps=10, execution="sparse")
    with pytest.raises(ValueError, match=r"sparsity.end\(\) first"):
        rarefy.pack(model, example=torch.randn(1, 32))
    sparsity.end()
    assert rarefy.pack(model, example=torch.randn(1, 32)).rows
