import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rarefy.bench import speed
from rarefy.bench.leaderboard import make_tables
from rarefy.bench.runner import run_all, settings
from rarefy.bench.runs import sweep
from rarefy.bench.speed import NETWORKS, demonstrate, load_subject, thinned
from rarefy.bench.store import Store
from rarefy.bench.tasks import parse_task
from rarefy.cli import main

pytestmark = [  # said once a process, by whichever test packs first
    pytest.mark.filterwarnings("ignore:this process has loaded"),
    pytest.mark.filterwarnings("ignore:pack has nothing but torch"),
]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("RAREFY_CACHE", "0")


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"mlp-4096"}))
def test_networks_take_their_samples(name):
    subject = load_subject(name, 0.9)
    layers = [m for m in subject.model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert all(0.85 < (m.weight == 0).float().mean() < 0.95 for m in layers)
    with torch.no_grad():
        assert len(subject.model(torch.ones(2, *subject.sample))) == 2


def test_the_same_zeros_every_time():
    a, b = (thinned(nn.Linear(30, 30), 0.5).weight == 0 for _ in range(2))
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="below 1"):
        thinned(nn.Linear(3, 3), 1.0)


def test_a_file_is_its_matrices(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.randn(8, 6), "b": torch.randn(5, 9).bfloat16(), "bias": torch.randn(8)}, path)
    subject = load_subject(str(path), 0.9)
    report = speed.speed(subject, batches=[1, 3])
    assert [(row.name, row.shape) for row in report.rows] == [("layers.a/weight", (8, 6)), ("layers.b", (5, 9))]
    save_file({"bias": torch.randn(8)}, path)
    with pytest.raises(ValueError, match="no matrix"):
        load_subject(str(path), 0.9)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_subject(str(path), 0.9)
    with pytest.raises(ValueError, match="neither"):
        load_subject("resnet", 0.9)


def test_batches_are_numbers_of_samples():
    with pytest.raises(ValueError, match="--batch"):
        speed.speed(load_subject("digits-mlp", 0.9), batches=[0])


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_the_command_prints_choices_and_times(capsys):
    code, out, err = run(capsys, "speed", "digits-mlp", "--batch", "1,8", "--json")
    content = json.loads(out)
    assert (code, err, content["batches"]) == (0, "", [1, 8])
    assert [layer["name"] for layer in content["layers"]] == ["fc1", "fc2", "fc3"]
    assert all({c["tokens"] for c in layer["candidates"]} == {1, 8} for layer in content["layers"])
    code, out, _ = run(capsys, "speed", "digits-mlp", "--sparsity", "0.95", "--quantize", "int8", "--threads", "1")
    assert code == 0
    assert "digits-mlp, 95% zeros, batch 1" in out
    assert "fc3" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resnet"], "neither a safetensors file nor one of digits-mlp"),
        (["digits-mlp", "--batch", "many"], "--batch: 'many' is no whole number"),
        (["digits-mlp", "--batch", "0"], "--batch 0"),
        (["digits-mlp", "--sparsity", "1"], "--sparsity 1"),
        (["digits-mlp", "--threads", "0"], "at least one thread"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(capsys, arguments, words):
    code, out, err = run(capsys, "speed", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_the_best_sparse_network_of_a_demo_is_packed(tmp_path):
    task = parse_task("digits", steps=5)
    data = task.load(None)
    runs = sweep(task, ["rigl"], [0.9], 1, [])
    with settings(1) as environment:
        outcome = run_all(runs, Store(tmp_path, data, environment))
        (table,) = make_tables(outcome.results)
        found = demonstrate(table, runs, data)
    assert found is not None
    assert [row.name for row in found.report.rows] == ["fc1", "fc2", "fc3"]
    assert "one image at a time" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["title"] == found.title
    with settings(1):
        assert demonstrate(table, [r for r in runs if r.name == "dense"], data) is None
