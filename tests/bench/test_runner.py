import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import rarefy
from rarefy.bench.data import Data, Split
from rarefy.bench.execute import execute, unpack_masks
from rarefy.bench.lineup import make_method
from rarefy.bench.results import Control
from rarefy.bench.runner import Reporter, run_all, settings
from rarefy.bench.runs import Run, sweep
from rarefy.bench.store import Store
from rarefy.bench.tasks import Digits

TASK = Digits(steps=12, every=4)
METHODS = ("random", "random-search", "magnitude", "snip", "grasp", "synflow", "rigl", "gmp", "granet", "imp", "sr-ste")


@pytest.fixture(scope="module")
def data() -> Data:
    return TASK.load()


@pytest.fixture
def store(tmp_path, data):
    with settings(threads=1) as environment:
        yield Store(tmp_path, data, environment)


def make_run(name: str, sparsity: float = 0.9, seed: int = 0, control: Control = "none") -> Run:
    return Run(name, TASK, make_method(name, TASK, sparsity), 0.0 if name == "dense" else sparsity, seed, control)


class Notes(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.work = self.done = 0

    def plan(self, work: int) -> None:
        self.work = work

    def tick(self, batches: int) -> None:
        self.done += batches

    def note(self, text: str) -> None:
        self.notes.append(text)


# --- one run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_its_budget_and_leaves_global_randomness_alone(store, name):
    before, before_np = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    result, masks = execute(make_run(name), store.data, store.environment)
    assert result.train.nonzeros == sum(result.train.kept.values()) == 5020
    assert sum(int(m.sum()) for m in unpack_masks(masks, TASK.build(0)).values()) == 5020
    assert result.train.parameters_nonzero == 5020 + 410
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], before_np)  # noqa: NPY002


def test_a_run_repeats_itself(store):
    first, second = (execute(make_run("rigl"), store.data, store.environment) for _ in range(2))
    assert first[1] == second[1]
    assert first[0].train.model_copy(update={"wall_seconds": 0.0}) == second[0].train.model_copy(
        update={"wall_seconds": 0.0}
    )


@pytest.mark.parametrize("name", METHODS)
def test_what_is_trained_does_not_depend_on_the_test_images(store, name):
    """Search methods, scores and schedules see training images only."""
    other = Split(torch.full_like(store.data.test.inputs, torch.nan), store.data.test.labels)
    a = execute(make_run(name), store.data, store.environment)
    b = execute(make_run(name), Data(store.data.train, other), store.environment)
    assert a[1] == b[1]
    assert a[0].train.train_accuracy == b[0].train.train_accuracy


def test_flops_follow_the_convention(store):
    dense_step = 3 * 2 * 50_200 * 64
    flops = {n: execute(make_run(n), store.data, store.environment)[0].train.flops for n in ("dense", "random", "snip")}
    assert flops["dense"].training == flops["dense"].training_dense == 12 * dense_step
    assert flops["random"].training == pytest.approx(0.1 * 12 * dense_step)
    assert flops["random"].inference == pytest.approx(0.1 * flops["random"].inference_dense)
    # SNIP scores once, densely: one pass with gradients over 10 images of each class.
    assert flops["snip"].scoring == 3 * 2 * 50_200 * 100
    assert flops["snip"].training == pytest.approx(flops["random"].training + flops["snip"].scoring)


def test_random_search_pays_for_its_candidates(store):
    run = make_run("random-search")
    scoring = execute(run, store.data, store.environment)[0].train.flops.scoring
    assert scoring == pytest.approx(run.method.candidates * 2 * 5020 * 100)  # pyright: ignore


def test_one_shot_methods_prune_a_network_that_was_trained(store):
    result, _ = execute(make_run("magnitude"), store.data, store.environment)
    assert result.train.labels == ["static", "dense-to-sparse", "simulated"]
    assert result.train.average_parameters == pytest.approx(0.5 * 50_200 + 0.5 * 5020)
    assert result.train.flops.training == pytest.approx(0.55 * result.train.flops.training_dense)
    assert result.train.explored == 1


def test_a_driver_pays_for_every_round(store):
    result, _ = execute(make_run("imp"), store.data, store.environment)
    rounds = make_run("imp").method.rounds(50_200)  # pyright: ignore
    assert result.train.flops.training == pytest.approx(sum(rounds) / 50_200 * result.train.flops.training_dense)


# --- controls --------------------------------------------------------------------------------------------------------


def test_shuffled_masks_keep_counts_and_first_weights_reinitialised_ones_keep_masks(store):
    _, file = execute(make_run("snip"), store.data, store.environment)
    parent = unpack_masks(file, TASK.build(0))
    shuffled, moved = execute(make_run("snip", control="shuffled"), store.data, store.environment, parent=parent)
    same, kept = execute(make_run("snip", control="reinitialised"), store.data, store.environment, parent=parent)
    assert kept == file
    assert moved != file
    assert shuffled.train.kept == same.train.kept == {name: int(mask.sum()) for name, mask in parent.items()}
    assert shuffled.method == make_run("snip").method.to_dict()
    assert shuffled.train.labels == ["static", "sparse-to-sparse", "simulated"]


def test_a_control_without_its_parent_is_refused(store):
    with pytest.raises(ValueError, match=r"needs the final masks of snip at 0\.9, seed 0"):
        execute(make_run("snip", control="shuffled"), store.data, store.environment)


