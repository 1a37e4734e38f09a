import json
import math

import pytest
import torch

from language import CONTEXT, save_llama, text_of
from rarefy.bench.language import __main__ as command
from rarefy.bench.language.cases import PATTERNS, Case, cases
from rarefy.bench.language.corpus import Corpus
from rarefy.bench.language.runs import Result, Settings, Store, execute, open_bench
from rarefy.bench.language.table import Table, compare, grid, sentences
from rarefy.bench.one_shot import METHODS

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'rarefy[hf]'")
SETTINGS = Settings(length=16, samples=8, windows=6, seeds=2, threads=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name, seed in (("train", 1), ("judged", 2)):
        (folder / f"{name}.py").write_text(text_of(400, seed))
    return Corpus((folder / "train.py",), (folder / "judged.py",))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def bench(model, corpus):
    return open_bench(model, corpus, SETTINGS)


def test_every_case_once():
    found = list(cases(PATTERNS))
    assert len(set(found)) == len(found) == 6 * (2 + 4 * 3)
    assert {case.method for case in found} == set(METHODS)
    assert not any(case.owl for case in found if case.method == "Magnitude")


@pytest.mark.parametrize("case", [*cases(("60 %", "2:4"))], ids=lambda case: f"{case.variant} {case.pattern}")
def test_a_case_is_the_method_that_it_names(case):
    named = str(case.build())
    assert named.startswith("Refit(") == case.refit
    assert ("owl" in named.lower()) == case.owl
    assert ("0.6" in named) == (case.pattern == "60 %")
    assert ("2:4" in named) == (case.pattern == "2:4")
    assert case.seeds(3) == (range(1) if case.variant == "Magnitude" else range(3))


def test_windows_are_drawn_by_seed_and_judged_evenly(bench):
    first, again, other = bench.calibration(0), bench.calibration(0), bench.calibration(1)
    assert sum(len(batch["input_ids"]) for batch in first) == SETTINGS.samples
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0]["input_ids"], other[0]["input_ids"])
    assert bench.judged.shape == (6, 16)
    assert len(torch.unique(bench.judged, dim=0)) == 6


@pytest.mark.parametrize("case", [Case("Magnitude", "50 %"), Case("Wanda", "2:4", refit=True, owl=True)], ids=str)
def test_a_run_prunes_and_judges(bench, case):
    result = execute(bench, case, 0)
    assert result.kept == result.total // 2
    assert len(result.nll) == 6
    assert result.perplexity == pytest.approx(math.exp(sum(result.nll) / 6))
    assert result.seconds > 0
    assert Result.model_validate_json(result.model_dump_json()) == result


def test_what_is_done_is_not_made_again(bench, tmp_path):
    store = Store(tmp_path, bench.digest, [])
    case = Case("Magnitude", "50 %")
    assert store.find(case, 0) is None
    result = execute(bench, case, 0)
    store.save(case, 0, result)
    assert store.find(case, 0) == result
    assert store.find(Case("Magnitude", "60 %"), 0) is None
    assert Store(tmp_path, "another run", []).find(case, 0) is None
    store.path(case, 0).write_text("{")
    assert store.find(case, 0) is None
    assert "is run again" in store.problems[0]


def test_texts_that_are_too_short_are_refused(model, corpus):
    with pytest.raises(ValueError, match=f"longer than the context of .*: {CONTEXT}"):
        open_bench(model, corpus, Settings(length=CONTEXT + 1))
    with pytest.raises(ValueError, match="fewer than one window of 30"):
        open_bench(model, corpus, Settings(length=30, characters=20))


def made(variant, pattern, level, seed=0, key="k"):
    """Each window's loss is its own number, the level, and a little of the draw."""
    nll = [1 + i / 10 + level * (1 + 0.001 * i) + seed * 1e-4 for i in range(20)]
    mean = math.exp(sum(nll) / len(nll))
    return Result(
        key=key, variant=variant, pattern=pattern, seed=seed, method={}, kept=1, total=2, perplexity=mean, low=1.0,
        high=9.0, top1=0.5, nll=nll, seconds=2.0 + seed, peak=3_000_000, warnings=[],
    )  # fmt: skip


