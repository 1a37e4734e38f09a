"""`write_packed`, `from_pretrained` of what it writes, and `unpack_directory`: there and back."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import model_directories as directories
import rarefy
from model_directories import IDS, generated, load, packed_layers, sparse
from rarefy.axes import Layout
from rarefy.io import check_directory, read_model, unpack_directory, write_model, write_packed
from rarefy.io.packed import with_key, without_key
from rarefy.io.packing import pack_weight
from rarefy.runtime.forms.places import Reader, Writer

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


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


def test_a_model_without_a_head_loads_too(sparse_llama: Path, packed: Path):
    """AutoModel drops the head: names lose their prefix."""
    model, dense = (transformers.AutoModel.from_pretrained(folder) for folder in (packed, sparse_llama))
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


def test_config_has_one_key_more(sparse_llama: Path, packed: Path):
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (sparse_llama, packed))
    assert after.pop("quantization_config") == {"quant_method": "rarefy", "version": 1}
    assert after == before
    assert {p.name for p in packed.iterdir()} == {p.name for p in sparse_llama.iterdir()}


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
