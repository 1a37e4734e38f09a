"""`write_packed`, `from_pretrained` of what it writes, and `unpack_directory`."""

import copy
import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import model_directories as directories
import rarefy
from rarefy.axes import Layout
from rarefy.io import check_directory, read_model, unpack_directory, write_model, write_packed
from rarefy.io.packed import with_key, without_key
from rarefy.io.packing import pack_weight
from rarefy.io.shards import INDEX, WEIGHTS
from rarefy.io.transformers import RarefyConfig, RarefyQuantizer
from rarefy.runtime import PackedLinear
from rarefy.runtime.forms.places import Reader, Writer

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
IDS = torch.tensor([[1, 5, 7, 90, 3]])


def sparse(folder: Path, config: Any, dtype: torch.dtype = F32, pattern: str = "unstructured", **how: Any) -> Path:
    """A pruned directory, three quarters zeros unless the pattern says otherwise."""
    source = directories.saved(folder / "source", config, dtype, **how)
    _, changes, record = directories.pruned(source, pattern, 0.75)
    write_model(source, folder / "sparse", changes, record)
    return folder / "sparse"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse(tmp_path_factory.mktemp("llama"), directories.llama())


@pytest.fixture(scope="module")
def packed(llama: Path) -> Path:
    write_packed(llama, llama.with_name("packed"))
    return llama.with_name("packed")


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def packed_layers(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]


def generated(model: Any) -> list[int]:
    return model.generate(IDS, max_new_tokens=24, do_sample=False, pad_token_id=0)[0].tolist()


# --- there and back --------------------------------------------------------------------------------------------------

CASES = {
    "llama": (directories.llama, F32, {}),
    "llama-untied-bias": (lambda: directories.llama(tie_word_embeddings=False, attention_bias=True), F32, {}),
    "llama-sharded": (directories.llama, F32, {"max_shard_size": "12KB"}),
    "llama-bf16": (directories.llama, BF16, {}),
    "llama-fp16": (directories.llama, F16, {}),
    "llama-bf16-sharded-bias": (lambda: directories.llama(attention_bias=True), BF16, {"max_shard_size": "4KB"}),
    "llama-2:4": (directories.llama, F32, {"pattern": "2:4"}),
    "llama-4x1": (directories.llama, F32, {"pattern": "4x1"}),
    "mixtral": (directories.mixtral, F32, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str, tmp_path: Path):
    config, dtype, how = CASES[case]
    folder = sparse(tmp_path, config(), dtype, **how)
    report = write_packed(folder, tmp_path / "packed")
    check_directory(tmp_path / "packed")
    dense, model = load(folder), load(tmp_path / "packed")
    assert sorted(packed_layers(model)) == sorted(report.packed)
    assert len(report.packed) >= 8
    assert model.dtype == dense.dtype == dtype
    tolerance = 1e-5 if dtype == F32 else 0.05
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=tolerance, atol=tolerance)
    if dtype == F32:
        assert generated(model) == generated(dense)
    for name in report.packed:
        assert torch.equal(model.get_submodule(name).weight, dense.get_submodule(name).weight)
    unpack_directory(tmp_path / "packed", tmp_path / "dense")
    assert directories.files_of(tmp_path / "dense") == directories.files_of(folder)


def test_what_stays_dense_is_said(tmp_path: Path):
    folder = sparse(tmp_path, directories.mixtral())
    dense = write_packed(folder, tmp_path / "packed").dense
    assert "fused when" in dense["model.layers.0.block_sparse_moe.experts.0.w1"]
    assert dense["model.embed_tokens"] == "there is no packed layer for Embedding"


def test_conv1d_has_no_packed_layer(tmp_path: Path):
    source = directories.saved(tmp_path / "source", directories.gpt2())
    names = [name for name in directories.tensors(source) if "c_fc.weight" in name]
    changes, record = directories.pruned_files(source, dict.fromkeys(names, Layout(transposed=True)))
    write_model(source, tmp_path / "sparse", changes, record)
    with pytest.raises(ValueError, match=r"no layer gains by being packed .*there is no packed layer for Conv1D"):
        write_packed(tmp_path / "sparse", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_model_without_a_head_loads_too(llama: Path, packed: Path):
    """AutoModel drops the head: names lose their prefix."""
    model, dense = (transformers.AutoModel.from_pretrained(folder) for folder in (packed, llama))
    assert len(packed_layers(model)) == 14
    torch.testing.assert_close(model(IDS)[0], dense(IDS)[0], rtol=1e-5, atol=1e-5)


def test_bert_and_its_biases(tmp_path: Path):
    folder = sparse(tmp_path, directories.bert())
    report = write_packed(folder, tmp_path / "packed")
    model, dense = read_model(tmp_path / "packed"), read_model(folder)
    assert model.bert.encoder.layer[0].attention.self.query.packed_bias is not None
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-5)
    assert len(report.packed) >= 12
    unpack_directory(tmp_path / "packed", tmp_path / "dense")
    assert directories.files_of(tmp_path / "dense") == directories.files_of(folder)


def t5() -> Any:
    """Its initialisation looks at the weights of layers that are loaded."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 96}
    return transformers.T5ForConditionalGeneration, transformers.T5Config(**sizes, decoder_start_token_id=0)


def vit() -> Any:
    """Its layers have other names in the files than in the model."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.ViTForImageClassification, transformers.ViTConfig(**sizes, image_size=8, patch_size=4)