def table_of(levels, seeds=3):
    results = {
        cell: [made(*cell, level, seed) for seed in range(1 if cell[0] == "Magnitude" else seeds)]
        for cell, level in levels.items()
    }
    return Table(made("dense", "", 0.0), results)


def test_a_difference_is_resolved_where_windows_and_draws_agree():
    levels = {("Magnitude", "50 %"): 0.3, ("Wanda", "50 %"): 0.3, ("SparseGPT", "50 %"): 0.1, ("Wanda", "2:4"): 0.6}
    found = {(each.title, each.where): each for each in compare(table_of(levels))}
    better = found["SparseGPT against Wanda", "at 50 %"]
    assert better.resolved
    assert better.change == pytest.approx(100 * (math.exp(-0.2 * (1 + 0.001 * 9.5)) - 1))
    assert found["SparseGPT against Magnitude", "at 50 %"].resolved  # one draw stands for all
    assert found["2:4 against 50 %", "with Wanda"].resolved
    assert not found["Wanda against Magnitude", "at 50 %"].draws.resolved
    assert not found["Wanda against Magnitude", "at 50 %"].resolved


def test_draws_that_disagree_resolve_nothing():
    table = table_of({("Wanda", "50 %"): 0.3, ("SparseGPT", "50 %"): 0.1})
    moved = [made("SparseGPT", "50 %", level, seed) for seed, level in enumerate((-0.4, 0.5, -0.2))]
    table = Table(table.dense, {**table.results, ("SparseGPT", "50 %"): moved})
    (found,) = compare(table)
    assert found.p < 0.05
    assert not found.resolved


def test_sentences_say_what_was_expected():
    levels = {("Wanda", "50 %"): 0.3, ("SparseGPT", "50 %"): 0.1, ("Wanda + refit", "50 %"): 0.4}
    said = sentences(compare(table_of(levels)))
    assert said[0].startswith("SparseGPT against Wanda: resolved: -18.3 % at 50 %. Expected lower: as found.")
    assert "Wanda + refit against Wanda: resolved: +10.6 % at 50 %. Expected lower, and it is not at 50 %." in said


def test_the_grid_has_means_over_draws():
    shown = grid(table_of({("Magnitude", "50 %"): 0.3, ("Wanda", "50 %"): 0.2, ("Wanda", "2:4"): 6.0}))
    assert shown.columns == ("method", "50 %", "2:4", "s", "MB")
    assert [row[0] for row in shown.rows] == ["dense", "Magnitude", "Wanda"]
    assert shown.rows[1] == ("Magnitude", "9.51", "–", "2", "3")
    assert shown.rows[2][1] == "8.60 ± 0.00"
    assert shown.rows[2][2].startswith("3,000 ± ")


def test_the_command_writes_and_continues(model, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "standard_library", lambda: corpus)
    few = [Case("Magnitude", "50 %"), Case("Wanda", "50 %"), Case("SparseGPT", "50 %", refit=True, owl=True)]
    monkeypatch.setattr(command, "cases", lambda patterns: few)
    out, runs = tmp_path / "found.json", tmp_path / "runs"
    arguments = ["table", str(model), "--quick", "--length", "16", "--threads", "1"]
    arguments += ["--json", str(out), "--runs", str(runs)]
    trained = {"parameters": 1_200_000, "seconds": 120, "steps": 3000, "tokens": 4_500_000}
    (model / "training.json").write_text(json.dumps(trained))
    command.main(arguments)
    (model / "training.json").unlink()
    shown = " ".join(capsys.readouterr().out.split())
    assert "SparseGPT + OWL + refit" in shown
    assert "1.2 million parameters, trained for 2 minutes: 3,000 steps, 4.5 million tokens" in shown
    document = json.loads(out.read_text())
    assert len(document["results"]) == 3
    assert document["sentences"][0] in out.with_suffix(".md").read_text()
    times = {path: path.stat().st_mtime_ns for path in runs.iterdir()}
    assert len(times) == 4
    monkeypatch.setattr(command, "execute", lambda *_: pytest.fail("it was made again"))
    command.main(arguments)
    assert json.loads(out.read_text())["results"] == document["results"]
    assert times == {path: path.stat().st_mtime_ns for path in runs.iterdir()}
    with pytest.raises(SystemExit):
        command.main(["table", str(tmp_path), "--quick"])
