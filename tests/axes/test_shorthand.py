import pytest

from rarefy.axes.schedule import Cubic, Every, OneShot, SparsitySchedule
from rarefy.axes.shorthand import parse_named, suggest

NAMES = {"cubic": Cubic, "one_shot": OneShot}


@pytest.mark.parametrize("x", ["cubic", Cubic(), Cubic().to_dict()], ids=str)
def test_a_name_a_value_and_its_dict_are_one(x):
    assert parse_named(x, SparsitySchedule, NAMES, "a schedule") == Cubic()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ("qubic", "'qubic' is not a schedule; did you mean 'cubic'"),
        ("", "'' is not a schedule; known are 'cubic', 'one_shot'"),
        (3, "3 is not a schedule; known are 'cubic', 'one_shot'"),
        (Every(), r"Every\(.*\) is not a schedule"),
        (Every().to_dict(), r"Every\(.*\) is not a schedule"),
        ({"every": 3}, "needs a 'kind'"),
        ({"kind": "Qubic"}, "did you mean 'Cubic'"),
    ],
    ids=str,
)
def test_anything_else_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        parse_named(x, SparsitySchedule, NAMES, "a schedule")


def test_suggest():
    assert suggest("magnitud", ["magnitude", "snip"]) == "did you mean 'magnitude'?"
    assert suggest("xyz", ["magnitude", "snip"]) == "known are 'magnitude', 'snip'"
    assert suggest("xyz", []) == ""
