"""Models that `from_pretrained` reads from packed directories: saved again, unpacked, refused; imports in any order."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

import model_directories as directories
import rarefy
from model_directories import IDS, generated, load, packed_layers, sparse
from rarefy.io import check_directory, unpack_directory, write_model, write_packed
from rarefy.io.packed import with_key
from rarefy.io.shards import INDEX, WEIGHTS
from rarefy.io.transformers import RarefyConfig, RarefyQuantizer

# --- a loaded model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "10KB"}])
def test_it_is_saved_and_loaded_again(shards: dict[str, str], sparse_llama: Path, packed: Path, tmp_path: Path):
    model = load(packed)
    model.save_pretrained(tmp_path / "again", **shards)
    assert (tmp_path / "again" / INDEX).exists() == bool(shards)
    said = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert said == {"quant_method": "rarefy", "version": 1}
    if not shards:
        directories.assert_same_bits(directories.tensors(tmp_path / "again"), directories.tensors(packed))
    again = load(tmp_path / "again")
    assert packed_layers(again) == packed_layers(model)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    unpack_directory(tmp_path / "again", tmp_path / "dense")
    directories.assert_same_bits(directories.tensors(tmp_path / "dense"), directories.tensors(sparse_llama))
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(load(tmp_path / "dense")(IDS).logits, load(sparse_llama)(IDS).logits)


def test_what_transformers_calls_dequantize(sparse_llama: Path, packed: Path, tmp_path: Path):
    model = load(packed)
    model.dequantize()
    assert packed_layers(model) == []
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "dense")
    directories.assert_same_bits(directories.tensors(tmp_path / "dense"), directories.tensors(sparse_llama))
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_it_is_copied_and_unpacked(sparse_llama: Path, packed: Path):
    model, dense = load(packed), load(sparse_llama)
    twin = copy.deepcopy(model)
    assert generated(twin) == generated(model)
    rarefy.unpack(twin)
    assert torch.equal(twin(IDS).logits, dense(IDS).logits)
    rarefy.pack(twin, example={"input_ids": IDS})  # what is fastest here is measured on the dense model
    assert generated(twin) == generated(dense)


def test_a_model_in_memory(sparse_llama: Path, packed: Path, tmp_path: Path):
    dense = load(sparse_llama)
    for name, model in (("dense", dense), ("packed", load(packed))):
        quantizer = getattr(model, "hf_quantizer", None)
        report = write_packed(model, tmp_path / name)
        assert len(report.packed) == 14
        assert report.bytes_after < report.bytes_before
        assert getattr(model, "hf_quantizer", None) is quantizer
        directories.assert_same_bits(directories.tensors(tmp_path / name), directories.tensors(packed))
        assert torch.equal(load(tmp_path / name)(IDS).logits, load(packed)(IDS).logits)
    assert packed_layers(dense) == []
    assert not hasattr(dense.config, "quantization_config")
    with pytest.raises(ValueError, match="Linear is no model of transformers"):
        write_packed(torch.nn.Linear(2, 2), tmp_path / "no")
    with pytest.raises(ValueError, match="make it sparse first"):
        write_packed(directories.build(directories.llama()), tmp_path / "no")
    assert not (tmp_path / "no").exists()


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_dense_directory_is_not_packed_and_a_packed_one_not_again(sparse_llama: Path, packed: Path, tmp_path: Path):
    source = directories.saved(tmp_path / "source", directories.llama())
    with pytest.raises(ValueError, match=r"no layer gains by being packed .* kept it would take"):
        write_packed(source, tmp_path / "out")
    with pytest.raises(ValueError, match="is packed already; `rarefy unpack"):
        write_packed(packed, tmp_path / "out")
    with pytest.raises(ValueError, match="is packed already"):
        write_model(packed, tmp_path / "out", {}, check_directory(sparse_llama))
    with pytest.raises(ValueError, match=r"is not packed: its config.json has no quantization_config"):
        unpack_directory(sparse_llama, tmp_path / "out")
    with pytest.raises(FileExistsError):
        unpack_directory(packed, sparse_llama)
    config = json.loads((sparse_llama / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    _, changes, record = directories.pruned(sparse_llama)
    assert len(changes) == len(record.sites)
    with pytest.raises(ValueError, match="quantised model cannot be packed as well"):
        with_key((source / "config.json").read_bytes())
    assert not (tmp_path / "out").exists()


def test_damage_is_found(packed: Path, tmp_path: Path):
    data = (packed / WEIGHTS).read_bytes()
    for folder, place in (("values", -1), ("metadata", 200)):
        damaged = tmp_path / folder
        damaged.mkdir()
        for name, bytes_ in directories.files_of(packed).items():
            (damaged / name).parent.mkdir(exist_ok=True)
            (damaged / name).write_bytes(bytes_)
        place %= len(data)
        (damaged / WEIGHTS).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"damaged|checksum"):
            unpack_directory(damaged, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(RuntimeError, match=r"its bytes in model.safetensors are not the ones that were written"):
        check_directory(tmp_path / "values")


def test_a_negative_zero_stays_and_its_layer_dense(tmp_path: Path):
    folder = sparse(tmp_path, directories.llama())
    name = "model.layers.1.mlp.up_proj"
    tensors = directories.tensors(folder)
    tensors[f"{name}.weight"].view(-1)[tensors[f"{name}.weight"].view(-1).eq(0).nonzero()[0]] = -0.0
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    report = write_packed(folder, tmp_path / "packed")
    assert "−0.0" in report.dense[name]
    unpack_directory(tmp_path / "packed", tmp_path / "dense")
    directories.assert_same_bits(directories.tensors(tmp_path / "dense"), tensors)
    with pytest.raises(RuntimeError, match=rf"{name}.weight: 1 of \d+ weights that are not kept are −0.0"):
        check_directory(folder)


def test_other_devices_and_versions_are_refused(packed: Path, tmp_path: Path):
    quantizer = RarefyQuantizer(RarefyConfig())
    with pytest.raises(ValueError, match="device_map puts parts on cuda:0: packed layers run on the CPU"):
        quantizer.validate_environment(device_map={"": "cpu", "model": "cuda:0"})
    assert quantizer.update_device_map("auto") == {"": "cpu"}
    later = tmp_path / "later"
    later.mkdir()
    for name in (WEIGHTS, "config.json"):
        (later / name).write_bytes((packed / name).read_bytes().replace(b'"version": 1\n', b'"version": 2\n'))
    with pytest.raises(ValueError, match="packed in version 2; this rarefy reads version 1"):
        load(later)


def test_a_dense_directory_cannot_be_loaded_as_packed(sparse_llama: Path):
    with pytest.raises(ValueError, match="pre-quantized"):
        transformers.AutoModelForCausalLM.from_pretrained(sparse_llama, quantization_config=RarefyConfig())


# --- whichever is imported first -------------------------------------------------------------------------------------

ORDERS = {
    "rarefy first": "import rarefy\nassert 'transformers' not in sys.modules\nimport transformers",
    "transformers first": "import transformers\nimport rarefy",
    "transformers in use": "import transformers\ntransformers.AutoModelForCausalLM\nimport rarefy",
    "the quantizers first": "import transformers.quantizers.auto\nimport rarefy",
    "rarefy twice": "import rarefy\nrarefy.io.register()\nimport transformers",
    "through read_model": "import rarefy\nrarefy.io.read_model(sys.argv[1])\nimport transformers",
}


FAST = ("rarefy first", "transformers in use")


@pytest.mark.parametrize("order", [pytest.param(o, marks=() if o in FAST else pytest.mark.slow) for o in ORDERS])
def test_from_pretrained_loads_it(order: str, packed: Path):
    code = f"""
import sys
{ORDERS[order]}
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert sum(type(module).__name__ == "PackedLinear" for module in model.modules()) == 14
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("rarefy")]
import transformers.quantizers.auto as auto
assert type(auto.__loader__).__module__ == type(auto.__spec__.loader).__module__ != "rarefy.io.register"
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(packed)], check=True)
