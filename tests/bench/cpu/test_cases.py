import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rarefy.bench.cpu import own
from rarefy.bench.cpu.accuracy import outlier_errors
from rarefy.bench.cpu.cases import HELD_OUT, SHAPES, Cell, Zeros, cells, make_weight, parse_shape
from rarefy.bench.cpu.chains import Chain, measure_chain
from rarefy.bench.cpu.context import open_context
from rarefy.bench.cpu.dense import dynamic_int8, dynamic_int8_model, torch_csr, torch_dense
from rarefy.bench.cpu.machine import Machine
from rarefy.bench.cpu.matrices import measure_cell
from rarefy.bench.cpu.peers.environments import Peers, install, need, peers, steps
from rarefy.bench.cpu.timing import Plan
from rarefy.bench.cpu.training import TrainingCase, measure_training
from rarefy.runtime import kernels

NOTHING = ("onnxruntime", "onnx", "openvino", "sparseprop", "llama-cpp-python", "gguf", "deepsparse")
ABSENT = Peers({}, dict.fromkeys(NOTHING, "not installed"))
PLAN = Plan(rounds=2, sample=0.0, settle=0.0)


@pytest.fixture
def context():
    with open_context(1, PLAN, Machine(processors=[0], cache=1 << 12, memory=40.0, peak={"fp32": 100.0}), ABSENT) as c:
        yield c


def test_the_full_plan_holds_every_shape_batch_and_share_that_is_asked_for():
    every = cells()
    assert {(c.out, c.inputs) for c in every} == {*SHAPES, *HELD_OUT}
    assert {c.batch for c in every if not c.held_out} >= {1, 2, 4, 8, 32, 128, 512}
    assert {c.batch for c in every if c.held_out} >= {3, 5, 13, 50, 200}
    main = {str(z) for c in every if c.name == "4096x4096" for z in c.zeros}
    assert main >= {"50 %", "70 %", "80 %", "90 %", "95 %", "99 %", "2:4", "4x1 90 %"}
    assert {c.regime for c in every if c.batch == 1} == {"hot", "cold"}
    assert all(c.held_out == ((c.out, c.inputs) in HELD_OUT) for c in every)
    assert not set(SHAPES) & set(HELD_OUT)


def test_a_choice_of_cells():
    assert {(c.name, c.batch, c.dtype) for c in cells(shapes=[(512, 512)], batches=[8], dtypes=["bf16"])} == {
        ("512x512", 8, "bf16")
    }
    assert len(cells(quick=True)) < len(cells()) / 5


@pytest.mark.parametrize("text", ["", "512", "ax3", "3x0", "1x2x3", "-3x4"])
def test_a_shape_that_is_none(text):
    with pytest.raises(ValueError, match="768x3072"):
        parse_shape(text)


@pytest.mark.parametrize("zeros", [Zeros("unstructured", 0.9), Zeros("2:4", 0.5), Zeros("4x1", 0.8)], ids=str)
def test_a_weight_has_exactly_its_zeros(zeros):
    weight, mask = make_weight(20, 40, zeros, torch.Generator().manual_seed(0))
    assert int(mask.sum()) == round(800 * (1 - zeros.sparsity))
    assert bool((weight[~mask] == 0).all())
    if zeros.pattern == "4x1":
        assert bool((mask.view(5, 4, 40).any(1) == mask.view(5, 4, 40).all(1)).all())


@pytest.mark.parametrize("count", [1, 3])
def test_torch_candidates_compute_the_product(count):
    weight, _ = make_weight(12, 32, Zeros("unstructured", 0.5), torch.Generator().manual_seed(0))
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    expected = F.linear(x, weight)
    for calls, error in (
        (torch_dense(weight, x, torch.float32, count), 0.0), (torch_dense(weight, x, torch.bfloat16, count), 0.03),
        (torch_csr(weight, x, count), 1e-5), (dynamic_int8(weight, x, count), 0.06),
    ):  # fmt: skip
        assert len(calls) == count
        for call in calls:
            assert float((call().float() - expected).abs().max()) <= error


def test_a_model_in_torch_dynamic_int8():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).requires_grad_(False)
    twin = dynamic_int8_model(model, lambda name, layer: name == "0")
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    assert twin is not None
    assert type(model[0]) is nn.Linear
    assert type(twin[0]) is not nn.Linear
    assert twin[2].weight.data_ptr() == model[2].weight.data_ptr()
    torch.testing.assert_close(twin(x), model(x), atol=0.05, rtol=0)
    assert dynamic_int8_model(nn.Sequential(nn.Conv2d(1, 1, 1)), lambda name, layer: True) is None


