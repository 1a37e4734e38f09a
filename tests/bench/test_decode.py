import json

import pytest
import torch
from torch import nn

import rarefy
from language import save_llama
from rarefy.bench.decode import decode_speed
from rarefy.bench.sides import Sides, weight_bytes
from rarefy.bench.speed import thinned
from rarefy.runtime import Packed

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:pack has nothing but torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama") / "model", hidden_act="silu")


@pytest.fixture
def llama(folder):
    return thinned(transformers.AutoModelForCausalLM.from_pretrained(folder), 0.8)


def test_rows_are_the_model_and_what_is_inside(llama):
    told: list[str] = []
    found = decode_speed(llama, prompt=8, tokens=4, rounds=3, progress=lambda done, of, name: told.append(name))
    assert found.rows[0].name == "generate, end to end"
    assert found.rows[-2 if found.packed_layers else -1].name == "prefill of 8 tokens"
    for row in found.rows:
        assert row.dense > 0
        assert row.packed > 0
        assert row.low <= row.ratio <= row.high
        assert row.rounds == 3
    assert "generate, end to end" in told
    told_json = json.loads(json.dumps(found.to_dict()))
    assert told_json["rows"][0]["unit"] == "token"
    assert told_json["packing"]["layers"]


def test_the_model_stays_packed_and_as_it_was_otherwise(llama):
    settings = llama.generation_config.to_dict()
    decode_speed(llama, prompt=4, tokens=2, rounds=1)
    assert llama.generation_config.to_dict() == settings
    assert not any(module._forward_pre_hooks for module in llama.modules())


def test_threads_are_put_back(llama):
    before = torch.get_num_threads()
    assert decode_speed(llama, prompt=4, tokens=2, rounds=1, threads=2).threads == 2
    assert torch.get_num_threads() == before


def test_bfloat16_is_on_both_sides(llama):
    found = decode_speed(llama, prompt=4, tokens=2, rounds=1, dtype=torch.bfloat16)
    assert found.dtype == "bfloat16"
    whole = sum(p.numel() for p in llama.parameters()) if not found.packed_layers else None
    assert whole is None or found.bytes_dense <= 2 * whole + 1000


def test_a_token_reads_every_weight_and_one_row_of_a_table(llama):
    parameters = sum(p.numel() * p.element_size() for p in llama.parameters())
    row = llama.config.hidden_size * 4
    assert weight_bytes(llama) == parameters + row  # the head is tied to the table and reads all of it
    untied = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    assert weight_bytes(untied) == (4 + 8 + 2) * 4


def test_sides_show_the_dense_and_the_packed_model(llama):
    layer = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    model = thinned(layer, 0.95)
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    sides = Sides(model)
    rarefy.pack(model, example=x)
    sides.freeze()
    packed = sum(isinstance(m, Packed) for m in model.modules())
    sides.show(False)
    assert not any(isinstance(m, Packed) for m in model.modules())
    assert torch.equal(model(x), expected)
    sides.show(True)
    assert sum(isinstance(m, Packed) for m in model.modules()) == packed
    torch.testing.assert_close(model(x), expected)
    assert bool(sides.units()) == bool(sides.changes)


def test_what_cannot_be_timed_is_refused(llama):
    with pytest.raises(ValueError, match="more than the context of 32"):
        decode_speed(llama, prompt=30, tokens=8)
    with pytest.raises(ValueError, match="--rounds 0"):
        decode_speed(llama, rounds=0)
    bert = transformers.BertModel(
        transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    with pytest.raises(ValueError, match="a BertModel does not write text"):
        decode_speed(bert)
    with pytest.raises(ValueError, match="'int8' is what"):
        decode_speed(llama, prompt=4, tokens=2, quantize="int3")
