import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rarefy.cli import main

FAST = ["--steps", "10", "--seeds", "2"]


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_demo_compares_six_methods_with_the_baselines(capsys, tmp_path):
    code, out, err = run(capsys, "demo", "--out", tmp_path / "demo", *FAST)
    assert (code, err) == (0, "")
    for title in (
        "dense",
        "random ERK",
        "random search",
        "magnitude",
        "SynFlow",
        "SNIP",
        "SET",
        "RigL",
        "GMP",
        "GraNet",
    ):
        assert title in out
    assert "5 % kept (2\u202f510 of 50\u202f200)" in out
    assert "What to try next:" in out
    assert len(list((tmp_path / "demo").glob("*.json"))) == 20


def test_bench_speaks_json_and_goes_on_where_it_was(capsys, tmp_path):
    arguments = ["bench", "digits", "--methods", "rigl", "--sparsities", ".9,.95", "--controls", "shuffled,small-dense"]
    arguments += ["--out", tmp_path / "out", "--json", *FAST]
    code, out, _ = run(capsys, *arguments)
    content = json.loads(out)
    assert (code, content["made"], content["read"], content["failures"]) == (0, 26, 0, [])
    assert [table["sparsity"] for table in content["tables"]] == [0.9, 0.95]
    rigl = next(row for row in content["tables"][0]["rows"] if row["name"] == "rigl" and row["control"] == "none")
    assert rigl["nonzeros"] == [5020]
    assert rigl["method"]["kind"] == "RigL"
    assert set(rigl["by_seed"]) == {"0", "1"}
    assert content["tables"][0]["sentences"]
    again = json.loads(run(capsys, *arguments)[1])
    assert (again["made"], again["read"]) == (0, 26)
    assert again["tables"] == content["tables"]


def test_bench_can_leave_the_test_images_alone(capsys, tmp_path):
    code, out, _ = run(capsys, "bench", "digits", "--methods", "", "--judge", "validation", "--out", tmp_path, *FAST)
    assert code == 0
    assert "judged on held-out training images" in out
    assert "240 held-out images" in out


def test_methods_lists_every_name(capsys):
    code, out, _ = run(capsys, "methods", "--json")
    listed = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert listed["rigl"]["stage"] == "training"
    assert listed["snip"]["needs"] == ["data", "loss"]
    assert "arXiv:1911.11134" in listed["rigl"]["paper"]
    code, out, _ = run(capsys, "methods")
    assert code == 0
    assert all(name in out for name in listed)
    assert all(word in out for word in ("stage", "needs", "extra cost", "paper"))


def test_report_writes_a_page_or_markdown(capsys, tmp_path):
    run(capsys, "bench", "digits", "--methods", "set", "--sparsities", ".9", "--out", tmp_path / "out", *FAST)
    (tmp_path / "out/half.json").write_text('{"format": "rarefy.ben')
    code, out, err = run(capsys, "report", tmp_path / "out", "-o", tmp_path / "page.html", "--json")
    assert (code, json.loads(out)["results"]) == (0, 10)
    assert "left out: half.json is not a whole result file" in err
    assert "Plotly.newPlot(" in (tmp_path / "page.html").read_text()
    run(capsys, "report", tmp_path / "out", "--output", tmp_path / "page.md")
    assert "| SET |" in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "mnist"], "no task is named 'mnist'; there are digits"),
        (["bench", "digits", "--methods", "rigll"], "no method is named 'rigll'; did you mean rigl"),
        (["bench", "digits", "--sparsities", "1.0"], "sparsity 1 must be above 0 and below 1"),
        (["bench", "digits", "--sparsities", "much"], "--sparsities: 'much' is no number"),
        (["bench", "digits", "--controls", "placebo"], "--controls: no control is named 'placebo'"),
        (["bench", "digits", "--seeds", "0"], "at least one seed"),
        (["bench", "digits", "--steps", "0"], "steps must be at least 1"),
        (["bench", "digits", "--threads", "0"], "at least one thread"),
        (["bench", "fashion-mnist", "--data", "none"], "--data DIR or RAREFY_DATA=DIR"),
        (["report", "none"], "none is no folder of results"),
        (["report", "."], "holds no result"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_unknown_commands_and_options_are_exit_code_2(capsys):
    for arguments in (["frobnicate"], ["bench", "digits", "--frobnicate"]):
        assert run(capsys, *arguments)[0] == 2


def test_a_run_that_fails_is_exit_code_1(capsys, tmp_path, monkeypatch):
    import rarefy

    def fail(self, s):
        raise ValueError("no such luck")

    monkeypatch.setattr(rarefy.SNIP, "begin", fail)
    arguments = ["bench", "digits", "--methods", "snip", "--sparsities", ".9", "--out", tmp_path, *FAST]
    code, out, err = run(capsys, *arguments)
    assert code == 1
    assert "Failed: snip at 0.9, seed 0: no such luck" in out
    assert "no such luck" in err


def test_the_module_is_the_command():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    done = subprocess.run(
        [sys.executable, "-m", "rarefy", "methods", "--json"], env=environment, capture_output=True, check=True
    )
    assert json.loads(done.stdout)