@pytest.mark.parametrize("make", [t5, vit])
def test_other_families(make: Any, tmp_path: Path):
    kind, config = make()
    kind(config).save_pretrained(tmp_path / "source")
    _, changes, record = directories.pruned(tmp_path / "source", "unstructured", 0.75)
    write_model(tmp_path / "source", tmp_path / "sparse", changes, record)
    report = write_packed(tmp_path / "sparse", tmp_path / "packed")
    given = {"input_ids": IDS, "decoder_input_ids": IDS} if make is t5 else {"pixel_values": torch.ones(1, 3, 8, 8)}
    dense, model = read_model(tmp_path / "sparse"), read_model(tmp_path / "packed")
    assert len(packed_layers(model)) == len(report.packed) >= 6
    torch.testing.assert_close(model(**given).logits, dense(**given).logits, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(read_model(tmp_path / "again")(**given).logits, model(**given).logits)
    for packed, unpacked in (("packed", "u"), ("again", "v")):
        unpack_directory(tmp_path / packed, tmp_path / unpacked)
        found, wanted = directories.tensors(tmp_path / unpacked), directories.tensors(tmp_path / "sparse")
        directories.assert_same_bits(found, wanted)


def test_config_has_one_key_more(llama: Path, packed: Path):
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (llama, packed))
    assert after.pop("quantization_config") == {"quant_method": "rarefy", "version": 1}
    assert after == before
    assert {p.name for p in packed.iterdir()} == {p.name for p in llama.iterdir()}


@pytest.mark.parametrize("text", ["{}", '{"a": 1}', '{\n    "a": {"b": []}\n}\n', '{\r\n  "ä": "}"\r\n}\r\n\r\n'])
def test_config_comes_back_byte_for_byte(text: str):
    said = json.loads(with_key(text.encode()))
    assert said.pop("quantization_config") == {"quant_method": "rarefy", "version": 1}
    assert said == json.loads(text)
    assert without_key(with_key(text.encode())) == text.encode()


def test_stories_generate_the_same_words(data_dir: Any, tmp_path: Path):
    source = data_dir("models/stories260K")
    _, changes, record = directories.pruned(source, "2:4")
    write_model(source, tmp_path / "sparse", changes, record)
    report = write_packed(tmp_path / "sparse", tmp_path / "packed")
    assert report.bytes_after < 0.75 * report.bytes_before
    rarefy.check(tmp_path / "packed")
    dense, model = load(tmp_path / "sparse"), load(tmp_path / "packed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "packed")
    given = tokenizer("Once upon a time", return_tensors="pt")
    torch.testing.assert_close(model(**given).logits, dense(**given).logits, rtol=1e-5, atol=1e-5)
    words = [m.generate(**given, max_new_tokens=60, do_sample=False)[0].tolist() for m in (dense, model)]
    assert words[0] == words[1]
    unpack_directory(tmp_path / "packed", tmp_path / "dense")
    assert directories.files_of(tmp_path / "dense") == directories.files_of(tmp_path / "sparse")


def test_a_layer_is_let_go_when_it_is_written():
    """Without waiting for the garbage collector, which would let many of them pile up."""
    gc.disable()
    try:
        stored, _ = pack_weight("layer", torch.eye(600), None)
        held = weakref.ref(stored)
        del stored
        assert held() is None
        assert not [each for each in gc.get_objects() if type(each) in (Reader, Writer)]
    finally:
        gc.enable()


# --- a loaded model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "10KB"}])
def test_it_is_saved_and_loaded_again(shards: dict[str, str], llama: Path, packed: Path, tmp_path: Path):
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
    directories.assert_same_bits(directories.tensors(tmp_path / "dense"), directories.tensors(llama))
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(load(tmp_path / "dense")(IDS).logits, load(llama)(IDS).logits)


def test_what_transformers_calls_dequantize(llama: Path, packed: Path, tmp_path: Path):
    model = load(packed)
    model.dequantize()
    assert packed_layers(model) == []
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "dense")
    directories.assert_same_bits(directories.tensors(tmp_path / "dense"), directories.tensors(llama))
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_it_is_copied_and_unpacked(llama: Path, packed: Path):
    model, dense = load(packed), load(llama)
    twin = copy.deepcopy(model)
    assert generated(twin) == generated(model)
    rarefy.unpack(twin)
    assert torch.equal(twin(IDS).logits, dense(IDS).logits)
    rarefy.pack(twin, example={"input_ids": IDS})  # what is fastest here is measured on the dense model
    assert generated(twin) == generated(dense)


def test_a_model_in_memory(llama: Path, packed: Path, tmp_path: Path):
    dense = load(llama)
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


def test_a_dense_directory_is_not_packed_and_a_packed_one_not_again(llama: Path, packed: Path, tmp_path: Path):
    source = directories.saved(tmp_path / "source", directories.llama())
    with pytest.raises(ValueError, match=r"no layer gains by being packed .* kept it would take"):
        write_packed(source, tmp_path / "out")
    with pytest.raises(ValueError, match="is packed already; `rarefy unpack"):
        write_packed(packed, tmp_path / "out")
    with pytest.raises(ValueError, match="is packed already"):
        write_model(packed, tmp_path / "out", {}, check_directory(llama))
    with pytest.raises(ValueError, match=r"is not packed: its config.json has no quantization_config"):
        unpack_directory(llama, tmp_path / "out")
    with pytest.raises(FileExistsError):
        unpack_directory(packed, llama)
    config = json.loads((llama / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    _, changes, record = directories.pruned(llama)
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


def test_a_dense_directory_cannot_be_loaded_as_packed(llama: Path):
    with pytest.raises(ValueError, match="pre-quantized"):
        transformers.AutoModelForCausalLM.from_pretrained(llama, quantization_config=RarefyConfig())


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
