import hashlib
import json
import struct
import sys

import pytest
import torch

from language import WORDS, save_tokenizer, text_of
from rarefy.io.calibration import Calibration, default_length, encode, frame, windows
from rarefy.io.pretrained import context_length, read_config, read_tokenizer
from rarefy.io.texts import read_text

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return read_tokenizer(folder)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(text_of(200))
    return path


def rows(found: Calibration) -> torch.Tensor:
    return torch.cat([batch["input_ids"] for batch in found])


def test_windows_are_runs_of_the_text_behind_the_first_token(tokenizer, text):
    found = windows(text, tokenizer, 12, 20, 3)
    ids = encode(tokenizer, text.read_text())
    assert rows(found).shape == (20, 12)
    assert found.windows == 20
    assert found.tokens == 240
    assert rows(found)[:, 0].tolist() == [WORDS.index("<s>")] * 20
    runs = {tuple(run.tolist()) for run in ids.unfold(0, 11, 1)}
    assert all(tuple(row.tolist()) in runs for row in rows(found)[:, 1:])


def test_positions_are_those_of_the_seeded_generator(tokenizer, text):
    ids = encode(tokenizer, text.read_text())
    starts = torch.randint(200 - 10 + 1, (7,), generator=torch.Generator().manual_seed(5))
    expected = torch.stack([ids[start : start + 10] for start in starts.tolist()])
    assert torch.equal(rows(windows(text, tokenizer, 10, 7, 5, bos="none")), expected)


def test_the_same_seed_is_the_same_hash_and_another_is_not(tokenizer, text):
    state = torch.random.get_rng_state()
    found = [windows(text, tokenizer, 10, 7, seed) for seed in (0, 0, 1)]
    assert found[0].sha256 == found[1].sha256 != found[2].sha256
    assert found[0].settings["seed"] == 0
    assert found[0].settings["tokens_in_source"] == 200
    assert json.loads(json.dumps(found[0].settings)) == found[0].settings
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_hash_is_of_lengths_and_ids_however_they_are_grouped():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = hashlib.sha256(struct.pack("<qqqqqqqq", 3, 1, 2, 3, 3, 4, 5, 6)).hexdigest()
    padded = {"input_ids": torch.tensor([[1, 2, 3, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    for source in ([ids], [ids[:1], ids[1:]], [[1, 2, 3], [4, 5, 6]], [{"input_ids": ids}], [padded, ids[1]]):
        assert windows(source).sha256 == expected


def test_the_last_window_can_be_drawn(tokenizer, tmp_path):
    path = tmp_path / "exact.txt"
    path.write_text(text_of(9))
    found = windows(path, tokenizer, 10, 3)
    assert torch.equal(rows(found)[:, 1:], encode(tokenizer, path.read_text()).expand(3, -1))


def test_batches_are_taken_as_they_are_up_to_the_count():
    def endless():
        while True:
            yield torch.ones(3, 4, dtype=torch.int32)

    found = windows(endless(), count=7)
    assert [len(batch["input_ids"]) for batch in found] == [3, 3, 1]
    assert found.batches[0]["input_ids"].dtype == torch.int64
    assert len(windows([[1, 2]], count=7)) == 1


def test_documents_of_json_lines_are_joined_by_blank_lines(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "the cat"}\n\n{"text": "a dog", "more": 1}\n')
    assert read_text(path) == "the cat\n\na dog"
    assert read_text(path, limit=9) == "the cat\n\n"
    path.write_text('{"story": "the cat"}\n')
    assert read_text(path, field="story") == "the cat"
    assert rows(windows(path, tokenizer, 3, 1, field="story")).tolist() == [[0, WORDS.index("the"), WORDS.index("cat")]]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"tex\n', "line 2: no JSON"),
        ("a.jsonl", b'{"story": "a"}\n', "line 1: no text under 'text', but the fields story; name one with --field"),
        ("a.jsonl", b"[1]\n", "no object"),
        ("a.txt", b"the cat", "holds 2 tokens, fewer than one window of 7"),
        ("a.txt", b"", "holds 0 tokens"),
        ("a.txt", b"caf\xe9 cat", "is no UTF-8 text: byte 0xe9 at 3"),
    ],
    ids=["cut", "field", "list", "short", "empty", "latin-1"],
)
def test_what_is_no_text_is_refused(tokenizer, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        windows(tmp_path / name, tokenizer, 8, 2)


def test_what_is_no_batch_is_refused(tokenizer, text):
    for source, words in (
        ([], "no batch"),
        ([torch.rand(2, 3)], "whole numbers"),
        ([{"pixels": torch.ones(1, 2)}], "has no input_ids, but pixels"),
        ([["a"]], "no batch of token ids"),
        ([torch.ones(1, 0, dtype=torch.long)], "whole numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            windows(source)
    with pytest.raises(ValueError, match="give the model's tokenizer"):
        windows(text)
    with pytest.raises(ValueError, match="two tokens at least"):
        windows(text, tokenizer, 1)
    with pytest.raises(ValueError, match="plain text, which has no field"):
        read_text(text, field="story")
    with pytest.raises(ValueError, match="is a folder"):
        read_text(text.parent)
    with pytest.raises(FileNotFoundError):
        read_text(text.with_name("absent.txt"))


def test_parquet_without_pyarrow_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ModuleNotFoundError, match="pip install pyarrow"):
        read_text(tmp_path / "a.parquet")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["the cat", None, "a dog"], "n": [1, 2, 3]}), path)
    assert read_text(path) == "the cat\n\na dog"
    with pytest.raises(ValueError, match="no column 'story', but text, n"):
        read_text(path, field="story")
    with pytest.raises(ValueError, match="not text"):
        read_text(path, field="n")


def test_a_frame_is_what_the_tokenizer_adds(tokenizer):
    assert frame(tokenizer) == ([0], [])


def test_default_length_is_the_context_2048_at_most():
    assert [default_length(x) for x in (512, 4096, None)] == [512, 2048, 2048]


def test_the_context_of_a_configuration(tmp_path):
    import transformers

    transformers.GPT2Config(n_positions=64).save_pretrained(tmp_path)
    assert context_length(read_config(tmp_path)) == 64
    assert context_length(transformers.MambaConfig()) is None


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no model directory: it has no config\.json"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        read_config(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no model that transformers knows"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer that can be read"):
        read_tokenizer(tmp_path)