def test_a_small_dense_network_has_no_more_parameters(store):
    run = dataclasses.replace(make_run("dense", control="small_dense"), sparsity=0.9)
    result, _ = execute(run, store.data, store.environment)
    assert 0.95 * (5020 + 410) < result.train.parameters <= 5020 + 410
    assert result.train.nonzeros == result.train.prunable


def test_extended_training_is_twice_as_long_and_says_so(store):
    plain, _ = execute(make_run("random"), store.data, store.environment)
    longer, _ = execute(make_run("random", control="extended"), store.data, store.environment)
    assert longer.run.steps == 2 * plain.run.steps
    assert longer.train.flops.training == pytest.approx(2 * plain.train.flops.training)
    assert longer.train.flops.training_dense == plain.train.flops.training_dense


# --- a sweep ---------------------------------------------------------------------------------------------------------


def runs_of(*names: str, controls: tuple[Control, ...] = ()) -> list[Run]:
    return sweep(TASK, list(names), [0.9], seeds=1, controls=controls)


def test_a_sweep_is_made_once_and_read_afterwards(store):
    runs, notes = runs_of("rigl", controls=("shuffled",)), Notes()
    first = run_all(runs, store, notes)
    assert (first.made, len(first.results), first.failures) == (6, 6, [])
    assert notes.done == notes.work == 6 * 12
    again = run_all(runs, store, notes := Notes())
    assert (again.made, again.results, notes.work) == (0, first.results, 0)


def test_only_what_is_missing_or_damaged_is_made_again(store):
    runs = runs_of()
    first = run_all(runs, store)
    paths = [store.path(run) for run in runs]
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:400])
    paths[2].write_text('{"from": "elsewhere"}')
    notes = Notes()
    second = run_all(runs, store, notes)
    assert second.made == 3
    assert [r.train.accuracy for r in second.results] == [r.train.accuracy for r in first.results]
    assert len(notes.notes) == 2
    assert all("is not a whole result file" in note and "it is run again" in note for note in notes.notes)


def test_a_result_under_another_name_is_not_taken(store):
    runs = runs_of()
    run_all(runs, store)
    store.path(runs[0]).write_bytes(store.path(runs[1]).read_bytes())
    notes = Notes()
    assert run_all(runs, store, notes).made == 1
    assert "holds another run; it is run again" in notes.notes[0]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["lost", "damaged"])
def test_a_parent_whose_masks_are_lost_is_made_again_for_its_control(store, damage):
    plain, with_control = runs_of("snip"), runs_of("snip", controls=("shuffled",))
    run_all(plain, store)
    snip = next(run for run in plain if run.name == "snip")
    damage(store.path(snip).with_suffix(".safetensors"))
    assert run_all(plain, store).made == 0
    assert run_all(with_control, store).made == 2


def test_other_settings_are_other_runs(store):
    run_all(runs_of(), store)
    threads = store.environment.model_copy(update={"threads": 2})
    assert len(Store(store.folder, store.data, threads).pending(runs_of())) == 4


def test_a_run_that_fails_is_reported_and_the_others_go_on(store, monkeypatch):
    def fail(self, s):
        raise ValueError("weights of 'fc1' hold 3 NaN")

    monkeypatch.setattr(rarefy.SNIP, "begin", fail)
    notes = Notes()
    outcome = run_all(runs_of("snip", "rigl"), store, notes)
    assert outcome.failures == notes.notes == ["snip at 0.9, seed 0: weights of 'fc1' hold 3 NaN"]
    assert len(outcome.results) == 5


def test_settings_are_restored(store):
    before = torch.get_num_threads()
    tiny = torch.tensor(3e-308, dtype=torch.float64)
    with settings(threads=2) as environment:
        assert torch.get_num_threads() == environment.threads == 2
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="at least one thread"), settings(threads=0):
        pass
    torch.set_flush_denormal(False)
    with settings(threads=1) as environment:
        assert environment.flush_denormal == (float(tiny / 4) == 0)
    assert float(tiny / 4) > 0


SWEEP = """
import sys
from pathlib import Path
from rarefy.bench.runner import run_all, settings
from rarefy.bench.runs import sweep
from rarefy.bench.store import Store
from rarefy.bench.tasks import Digits

task = Digits(steps=200, every=20)
with settings(1) as environment:
    run_all(sweep(task, ["rigl"], [0.9], 1), Store(Path(sys.argv[1]), task.load(), environment))
"""


def test_a_sweep_that_is_killed_goes_on_where_it_stopped(tmp_path, data):
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    killed = subprocess.Popen([sys.executable, "-c", SWEEP, str(tmp_path / "killed")], env=path)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "killed").glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL

    survived = {path: path.read_bytes() for path in (tmp_path / "killed").glob("*.json")}
    assert 2 <= len(survived) < 5
    runs = sweep(Digits(steps=200, every=20), ["rigl"], [0.9], 1)
    with settings(threads=1) as environment:
        made = [run_all(runs, Store(tmp_path / f, data, environment)).made for f in ("killed", "whole")]
    assert made == [5 - len(survived), 5]
    assert all(path.read_bytes() == content for path, content in survived.items())
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")


def numbers(folder: Path) -> dict[str, object]:
    """All results but their times."""
    found = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    for result in found.values():
        del result["train"]["wall_seconds"]
    return dict(found)
