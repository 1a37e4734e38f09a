"""`read_model` and `write_model`: what is written, that it loads without rarefy, and every refusal."""

import json
import os
import resource
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import model_directories as directories
import rarefy
from rarefy.axes import Layout
from rarefy.io import Journal, Record, check_directory, read_model, write_model
from rarefy.io.shards import INDEX, WEIGHTS, Shards

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directories.saved(tmp_path_factory.mktemp("sources") / "llama", directories.llama())


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "sharded"
    return directories.saved(folder, directories.llama(), BF16, max_shard_size="8KB")


@pytest.fixture(scope="session")
def change(llama: Path) -> Any:
    """What `write_model` takes for the llama directory."""
    return directories.pruned(llama)[1:]


def nothing_left(out: Path) -> bool:
    return not out.exists() and not list(out.parent.glob(".*"))


# --- what is written -------------------------------------------------------------------------------------------------


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


# --- refusals --------------------------------------------------------------------------------------------------------


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for name, data in directories.files_of(source).items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(data)
    return target


def taken_apart(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_together(path: Path, table: dict[str, Any], body: bytes) -> None:
    header = json.dumps(table).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)


def refused(source: Path, change: Any, out: Path, says: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=says):
        write_model(source, out, *change)
    assert nothing_left(out)


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
        ({name: changes[name].to(BF16)}, f"'{name}' is torch.float32 .48, 32. in .*; changed to torch.bfloat16"),
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
