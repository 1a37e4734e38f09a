"""`read_model` and `write_model`: every refusal, and what it leaves."""

import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import model_directories as directories
import rarefy
from model_directories import copied, nothing_left, put_together, refused, taken_apart
from rarefy.io import Journal, check_directory, read_model, write_model
from rarefy.io.shards import INDEX, WEIGHTS, Shards


def test_directories_that_are_none(llama: Path, change: Any, tmp_path: Path):
    refused(tmp_path / "none", change, tmp_path / "out", "no such directory", FileNotFoundError)
    refused(llama / "config.json", change, tmp_path / "out", "is a file", NotADirectoryError)
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, change, tmp_path / "out", "is not a model directory: it has no config.json")
    (empty / "config.json").write_text("{}")
    (empty / "pytorch_model.bin").write_bytes(b"")
    refused(empty, change, tmp_path / "out", "has neither model.safetensors nor .*; it has pytorch_model.bin")
    (empty / "config.json").write_text("{")
    (empty / WEIGHTS).write_bytes((llama / WEIGHTS).read_bytes())
    refused(empty, change, tmp_path / "out", "config.json is no JSON")
    (empty / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"architectures=None, which is no class of transformers"):
        read_model(empty)


def test_a_missing_shard_is_named(sharded: Path, tmp_path: Path):
    source = copied(sharded, tmp_path / "source")
    gone = sorted(source.glob("*.safetensors"))[1]
    gone.unlink()
    _, changes, record = directories.pruned(sharded)
    refused(source, (changes, record), tmp_path / "out", f"missing: {gone.name}. Download or copy")
    with pytest.raises(ValueError, match=gone.name):
        read_model(source)


@pytest.mark.parametrize("cut", [4, 20, 1000, 30_000])
def test_a_shard_that_is_cut_short(cut: int, llama: Path, change: Any, tmp_path: Path):
    source = copied(llama, tmp_path / "source")
    (source / WEIGHTS).write_bytes((llama / WEIGHTS).read_bytes()[:cut])
    refused(source, change, tmp_path / "out", f"{WEIGHTS}: .*cut short")


def test_damaged_indices(sharded: Path, tmp_path: Path):
    source = copied(sharded, tmp_path / "source")
    index = json.loads((source / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    for where, says in (
        ({**index["weight_map"], "model.norm.weight": "../model.safetensors"}, "not a file in that directory"),
        ({**index["weight_map"], "model.more.weight": shards[0]}, "'model.more.weight' is in .* no such tensor"),
        ({}, "no 'weight_map'"),
    ):
        (source / INDEX).write_text(json.dumps({**index, "weight_map": where}))
        with pytest.raises(ValueError, match=says):
            Shards(source)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named_and_counted(value: float, llama: Path, change: Any, tmp_path: Path):
    source = copied(llama, tmp_path / "source")
    table, body = taken_apart(source / WEIGHTS)
    first = table["model.norm.weight"]["data_offsets"][0]
    wrong = torch.full((3,), value).numpy().tobytes()
    put_together(source / WEIGHTS, table, body[:first] + wrong + body[first + 12 :])
    counts = "3 NaN and 0 infinite" if value != value else "0 NaN and 3 infinite"
    says = f"'model.norm.weight' of .*source has {counts} entries of 32"
    refused(source, change, tmp_path / "out", says)
    with pytest.raises(ValueError, match=says):
        read_model(source)
    changes = dict(change[0])
    name = next(iter(changes))
    changes[name] = changes[name].clone().fill_(value)
    refused(llama, (changes, change[1]), tmp_path / "out", f"'{name}' has ")


def test_changes_that_do_not_fit(llama: Path, change: Any, tmp_path: Path):
    changes, record = change
    name = "model.layers.0.mlp.up_proj.weight"
    for other, says in (
        ({"lm_head.weight": torch.zeros(96, 32)}, "1 of .* not in .*: lm_head.weight. .*tied weights are there once"),
        (
            {name: changes[name].to(torch.bfloat16)},
            f"'{name}' is torch.float32 .48, 32. in .*; changed to torch.bfloat16",
        ),
        ({name: changes[name].t().contiguous()}, "changed to torch.float32 .32, 48."),
    ):
        refused(llama, ({**changes, **other}, record), tmp_path / "out", says)


def test_a_record_that_the_tensors_contradict(llama: Path, change: Any, tmp_path: Path):
    changes, record = change
    name = record.sites[0].name
    other = {**changes, name: torch.ones_like(changes[name])}
    refused(
        llama, (other, record), tmp_path / "out", f"contradict each other:\n  {name}: 512 of 1024 .* 1024 of 1024 are"
    )


def test_out_that_is_there(llama: Path, change: Any, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("of value")
    with pytest.raises(FileExistsError, match="out exists and is not empty"):
        write_model(llama, out, *change)
    assert directories.files_of(out) == {"mine": b"of value"}
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="exists and is a file"):
        write_model(llama, tmp_path / "file", *change)
    with pytest.raises(FileNotFoundError, match="the folder that it would be in does not exist"):
        write_model(llama, tmp_path / "a" / "b", *change)
    with pytest.raises(FileExistsError):
        write_model(llama, llama, *change)
    with pytest.raises(ValueError, match="name a directory outside of it"):
        write_model(llama, llama / "out", *change)
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Files cannot grow beyond that many bytes, as on a disk that is full: the operating system refuses."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 5000, 60_000])
def test_a_disk_that_is_full(size: int, llama: Path, change: Any, tmp_path: Path):
    out = tmp_path / "out"
    with at_most(size), pytest.raises(OSError, match="File too large"):
        write_model(llama, out, *change)
    assert nothing_left(out)
    write_model(llama, out, *change)
    check_directory(out)


def test_a_failure_leaves_the_journal_and_success_does_not(llama: Path, change: Any, tmp_path: Path):
    out = tmp_path / "out"
    changes, record = change
    journal = Journal.of(out, {"seed": 0})
    journal.keep("all", changes)
    with at_most(5000), pytest.raises(OSError, match="File too large"):
        write_model(llama, out, journal.tensors(), record)
    assert not out.exists()
    again = Journal.of(out, {"seed": 0})
    assert again.done() == ["all"]
    write_model(llama, out, again.tensors(), record)
    assert os.listdir(tmp_path) == ["out"]
    directories.assert_same_bits({n: directories.tensors(out)[n] for n in changes}, changes)


def test_files_that_lack_tensors_of_the_model(llama: Path, tmp_path: Path):
    source = copied(llama, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks \d+ tensors of LlamaForCausalLM"):
        read_model(source)


def test_without_transformers(llama: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "rarefy.io.transformers", raising=False)
    monkeypatch.delattr(rarefy.io, "transformers", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"needs transformers: pip install 'rarefy\[hf\]'"):
        read_model(llama)


def test_the_model_is_an_ordinary_one(llama: Path):
    assert isinstance(read_model(llama), nn.Module)
    assert type(read_model(llama, check=False)).__name__ == "LlamaForCausalLM"
