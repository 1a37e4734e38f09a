import dataclasses

import pytest

import rarefy
from rarefy.axes import Cubic, Every
from rarefy.bench.lineup import BASELINES, DEMO, known_names, make_method, method_class, parse_names, title
from rarefy.bench.runs import sweep
from rarefy.bench.tasks import Digits


def test_every_registered_method_is_known_by_name():
    assert {method_class(name) for name in known_names()} == set(rarefy.all_methods().values())
    assert len(set(known_names())) == len(known_names())
    assert {*BASELINES, *DEMO} <= set(known_names())


@pytest.mark.parametrize("name", known_names())
def test_every_method_can_be_made_in_the_pace_of_its_task(name):
    method = make_method(name, Digits(every=7), 0.9)
    assert getattr(method, "sparsity", 0.9) == 0.9
    for field in dataclasses.fields(method):
        x = getattr(method, field.name)
        assert not isinstance(x, Every) or x.interval == 7
        assert not isinstance(x, Cubic) or x.every == 7
    assert title(name)


def test_names_are_forgiving_and_unknown_ones_are_not():
    assert parse_names("RigL, random_search,TOPKAST,") == ["rigl", "random-search", "top-kast"]
    with pytest.raises(ValueError, match=r"no method is named 'riggl'; did you mean rigl\?"):
        parse_names("riggl")
    with pytest.raises(ValueError, match=r"no method is named 'xyzzyx'; known are .*rigl"):
        parse_names("xyzzyx")


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 2.0])
def test_impossible_sparsities_are_refused_before_anything_is_run(sparsity):
    with pytest.raises(ValueError, match="must be above 0 and below 1"):
        sweep(Digits(), [], [0.9, sparsity], seeds=1)


def test_baselines_are_in_every_sweep():
    runs = sweep(Digits(), ["rigl", "random"], [0.9, 0.95], seeds=2)
    assert {(r.name, r.sparsity) for r in runs} == {("dense", 0.0)} | {
        (name, s) for name in ("random", "random-search", "magnitude", "rigl") for s in (0.9, 0.95)
    }
    assert len(runs) == 2 + 2 * 2 * 4
    assert len(set(runs)) == len(runs)


def test_controls_follow_the_runs_that_they_need():
    runs = sweep(Digits(), ["rigl"], [0.9], seeds=2, controls=("shuffled", "reinitialised", "extended", "small_dense"))
    controls = {(r.name, r.control) for r in runs if r.control != "none"}
    assert controls == {
        ("rigl", "shuffled"),
        ("rigl", "reinitialised"),
        ("rigl", "extended"),
        ("dense", "extended"),
        ("dense", "small_dense"),
    }
    for run in runs:
        assert run.parent is None or runs.index(run.parent) < runs.index(run)
        assert run.steps == (3000 if run.control == "extended" else 1500)


def test_a_comparison_of_nothing_is_refused():
    for seeds, sparsities in ((0, [0.9]), (3, [])):
        with pytest.raises(ValueError, match="at least one seed and one sparsity"):
            sweep(Digits(), [], sparsities, seeds=seeds)
