import fnmatch
import json

import pytest

from bench.cpu.made_rows import made
from rarefy.bench.cpu import accuracy, goals
from rarefy.bench.cpu.goals import geometric_mean, matrix_goals, reason, training_goals


def by_point(found, point):
    (goal,) = [goal for goal in found if goal.point == point]
    return goal


def test_without_rows_nothing_is_measured_and_nothing_is_met():
    for goal in (*matrix_goals([]), *training_goals([])):
        assert goal.met is None
        assert goal.measured == "not measured"


def test_points_are_unique():
    points = [goal.point for goal in (*matrix_goals([]), *training_goals([]))]
    assert len(points) == len(set(points))


@pytest.mark.parametrize(("kernel", "met"), [(9.9, True), (10.0, True), (10.1, False)])
def test_batch_one_is_judged_by_the_kernel_and_tells_the_layer(kernel, met):
    row = made({"torch fp32": 80.0, "kernel lut/few": kernel, "kernel bitmap/few": 40.0, "rarefy": 16.0})
    goal = by_point(matrix_goals([row]), "1 hot 1024x1024 90 % fp32")
    assert goal.met is met
    assert "lut/few" in goal.measured
    assert goal.measured.endswith("as a layer 5.0×")


def test_cold_is_judged_over_the_best_dense_of_the_same_values():
    row = made(
        {
            "torch fp32": 9000.0, "torch bf16": 900.0, "rarefy dense bf16": 600.0, "llama.cpp BF16": 100.0,
            "kernel a": 210.0,
        },
        name="4096x4096", regime="cold", dtype="bf16",
    )  # fmt: skip
    goal = by_point(matrix_goals([row]), "1 cold 4096x4096 90 % bf16")
    assert goal.met is False
    assert goal.measured.startswith("2.9× (a, 210 µs, over rarefy dense bf16)")


@pytest.mark.parametrize(("sparsity", "over", "met"), [(0.5, 1.49, True), (0.5, 1.51, False), (0.9, 1.79, True)])
def test_the_byte_floor(sparsity, over, met):
    row = made({"kernel a": 100.0 * over}, name="4096x4096", regime="cold", sparsity=sparsity)
    row = row.model_copy(update={"facts": {"byte floor µs": 100.0}})
    assert by_point(matrix_goals([row]), f"1 floor 4096x4096 {100 * sparsity:g} % fp32").met is met


def test_the_share_of_the_peak_is_that_of_the_fastest_kernel():
    row = made({"torch fp32": 1000.0, "rarefy": 200.0, "kernel a": 100.0}, batch=128, sparsity=0.8)
    row = row.model_copy(update={"facts": {"share of peak": 0.4}})
    goal = by_point(matrix_goals([row]), "2 1024x1024 batch 128 80 % fp32 share")
    assert goal.measured == "80 % (a)"
    assert goal.met is True


def test_never_lose_counts_only_cases_beyond_doubt():
    good = made({"torch fp32": 200.0, "rarefy dense fp32": 120.0, "rarefy": 100.0})
    even = made({"torch fp32": 98.0, "rarefy": 100.0}, batch=8)
    bad = made({"torch fp32": 50.0, "rarefy": 100.0}, batch=32)
    assert by_point(matrix_goals([good, even]), "3 never lose").met is True
    goal = by_point(matrix_goals([good, even, bad]), "3 never lose")
    assert goal.met is False
    assert goal.measured.startswith("1 of 3 cases below 0.97×; the worst 0.50×")
    mean = by_point(matrix_goals([good, bad]), "3 mean")
    assert mean.measured == f"{(1.2 * 0.5) ** 0.5:.2f}× over 2 cases"
    assert mean.met is False


def test_a_layer_is_judged_over_dense_layers():
    times = {"torch fp32": 50.0, "rarefy dense fp32": 20.0, "rarefy dense fp32 as a layer": 26.0, "rarefy": 26.0}
    assert by_point(matrix_goals([made(times)]), "3 mean").measured.startswith("1.00×")


def test_regret_is_over_everything_that_could_have_been_chosen_on_held_out_shapes():
    chosen = {"chosen kernel": "kernel a"}
    times = {"torch fp32": 900.0, "kernel b": 100.0, "kernel a": 101.0, "rarefy": 107.0}
    fine = made(times, held_out=True, facts=chosen)
    wrong = made({"torch fp32": 80.0, "kernel a": 100.0, "rarefy": 106.0}, held_out=True, batch=3, facts=chosen)
    seen = made({"torch fp32": 1.0, "kernel a": 1.0, "rarefy": 100.0}, facts=chosen)
    goal = by_point(matrix_goals([fine, wrong, seen]), "3 regret")
    mean = 100 * ((1.01 * 1.25) ** 0.5 - 1)
    assert goal.measured == f"{mean:.1f} % mean over 2, worst 25 % (1024x1024 batch 3 fp32 90 % hot)"
    assert goal.met is False


def test_deepsparse_is_compared_in_chains_alone():
    times = {"torch fp32": 9.0, "DeepSparse": 2.0, "rarefy": 1.0}
    chain = made(times, section="chain", name="4 × Linear 1024")
    matrix = made({**times, "DeepSparse": 0.1})
    assert by_point(matrix_goals([chain, matrix]), "4 DeepSparse").met is True
    slower = made({**times, "DeepSparse": 0.9}, section="chain", name="4 × Linear 1024", batch=32)
    goal = by_point(matrix_goals([chain, slower]), "4 DeepSparse")
    assert goal.met is False
    assert goal.measured.startswith("slower in 1 of 2; the least 0.90×")


def test_training_goals_with_their_stretch():
    common = {"section": "training", "name": "3072-4096-4096-10", "batch": 128, "sparsity": 0.99}
    row = made({"torch fp32": 160_000.0, "sparseprop": 10_000.0, "rarefy": 8_000.0}, **common)
    row = row.model_copy(update={"facts": {"bytes per non-zero": 24.6}})
    found = training_goals([row])
    assert by_point(found, "5 3072-4096-4096-10 99 %").met is True
    assert by_point(found, "5 3072-4096-4096-10 99 % (stretch)").met is False
    assert by_point(found, "5 sparseprop").met is False
    assert by_point(found, "5 memory").met is True


def test_a_reason_is_told_only_where_a_goal_is_not_met(monkeypatch):
    monkeypatch.setattr(goals, "_reasons", lambda: {"1 hot 1024x1024 90 % fp32": "the call itself"})
    point = "1 hot 1024x1024 90 % fp32"
    assert by_point(matrix_goals([made({"torch fp32": 80.0, "kernel a": 40.0})]), point).reason == "the call itself"
    assert by_point(matrix_goals([made({"torch fp32": 80.0, "kernel a": 4.0})]), point).reason == ""


def test_reasons_are_of_goals_that_there_are():
    points = {goal.point for goal in (*matrix_goals([]), *training_goals([]))}
    points |= {f"int8 {name} {out}x{inputs}" for name, out, inputs in accuracy._SHAPES}
    for pattern in json.loads(goals._REASONS.read_text()):
        assert fnmatch.filter(points, pattern), f"no goal fits {pattern!r}"
    assert reason("no such goal") == ""


def test_the_geometric_mean():
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
