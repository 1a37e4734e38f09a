"""`read_model` and `write_model`: what is written, and that it loads without rarefy."""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import model_directories as directories
import rarefy
from model_directories import copied, put_together, refused, taken_apart
from rarefy.axes import Layout
from rarefy.io import Record, check_directory, read_model, write_model
from rarefy.io.shards import INDEX, WEIGHTS

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(("kind", "pattern"), [("llama", "unstructured"), ("mixtral", "2:4"), ("bert", "2:4")])
def test_out_is_the_source_with_zeros(kind: str, pattern: str, tmp_path: Path):
    source = directories.saved(tmp_path / "source", directories.KINDS[kind]())
    model, changes, record = directories.pruned(source, pattern, 0.5)
    written = write_model(source, tmp_path / "out", changes, record)
    before, after = directories.tensors(source), directories.tensors(tmp_path / "out")
    assert list(before) == list(after)
    sites = {site.name: site for site in record.sites}
    for name, tensor in before.items():
        assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape)
        if name not in sites:
            assert torch.equal(after[name], tensor)
        else:
            kept = after[name] != 0
            assert int(kept.sum()) == sites[name].kept
            assert torch.equal(after[name], tensor.masked_fill(~kept, 0))
    assert record.kept == sum(site.kept for site in record.sites) == record.total // 2
    assert written.changed == len(record.sites) > 4
    assert (
        json.loads((tmp_path / "out" / "rarefy.json").read_text())["method"]
        == rarefy.Magnitude(sparsity=0.5, pattern=pattern).to_dict()
    )
    again = read_model(tmp_path / "out")
    x = torch.arange(10)[None] % 96
    assert torch.equal(model.eval()(x).logits, again(x).logits)
    check_directory(tmp_path / "out")


def test_weights_that_store_inputs_first(tmp_path: Path):
    """GPT-2's layers are (in, out): groups of 2:4 run down the columns, and the record says so."""
    source = directories.saved(tmp_path / "source", directories.gpt2())
    names = [name for name in directories.tensors(source) if "c_fc.weight" in name]
    changes, record = directories.pruned_files(source, dict.fromkeys(names, Layout(transposed=True)))
    write_model(source, tmp_path / "out", changes, record)
    for name in names:
        weight = directories.tensors(tmp_path / "out")[name]
        assert bool((weight.t().reshape(-1, 4).ne(0).sum(1) == 2).all())
    assert check_directory(tmp_path / "out").sites[0].layout == {"transposed": 1}
    other = Record.of({}, [site.model_copy(update={"layout": {}}) for site in record.sites])
    refused(source, (changes, other), tmp_path / "no", "c_fc.weight: the weights that are kept do not obey the pattern")


def test_fused_experts_are_apart_in_the_files(tmp_path: Path):
    source = directories.saved(tmp_path / "source", directories.mixtral())
    model, changes, record = directories.pruned(source, "unstructured", 0.75, only="*experts.*_proj")
    assert model.model.layers[0].mlp.experts.gate_up_proj.ndim == 3
    assert len(changes) == 2 * 4 * 3
    assert all("block_sparse_moe.experts" in name for name in changes)
    assert record.total - record.kept == 3 * record.total // 4
    write_model(source, tmp_path / "out", changes, record)
    x = torch.arange(10)[None]
    assert torch.equal(read_model(tmp_path / "out")(x).logits, model.eval()(x).logits)


def test_files_and_headers_are_those_of_the_source(sharded: Path, tmp_path: Path):
    _, changes, record = directories.pruned(sharded)
    written = write_model(sharded, tmp_path / "out", changes, record)
    before, after = directories.files_of(sharded), directories.files_of(tmp_path / "out")
    shards = {name for name in before if name.endswith(".safetensors")}
    assert len(shards) > 3
    assert after.keys() - before.keys() == {"rarefy.json"}
    assert before.keys() - after.keys() == {"pytorch_model.bin"}
    assert written.left_out == ("pytorch_model.bin",)
    assert set(written.copied) == before.keys() - shards - {"pytorch_model.bin", INDEX}
    for name in before.keys() - shards - {"pytorch_model.bin"}:
        assert after[name] == before[name], name
    for name in shards:
        length = 8 + int.from_bytes(before[name][:8], "little")
        assert after[name][:length] == before[name][:length], name
        assert len(after[name]) == len(before[name])
    assert "sparsity_config" not in json.loads(after["config.json"])
    assert written.nbytes == sum(len(before[name]) for name in shards)
    assert read_model(tmp_path / "out").dtype == BF16


