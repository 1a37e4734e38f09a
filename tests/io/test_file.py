"""`save` and `load`: what comes back, what a file holds and how much, and every refusal."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import file_models as models
from rarefy.io import container, load, save
from rarefy.runtime.forms import encode
from rarefy.runtime.kernels import DType
from rarefy.runtime.layers import Packed, PackedLinear


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def assert_same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert b[name].dtype == tensor.dtype, name
        assert torch.equal(b[name], tensor), name


# --- round trips -----------------------------------------------------------------------------------------------------


def test_a_state_dict_of_the_dense_model_comes_back(path: Path):
    dense, packed = models.both()
    save(packed, path)
    assert_same_state(dict(dense.state_dict()), load(path))
    models.build().load_state_dict(load(path))


def test_a_packed_model_comes_back(path: Path):
    dense, packed = models.both()
    save(packed, path)
    fresh = models.build()
    layers = list(fresh)
    assert load(path, fresh) is fresh
    assert list(fresh) == layers  # the same objects: hooks and references stay
    assert [type(each) for each in fresh] == [type(each) for each in packed]
    for mine, other in zip(fresh, packed, strict=True):
        if isinstance(mine, Packed):
            assert mine.describe() == other.describe()
            assert mine.stored.header == other.stored.header
            assert torch.equal(mine.stored.bytes, other.stored.bytes)
    assert_same_state(dict(fresh.state_dict()), dict(packed.state_dict()))
    for name, module in dense.named_modules():
        if name in ("0", "3", "5", "7"):
            assert torch.equal(fresh.get_submodule(name).weight, module.weight)


def test_it_computes_what_it_did(path: Path):
    dense, packed = models.both()
    save(packed, path)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    fresh, dense = load(path, models.build()).eval(), dense.double().eval()
    weights = [fresh.get_submodule(name).weight for name in ("0", "3", "5", "7")]
    again = models.build().eval()
    again.load_state_dict(load(path))
    torch.testing.assert_close(again(x).double(), dense(x.double()), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(w, again.get_submodule(n).weight) for w, n in zip(weights, "0357", strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
def test_every_dtype_comes_back(dtype: torch.dtype, density: float, path: Path):
    layer = models.linear(40, 700, density, dtype)
    save(layer, path)
    fresh = load(path, nn.Linear(700, 40, bias=False))
    assert isinstance(fresh, PackedLinear)
    assert torch.equal(fresh.stored.bytes, layer.stored.bytes)
    assert fresh.weight.dtype == layer.weight.dtype
    assert torch.equal(fresh.weight, layer.weight)
    assert torch.equal(fresh.stored.mask(), layer.stored.mask())
    assert torch.equal(load(path)["weight"], layer.weight)


def test_kept_zeros_stay_kept(path: Path):
    mask = torch.rand(8, 600, generator=torch.Generator().manual_seed(0)) < 0.05
    layer = PackedLinear.convert(nn.Linear(600, 8, bias=False), encode(torch.zeros(8, 600), mask=mask))
    save(layer, path)
    assert torch.equal(load(path, nn.Linear(600, 8, bias=False)).stored.mask(), mask)


def test_a_model_on_the_meta_device_is_filled(path: Path):
    _, packed = models.both()
    save(packed, path)
    with torch.device("meta"):
        fresh = models.build()
    load(path, fresh)
    assert not any(tensor.is_meta for tensor in fresh.state_dict().values())
    assert_same_state(dict(fresh.state_dict()), dict(packed.state_dict()))


def test_the_file_says_dtype_and_what_was_trained(path: Path):
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)).to(torch.bfloat16)
    model[0].bias.requires_grad_(False)
    PackedLinear.convert(model[0], encode(model[0].weight))
    save(model, path)
    fresh = load(path, nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)))
    assert fresh[1].weight.dtype == torch.bfloat16
    assert fresh[1].weight.requires_grad
    assert fresh[0].describe() == model[0].describe()
    assert fresh[0].restore().bias.requires_grad is False
    assert fresh[0].weight.requires_grad
    assert fresh[0].weight.dtype == torch.bfloat16


def test_a_dense_model_is_a_file_too(path: Path):
    model = models.sparse()
    save(model, path)
    assert_same_state(dict(load(path, models.build()).state_dict()), dict(model.state_dict()))


def test_a_model_without_tensors(path: Path):
    save(nn.ReLU(), path)
    assert load(path) == {}
    assert isinstance(load(path, nn.ReLU()), nn.ReLU)


class Everything(nn.Module):
    """Buffers of every dtype and shape, one of them not persistent, and state beside the tensors."""

    def __init__(self, fill: int) -> None:
        super().__init__()
        for name, dtype in container.DTYPES.items():
            self.register_buffer(name.lower(), (torch.arange(5) * fill).to(dtype))
        self.register_buffer("scalar", torch.tensor(fill))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("none", None)
        self.register_buffer("strided", (torch.arange(12.0) * fill).view(3, 4).t())
        self.register_buffer("passing", torch.tensor(fill), persistent=False)

    def get_extra_state(self) -> torch.Tensor:
        return self.scalar + 1

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.extra = state


def test_buffers_are_handled_as_state_dict_does(path: Path):
    model, fresh = Everything(1), Everything(0)
    save(model, path)
    load(path, fresh)
    for name, tensor in model.state_dict().items():
        if not name.startswith("_"):
            other = fresh.state_dict()[name]
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(
                other.contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)
            )
    assert fresh.passing == 0
    assert fresh.extra == 2


def test_state_that_is_no_tensor_is_refused(path: Path):
    class Counting(nn.Module):
        def get_extra_state(self) -> Any:
            return {"calls": 3}

    with pytest.raises(
        ValueError, match=r"'0._extra_state' in the model's state is no tensor but dict.*get_extra_state"
    ):
        save(nn.Sequential(Counting()), path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.empty(3, device="meta"), "on the meta device"),
        (torch.zeros(3, dtype=torch.complex128), "complex128, which safetensors does not have"),
        (torch.eye(3).to_sparse(), "layout is torch.sparse_coo"),
    ],
)
def test_tensors_that_no_file_holds_are_refused(tensor: torch.Tensor, says: str, path: Path):
    model = nn.Module()
    model.register_buffer("odd", tensor)
    with pytest.raises(ValueError, match=f"'odd' cannot be saved: .*{says}"):
        save(model, path)
    assert not path.exists()


# --- what is tied ----------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding and a head that share their weight, and two packed layers that share theirs, one of them twice."""

    def __init__(self, *, tie: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.again = self.a
        if tie:
            self.head.weight = self.embedding.weight


@pytest.mark.parametrize("built_tied", [True, False])
def test_tied_tensors_are_stored_once_and_tied_again(built_tied: bool, path: Path):
    model = Tied()
    shared = encode(model.a.weight)
    PackedLinear.convert(model.a, shared)
    PackedLinear.convert(model.b, shared)
    save(model, path)
    raw = safetensors.torch.load_file(path)
    assert sorted(name for name in raw if not name.startswith("__pad__")) == [
        "a.bias", "a.packed", "b.bias", "embedding.weight",
    ]  # fmt: skip
    fresh = load(path, Tied(tie=built_tied))
    assert fresh.head.weight is fresh.embedding.weight
    assert torch.equal(fresh.head.weight, model.head.weight)
    assert fresh.again is fresh.a
    assert fresh.a.stored.bytes.data_ptr() == fresh.b.stored.bytes.data_ptr()
    assert not torch.equal(fresh.a.bias, fresh.b.bias)
    state = load(path)
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()
    assert torch.equal(state["again.weight"], model.a.weight)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_other_architectures_are_refused_and_left_as_they_are(path: Path):
    _, packed = models.both()
    save(packed, path)
    others: list[tuple[Any, str]] = [
        (nn.Sequential(*models.build()[:-1]), r"2 tensors \(8.bias, 8.weight\) not in the model"),
        (nn.Sequential(*models.build(), nn.Linear(9, 9)), r"2 tensors \(9.bias, 9.weight\) not in the file"),
        (nn.Linear(3, 3), "'0' is a packed layer in the file; the model has no layer"),
        (changed(0, nn.Conv2d(3, 8, 3, stride=1, padding=1)), r"'0' is another layer: stride \[2, 2\] in the file"),
        (changed(0, nn.Conv2d(3, 8, 3, 2, 1, padding_mode="circular")), "padding_mode zeros in the file, circular in"),
        (changed(0, nn.Conv2d(3, 8, 3, 2, 1, dilation=2)), r"dilation \[1, 1\] in the file, \(2, 2\) in the model"),
        (changed(0, nn.Conv2d(3, 8, 3, 2, 1, bias=False)), "bias True in the file, False in the model"),
        (changed(0, nn.ConvTranspose2d(8, 3, 3)), "'0'.* is a Conv2d in the file, a ConvTranspose2d in the model"),
        (changed(0, nn.Conv2d(3, 9, 3, 2, 1)), r"'0' has a weight of \(8, 27\) in the file, of \(9, 3, 3, 3\)"),
        (changed(1, nn.BatchNorm2d(9)), r"'1.weight' has shape \(8,\) in the file, \(9,\) in the model"),
        (changed(5, nn.ReLU()), "'5' is a packed layer in the file; the model has no layer"),
        (changed(7, packed[7]), "'7' of the model is packed already"),
    ]
    for other, says in others:
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        classes = [type(module) for module in other.modules()]
        with pytest.raises(ValueError, match=says) as raised:
            load(path, other)
        assert str(raised.value).count(str(path)) == 1
        assert [type(module) for module in other.modules()] == classes
        assert_same_state(before, dict(other.state_dict()))


def changed(place: int, layer: nn.Module) -> nn.Sequential:
    model = models.build()
    model[place] = layer
    return model


def test_missing_files_and_folders_say_so(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError):
        save(nn.Linear(1, 1), tmp_path / "none" / "model.safetensors")
    with pytest.raises(IsADirectoryError):
        load(tmp_path)


def test_loaded_models_are_ordinary(path: Path):
    """They train, copy and are saved; the file stays as it was."""
    _, packed = models.both()
    save(packed, path)
    before = path.read_bytes()
    model = load(path, models.build())
    model[8].weight.data.add_(1)
    twin = copy.deepcopy(model)
    assert_same_state(dict(twin.state_dict()), dict(model.state_dict()))
    assert path.read_bytes() == before
    assert np.prod(model[8].weight.shape) == model[8].weight.untyped_storage().nbytes() / 4  # a storage of its own
    assert model[5].stored.dtype == DType.F32
