import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import rarefy
from rarefy.runtime import pack, unpack
from runtime.nets import have_kernels, mlp, thin
from runtime.test_layers import inputs

pytestmark = [
    pytest.mark.usefixtures("no_cache"),
    pytest.mark.skipif(not have_kernels(), reason="there is nothing to choose from without compiled kernels"),
    pytest.mark.filterwarnings("ignore:this process has loaded"),  # said once a process, by whichever packs first
]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float8"}, "bfloat16"),
        ({"quantize": "int4"}, "int8"),
        ({"dtype": "bfloat16", "quantize": "int8"}, "one of them"),
        ({"threads": 0}, "at least one thread"),
        ({"memory": "all"}, "'size'"),
        ({"example": []}, "no example"),
        ({"counts": [1, 1]}, "1 whole numbers"),
        ({"counts": [0]}, "from 1 on"),
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


def test_a_model_in_sparse_training_is_refused():
    model = nn.Sequential(nn.Linear(32, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = rarefy.Random(sparsity=0.5, allocation="uniform")
    sparsity = rarefy.sparsify(model, method, optimizer=optimizer, steps=10, execution="sparse")
    with pytest.raises(ValueError, match=r"sparsity.end\(\) first"):
        rarefy.pack(model, example=torch.randn(1, 32))
    sparsity.end()
    assert rarefy.pack(model, example=torch.randn(1, 32)).rows