def test_it_loads_with_plain_transformers(llama: Path, change: Any, tmp_path: Path):
    """In a process that has never heard of rarefy; tied weights are tied there."""
    write_model(llama, tmp_path / "out", *change)
    code = """
import sys, torch, transformers
model, info = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
assert model.lm_head.weight is model.model.embed_tokens.weight
assert "rarefy" not in sys.modules
assert int((model.model.layers[0].mlp.up_proj.weight == 0).sum()) == 32 * 48 // 2
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "out")], check=True)
    assert "lm_head.weight" not in directories.tensors(tmp_path / "out")


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_half_precision_stays(dtype: torch.dtype, tmp_path: Path):
    source = directories.saved(tmp_path / "source", directories.llama(), dtype)
    model, changes, record = directories.pruned(source, "unstructured", 0.7)
    assert model.dtype == dtype
    write_model(source, tmp_path / "out", changes, record)
    assert {tensor.dtype for tensor in directories.tensors(tmp_path / "out").values()} == {dtype}
    rarefy.check(tmp_path / "out")


def test_stored_dtype_wins_over_the_config(llama: Path, tmp_path: Path):
    """config.json may name another dtype than the files have: then pruned weights still fit the files."""
    source = tmp_path / "source"
    directories.saved(source, directories.llama(), BF16)
    config = (source / "config.json").read_text().replace("bfloat16", "float32")
    (source / "config.json").write_text(config)
    assert read_model(source).dtype == BF16


def test_metadata_without_a_format_get_one(llama: Path, change: Any, tmp_path: Path):
    source = copied(llama, tmp_path / "source")
    table, body = taken_apart(source / WEIGHTS)
    table["__metadata__"] = {"by": "somebody"}
    put_together(source / WEIGHTS, table, body)
    write_model(source, tmp_path / "out", *change)
    table, _ = taken_apart(tmp_path / "out" / WEIGHTS)
    assert table["__metadata__"] == {"by": "somebody", "format": "pt"}
    read_model(tmp_path / "out")


def test_tensors_are_asked_for_one_at_a_time(llama: Path, change: Any, tmp_path: Path):
    """So that a mapping may read them from a disk: when the next is made, at most the one before is held."""
    made: list[weakref.ref[Tensor]] = []

    class Lazy(Mapping[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            assert sum(each() is not None for each in made) <= 2
            tensor = change[0][name].clone()
            made.append(weakref.ref(tensor))
            return tensor

        def __iter__(self) -> Iterator[str]:
            return iter(change[0])

        def __len__(self) -> int:
            return len(change[0])

    write_model(llama, tmp_path / "out", Lazy(), change[1])
    assert len(made) >= len(change[0])


def test_an_empty_folder_is_taken(llama: Path, change: Any, tmp_path: Path):
    (tmp_path / "out").mkdir()
    write_model(llama, tmp_path / "out", *change)
    assert os.listdir(tmp_path) == ["out"]
    check_directory(tmp_path / "out")


def test_weights_as_people_have_them(data_dir: Any, tmp_path: Path):
    """stories260K: grouped queries and tied embeddings."""
    source = data_dir("models/stories260K")
    model, changes, record = directories.pruned(source)
    write_model(source, tmp_path / "out", changes, record)
    rarefy.check(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    x = torch.tensor([[1, 403, 407, 261]])
    assert torch.equal(loaded(x).logits, model(x).logits)
    before = directories.files_of(source)
    after = directories.files_of(tmp_path / "out")
    assert {n: b for n, b in after.items() if n not in ("rarefy.json", WEIGHTS)} == {
        n: b for n, b in before.items() if n != WEIGHTS
    }