@pytest.mark.skipif(not kernels.available(), reason="compares compiled kernels")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("zeros", [Zeros("unstructured", 0.75), Zeros("4x1", 0.75)], ids=str)
def test_kernel_candidates_compute_the_product(dtype, tokens, zeros):
    source = torch.Generator().manual_seed(0)
    weight, mask = make_weight(70, 130, zeros, source)
    x = torch.randn(tokens, 130, generator=source)
    found = own.sparse_kernels(weight, mask, zeros, x, dtype, lambda nbytes: 2, 1)
    found |= own.dense_kernels(weight, x, dtype, lambda nbytes: 2, 1)
    assert [name for name, calls in found.items() if isinstance(calls, list)]
    expected = F.linear(x, weight)
    error = {"fp32": 1e-5, "bf16": 0.05, "int8": 0.05}[dtype]
    for name, calls in found.items():
        if isinstance(calls, str):
            continue
        assert len(calls) == 2, name
        for call in calls:
            made = call()
            y = made if isinstance(made, torch.Tensor) else made.y
            torch.testing.assert_close(y, expected, atol=error, rtol=0, msg=name)


@pytest.mark.skipif(not kernels.available(), reason="needs compiled kernels")
def test_the_error_of_int8_with_large_channels_is_that_of_its_arithmetic():
    errors = outlier_errors(48, 256, Zeros("unstructured", 0.5))
    assert 0 < errors.activations < 0.03  # a step of 50·2/127 in three of four groups
    assert errors.activations < errors.whole < 0.04
    assert 0 < errors.largest < 0.03


@pytest.mark.parametrize("regime", ["hot", "cold"])
def test_a_cell_without_peers_says_what_is_left_out(context, regime):
    cell = Cell(64, 32, 1, "fp32", regime, (Zeros("unstructured", 0.9), Zeros("2:4", 0.5)))
    rows = list(measure_cell(cell, context))
    assert [row.sparsity for row in rows] == [0.9, 0.5]
    for row in rows:
        assert {"torch fp32", "torch CSR", "rarefy"} <= set(row.times)
        assert row.left_out["onnxruntime fp32"] == "not installed"
        assert row.ratios["torch fp32"].median > 0
        assert row.bytes is not None
        assert row.facts["byte floor µs"] == round(row.bytes / 40e9 * 1e6, 2)
    assert rows[0].nonzeros == 205
    assert rows[0].choice


@pytest.mark.parametrize("side", [None, 4])
def test_a_chain_is_per_layer_and_image(context, side):
    row = measure_chain(Chain(16, 2, Zeros("unstructured", 0.5), side), context)
    assert {"torch fp32", "rarefy"} <= set(row.times)
    assert row.left_out["DeepSparse"] == "not installed"
    assert row.nonzeros == 128
    assert row.operations == 2 * 128 * (2 if side is None else side**2)


def test_a_training_row(context):
    row = measure_training(TrainingCase((24, 32, 32, 4), 0.5), context)
    assert {"torch fp32", "torch bf16 autocast"} <= set(row.times)
    assert row.nonzeros == (24 * 32 + 32 * 32) // 2
    assert row.left_out["sparseprop"] == "not installed"
    assert "rarefy" in row.times
    assert 10 < row.facts["bytes per non-zero"] < 40


def test_no_step_of_the_installation_may_bring_torch(tmp_path, monkeypatch):
    commands: list[list[str]] = []

    def record(command, **kwargs):
        commands.append(command)

    monkeypatch.setattr("rarefy.bench.cpu.peers.environments.subprocess.run", record)
    assert install(tmp_path, jobs=1) == []
    assert (tmp_path / "constraints.txt").read_text() == "torch<0\n"
    pip = [command for command in commands if "pip" in command]
    assert len(pip) == len(steps())
    for command in pip:
        assert command[command.index("-c") + 1] == str(tmp_path / "constraints.txt")
        packages = command[command.index("-c") + 2 :]
        assert packages
        assert all("==" in package for package in packages)


def test_absent_peers_say_how_to_have_them(tmp_path, monkeypatch):
    monkeypatch.setenv("RAREFY_PEERS", str(tmp_path))
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    found = peers.__wrapped__()
    assert set(found.missing) == set(NOTHING)
    assert "peers install" in found.missing["deepsparse"]
    assert not found.has("onnxruntime")
    with pytest.raises(ModuleNotFoundError):
        need("no_such_module_of_a_peer")
