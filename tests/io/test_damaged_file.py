"""Files that no `save` wrote: refused with a reason, or loaded as what was saved; never a crash."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import file_models as models
from rarefy.io import load, save
from rarefy.runtime.forms import encode
from rarefy.runtime.kernels import Form
from rarefy.runtime.layers import PackedLinear


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(70, 6), nn.LayerNorm(6), nn.Linear(6, 5, bias=False))


def saved(path: Path) -> tuple[nn.Sequential, bytes]:
    """A model of two packed layers (a bitmap; blocks in panels), its file and its bytes."""
    torch.manual_seed(0)
    model = small()
    with torch.no_grad():
        model[0].weight.masked_fill_(torch.rand(6, 70) < 0.5, 0)
        model[2].weight.masked_fill_(torch.rand(5, 6) < 0.5, 0)
    PackedLinear.convert(model[0], encode(model[0].weight))
    PackedLinear.convert(model[2], encode(model[2].weight, form=Form.INDEX16, block=4))
    save(model, path)
    return model, path.read_bytes()


class Trial:
    """One file after the other at a path, each a new one: a map of the last may still be alive."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.safetensors"
        self.model, self.data = saved(self.path)
        self.state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def refused(self, data: bytes, *, verify: bool = True, exact: bool = True) -> bool:
        """Whether a file of these bytes is refused; what is not is what was saved, or (not exact) as safe to run."""
        self.path.unlink(missing_ok=True)
        self.path.write_bytes(data)
        try:
            model = load(self.path, small(), verify=verify)
        except ValueError as error:
            said = str(error)
            assert str(self.path) in said
            return True
        state = model.state_dict()
        assert state.keys() == self.state.keys()
        if exact:
            assert all(torch.equal(tensor, state[name]) for name, tensor in self.state.items())
        else:
            assert model[0].weight.shape == (6, 70)
            assert model[2].weight.shape == (5, 6)
        return False


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial(tmp_path)


