import itertools
import json

import pytest

from bench.made import ENVIRONMENT, result
from rarefy.bench.leaderboard import Row, Table, make_row, make_tables
from rarefy.bench.statistics import interval
from rarefy.bench.tables import footer, markdown
from rarefy.bench.words import heading, sentences

ACCURACY = {
    "dense": [98.0, 98.2, 98.1],
    "rigl": [97.0, 97.3, 97.2],
    "set": [96.0, 97.9, 96.9],
    "random": [95.0, 95.4, 95.1],
}


def results(**more):
    return [result(name, a, seed=s) for name, xs in {**ACCURACY, **more}.items() for s, a in enumerate(xs)]


def table(found=None) -> Table:
    (only,) = make_tables(results() if found is None else found)
    return only


def test_rows_are_means_over_seeds_best_first():
    rows = table().rows
    assert [row.name for row in rows] == ["dense", "rigl", "set", "random"]
    assert rows[1].accuracy == interval(ACCURACY["rigl"])
    assert rows[1].by_seed == {0: 97.0, 1: 97.3, 2: 97.2}
    assert (rows[0].nonzeros, rows[1].nonzeros) == ((100,), (10,))
    assert rows[1].training == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("labels", "no class labels"),
        ("sites", "no site-list hash"),
        ("nonzeros", "no exact non-zeros"),
        ("formula", "no FLOPs formula"),
        ("by_seed", "no seeds"),
    ],
)
def test_a_row_without_what_a_comparison_stands_on_is_rejected(field, words):
    row = make_row([result()])
    with pytest.raises(ValueError, match=f"random at 0.9 is rejected: it has {words}"):
        Row(**{**{f: getattr(row, f) for f in row.__dataclass_fields__}, field: type(getattr(row, field))()})


@pytest.mark.parametrize(
    "other",
    [
        result(seed=1, method={"kind": "other"}),
        result(seed=1, sites="0ther"),
        result(seed=1, labels=["dynamic"]),
        result(seed=0, accuracy=1.0),
    ],
    ids=["method", "sites", "labels", "seed twice"],
)
def test_results_that_differ_in_more_than_their_seed_make_no_row(other):
    with pytest.raises(ValueError, match="is rejected"):
        make_row([result(), other])
    assert "is rejected" in " ".join(table([result(), other]).rejected)


def test_rows_on_other_tensors_are_left_out_and_named():
    found = table([*results(), result("snip", 99.0, sites="0ther")])
    assert found.row("snip") is None
    assert found.rejected == ("snip is rejected: other prunable tensors or another FLOPs formula",)
    assert found.rejected[0] in sentences(found)


def test_a_small_dense_network_may_have_other_tensors():
    found = table([*results(), result("dense", 90.0, control="small_dense", sites="0ther")])
    assert found.row("dense", "small_dense") is not None


def test_settings_are_never_mixed():
    other = ENVIRONMENT.model_copy(update={"code": "0ther"})
    found = make_tables([*results(), *(result("rigl", 50.0, seed=s, environment=other) for s in range(3))])
    assert [len(t.rows) for t in found] == [4, 1]


def test_dense_stands_in_the_table_of_every_sparsity():
    found = make_tables([*results(), *(result("rigl", 90.0, seed=s, sparsity=0.98) for s in range(3))])
    assert [t.sparsity for t in found] == [0.9, 0.98]
    assert all(t.row("dense") for t in found)


def test_dense_alone_is_a_table_too():
    assert table([result("dense")]).sparsity == 0
    assert heading(table([result("dense")])).startswith("digits · MLP 64-300-100-10 · 1 seed")


def test_controls_stand_below_their_method():
    controls = [result("set", 99.5, control="extended"), result("set", 90.0, control="shuffled")]
    rows = table([*results(), *controls]).rows
    assert [(r.name, r.control) for r in rows][2:5] == [("set", "none"), ("set", "shuffled"), ("set", "extended")]


def test_order_does_not_depend_on_the_order_of_files():
    found = [*results(), result("set", 90.0, control="shuffled"), result("snip", 97.0)]
    tables = [table(list(order)).to_dict() for order in itertools.islice(itertools.permutations(found), 5)]
    assert all(t == tables[0] for t in tables)


def test_differences_are_paired_by_seed_and_said_in_words():
    said = " ".join(sentences(table()))
    assert "Over random ERK, in points, seed by seed, with 95 % interval: RigL +2.0 [1.8, 2.2]." in said
    assert "Not resolved by 3 seeds over random ERK: SET +1.8 [" in said
    assert "In the table, not resolved by 3 seeds: RigL over SET" in said
    assert "one image (0.17 points)" in said


def test_many_comparisons_are_corrected_for():
    found = table()
    assert len(found.comparisons) == 4
    assert all(c.p_holm >= c.difference.p for c in found.comparisons)
    assert "These are 4 comparisons, and 0.2 would look resolved if nothing differed." in " ".join(sentences(found))


def test_one_seed_shows_nothing_and_says_so():
    said = " ".join(sentences(table([result("dense", 98.0), result("rigl", 97.0), result("random", 90.0)])))
    assert "Not resolved by 1 seed over random ERK: RigL +7.0." in said
    assert "One seed has no interval" in said


def test_another_budget_and_missing_seeds_are_named():
    found = table([*results(), result("snip", 97.0, kept=12)])
    said = sentences(found)
    assert "SNIP keeps 12 weights: not the same budget." in said
    assert "SNIP lacks seed 1, 2." in said


def test_a_table_is_json():
    content = table([*results(), result("snip", 97.0)]).to_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    snip = next(c for c in content["comparisons"] if c["better"] == ["snip", "none"])
    assert snip["difference"]["low"] is None


def test_markdown_has_a_row_for_every_method_and_the_conventions():
    text = markdown([table()])
    assert text.startswith("### digits · MLP 64-300-100-10 · 10 % kept (10 of 100) · 3 seeds · 1\u202f500 steps")
    assert "| RigL | 97.2 ± 0.4 | 10 | 0.100× | 0.100× | dynamic, sparse-to-sparse, simulated |" in text
    assert "← neutral baseline" in text
    assert footer(table()) in text
    for convention in ("rigl-appendix-2mac", "51735", "torch 2.13", "1 thread"):
        assert convention in footer(table())
