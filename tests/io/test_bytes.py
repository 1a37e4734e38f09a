"""What a file of `save` is: how many bytes, where its tensors begin, and that others can read it."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import file_models as models
from rarefy.io import container, load, save
from rarefy.runtime.forms import FileForm, encode, from_bytes
from rarefy.runtime.kernels import Form
from rarefy.runtime.layers import PackedLinear


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def stated(path: Path) -> tuple[dict[str, Any], int]:
    """A file's header, read independently, and where the tensors begin."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), 8 + length


def test_safetensors_reads_the_file(path: Path):
    _, packed = models.both()
    save(packed, path)
    raw = safetensors.torch.load_file(path)
    assert torch.equal(raw["1.running_var"], packed[1].running_var)
    assert torch.equal(raw["5.bias"], packed[5].bias)
    assert torch.equal(from_bytes(raw["5.packed"]).dense(), packed[5].weight)
    assert raw["__pad__.0"].dtype == torch.uint8
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.metadata()) == {"rarefy", "checksum"}
        assert json.loads(file.metadata()["rarefy"])["version"] == 1


def odd_sizes() -> nn.Module:
    """Buffers of every dtype, five entries each, and one without entries."""
    model = nn.Module()
    for name, dtype in container.DTYPES.items():
        model.register_buffer(name.lower(), torch.arange(5).to(dtype))
    model.register_buffer("empty", torch.empty(0, 3))
    return model


def test_every_tensor_begins_at_a_multiple_of_64_bytes(path: Path):
    save(odd_sizes(), path)
    header, first = stated(path)
    assert first % 64 == 0
    for name, entry in header.items():
        if not name.startswith("__"):
            assert entry["data_offsets"][0] % 64 == 0, name


@pytest.mark.parametrize(("density", "form"), [(0.5, Form.BITMAP), (0.95, Form.BITMAP), (0.05, FileForm.PANEL8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("runs_as", [Form.BITMAP, Form.INDEX16])
def test_bytes_of_the_smaller_form(density: float, form: Form, dtype: torch.dtype, runs_as: Form, path: Path):
    rows, cols = 300, 2048
    layer = models.linear(rows, cols, density, dtype)
    kept, width = layer.stored.units, dtype.itemsize
    if runs_as == Form.INDEX16:
        weight = layer.stored
        layer = PackedLinear.convert(
            nn.Linear(cols, rows, bias=False),
            encode(weight.entries(), mask=weight.mask(), form=runs_as, scales=weight.scales),
        )
    save(nn.Sequential(layer, nn.BatchNorm1d(rows)), path)
    values = kept * width + (rows * 4 if dtype == torch.int8 else 0)
    bitmap, panels = rows * cols // 8 + values, kept + rows * cols // 256 + values
    assert (form == Form.BITMAP) == (bitmap <= panels)
    tensors, others = 6, 4 * rows * 4 + 8
    assert path.stat().st_size <= 1.01 * (min(bitmap, panels) + others) + 4096 * tensors
    assert path.stat().st_size <= min(bitmap, panels) + others + 3000
    assert from_bytes(safetensors.torch.load_file(path)["0.packed"]).form == form
    assert load(path, nn.Sequential(nn.Linear(cols, rows, bias=False), nn.BatchNorm1d(rows)))[0].stored.form == runs_as


def test_the_same_model_makes_the_same_file(path: Path):
    _, packed = models.both()
    save(packed, path)
    first = path.read_bytes()
    save(packed, path)
    assert path.read_bytes() == first
    save(load(path, models.build()), path)  # onto the file that it is mapped from
    assert path.read_bytes() == first