def flipped(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def written(header: dict[str, Any], rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + rest


def resealed(data: bytes, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    """The file with its table and contents changed by one who knows how its checksums are made."""
    header, rest = header_of(data)
    metadata = header.pop("__metadata__")
    contents = json.loads(metadata["rarefy"])
    change(header, contents)
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        if isinstance(contents["checksums"], dict) and name in contents["checksums"]:
            contents["checksums"][name] = zlib.crc32(rest[first:last])
    text = json.dumps(contents, separators=(",", ":"))
    table = json.dumps(header, separators=(",", ":"), sort_keys=True)
    metadata = {"rarefy": text, "checksum": f"{zlib.crc32((text + table).encode()):08x}"}
    return written({"__metadata__": metadata, **header}, rest)


def test_the_file_as_it_is(trial: Trial):
    assert not trial.refused(trial.data)
    assert not trial.refused(resealed(trial.data, lambda table, contents: None))


def test_flips(trial: Trial):
    """Any bit: refused, but where it stands between two tensors."""
    generator = np.random.default_rng(0)
    places = generator.integers(0, len(trial.data), size=600).tolist()
    refused = [trial.refused(flipped(trial.data, place, int(generator.integers(8)))) for place in places]
    header, _ = header_of(trial.data)
    gaps = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for n, entry in header.items() if "__pad" in n)
    assert sum(refused) / len(refused) > 0.95 * (1 - gaps / len(trial.data))


@pytest.mark.slow
def test_flips_of_every_byte(trial: Trial):
    for place in range(len(trial.data)):
        for bit in (0, 3, 7):
            trial.refused(flipped(trial.data, place, bit))


def test_flips_without_checksums(trial: Trial):
    """Values may be others then, but what is loaded is safe to run."""
    generator = np.random.default_rng(1)
    first = len(trial.data) - len(header_of(trial.data)[1])
    places = generator.integers(first, len(trial.data), size=150).tolist()
    refused = [
        trial.refused(flipped(trial.data, place, int(generator.integers(8))), verify=False, exact=False)
        for place in places
    ]
    assert 0 < sum(refused) < len(refused)


def test_cut_anywhere(trial: Trial):
    generator = np.random.default_rng(2)
    header, rest = header_of(trial.data)
    first = len(trial.data) - len(rest)
    borders = [first + end for name, entry in header.items() if name[:2] != "__" for end in entry["data_offsets"]]
    lengths = {*range(70), first - 1, first, *borders, *generator.integers(0, len(trial.data), size=200).tolist()}
    for length in lengths - {len(trial.data)}:
        assert trial.refused(trial.data[:length])
    assert trial.refused(trial.data + b"\0")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(
    data=st.binary(max_size=300), keep=st.integers(0, 200), claims=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
)  # fmt: skip
def test_any_bytes(trial: Trial, data: bytes, keep: int, claims: int | None):
    head = trial.data[:8] if claims is None else claims.to_bytes(8, "little")
    assert trial.refused(head + trial.data[8 : 8 + keep] + data)


@pytest.mark.parametrize("length", [10**9, 2**63, 2**64 - 1, 100_000_001])
def test_headers_that_claim_gigabytes(length: int, trial: Trial):
    assert trial.refused(length.to_bytes(8, "little") + trial.data[8:])
    with pytest.raises(ValueError, match=f"claims {length} bytes, in a file of {len(trial.data)}"):
        load(trial.path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[1, 2]", "no JSON object"),
        (b"[" * 100_000, "no JSON"),
        (b'{"a": ' * 50_000, "no JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "no JSON"),
        (b'{"a": 3}', "'a' has no dtype"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', "'a' has no dtype"),
        (b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', "'a' has dtype 'F99'"),
        (b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}', "'a' has dtype"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "'a' has dtype"),
        (b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}', "'a' has dtype"),
        (b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "'a' has dtype"),
        (b'{"a": {"dtype": "F32", "shape": [4611686018427387904], "data_offsets": [0, 4]}}', "'a' has dtype"),
        (b'{"a": {"dtype": "F32", "shape": [2147483648, 2147483648, 0], "data_offsets": [0, 0]}}', "does not take 0"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "does not take 4 bytes"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "begins at 4, not at 0"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}', "does not take -4 bytes"),
        (b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}', "take 36 bytes, the file has 4"),
        (b'{"__metadata__": 4}', "metadata are no JSON object"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', "without rarefy's header"),
        (b'{"__metadata__": {"rarefy": "{}"}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', "without"),
    ],
)
def test_headers(text: bytes, says: str, tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ValueError, match=says):
        load(path)


def test_files_of_others(tmp_path: Path):
    path = tmp_path / "file"
    safetensors.torch.save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"safetensors\.torch\.load_file reads others"):
        load(path)
    path.unlink()
    torch.save({"weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="it is no safetensors file"):
        load(path)
    for data in (b"", b"1234567"):
        path.unlink()
        path.write_bytes(data)
        with pytest.raises(ValueError, match="at least 8 bytes"):
            load(path)


def set_in(where: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """A change of the contents: `packed.0.form` is contents["packed"][0]["form"]."""

    def change(table: dict[str, Any], contents: Any) -> None:
        *path, last = (int(word) if word.isdigit() else word for word in where.split("."))
        for word in path:
            contents = contents[word]
        contents[last] = value

    return change


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("version", 2), ("version", "1"), ("version", None), ("more", 1), ("packed", {}), ("tied", [1]),
        ("checksums", 3), ("packed.0.form", 16), ("packed.0.form", 4), ("packed.0.form", 99), ("packed.0.form", "1"),
        ("packed.0.block", 3), ("packed.0.block", 2**70), ("packed.0.names", []), ("packed.0.names", ["nowhere"]),
        ("packed.0.tensor", "nowhere"), ("packed.0.tensor", "1.weight"), ("packed.0.bias", "nowhere"),
        ("packed.0.bias", "1.weight.x"), ("packed.0.bias", None), ("packed.0.description", {}),
        ("packed.0.description.kind", "Embedding"), ("packed.0.description.in_features", 71),
        ("packed.0.description.in_features", -1), ("packed.0.description.in_features", "many"),
        ("packed.0.description.weight_dtype", "float8"), ("packed.0.description.weight_dtype", 7),
        ("packed.0.description.device", "cuda"), ("packed.0.description.stored", 1),
        ("packed.0.description.trained", 5), ("tied", {"a": "b"}), ("tied", {"a": "1.weight"}),
    ],
)  # fmt: skip
def test_hostile_contents(where: str, value: Any, trial: Trial):
    assert trial.refused(resealed(trial.data, set_in(where, value)))


def test_another_version_is_named(trial: Trial):
    assert trial.refused(resealed(trial.data, set_in("version", 7)))
    with pytest.raises(ValueError, match=r"it is of version 7; this rarefy reads version 1\. Update rarefy"):
        load(trial.path)


def test_a_hostile_index_behind_right_checksums(trial: Trial):
    """Bits past the last column, set by one who knows the checksums: the index is validated all the same."""
    header, rest = header_of(trial.data)
    first = len(trial.data) - len(rest) + header["0.packed"]["data_offsets"][0]
    assert trial.data[first : first + 6] == b"rarefy"
    place = first + 128 + 15  # the highest byte of the second word of row 0; columns end at 70
    for data in (
        flipped(trial.data, place, 7),
        flipped(trial.data, first + 24, 3),
        flipped(trial.data, first + 128, 0),
    ):
        sealed = resealed(data, lambda table, contents: None)
        assert trial.refused(sealed)
        assert trial.refused(sealed, verify=False)
        with pytest.raises(ValueError, match="damaged"):
            load(trial.path)


def test_booleans_that_are_neither(tmp_path: Path):
    path = tmp_path / "file"
    model = nn.Module()
    model.register_buffer("flags", torch.tensor([True, False]))
    save(model, path)
    header, rest = header_of(path.read_bytes())
    damaged = resealed(written(header, b"\x02" + rest[1:]), lambda table, contents: None)
    path.unlink()
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        load(path)


def test_misaligned_tensors(tmp_path: Path):
    path = tmp_path / "file"
    save(nn.Linear(3, 1), path)
    header, rest = header_of(path.read_bytes())
    metadata = header["__metadata__"]
    contents = metadata["rarefy"]
    table = {
        "weight": {"dtype": "F32", "shape": [1, 3], "data_offsets": [0, 12]},
        "bias": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]},
    }
    sealed = {"rarefy": contents, "checksum": metadata["checksum"]}
    damaged = resealed(written({"__metadata__": sealed, **table}, rest[:16]), lambda table, contents: None)
    path.unlink()
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="no multiple of 64"):
        load(path)


def test_models_of_the_other_tests_are_what_they_say():
    dense, packed = models.both()
    assert all(torch.equal(dense[place].weight, packed[place].weight) for place in (0, 3, 5, 7))
