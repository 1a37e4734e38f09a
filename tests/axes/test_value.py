"""Values: checked when made, errors that help, an exact trip through JSON."""

import copy
import dataclasses
import json
import pickle
import re
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BeforeValidator, Field

from rarefy.axes.value import Share, Value, from_dict, registered, value

SETTINGS = settings(deadline=None, max_examples=50, derandomize=True)


class Shade(Value):
    """A base that is no value itself."""


@value
class Plain(Shade):
    pass


@value
class Ratio(Shade):
    part: int
    whole: int

    def __post_init__(self) -> None:
        if self.part > self.whole:
            raise ValueError(f"the part must be at most {self.whole}, got {self.part}")

    def __str__(self) -> str:
        return f"{self.part}/{self.whole}"


def parse_shade(x: object) -> Shade:
    if isinstance(x, Shade):
        return x
    if x == "plain":
        return Plain()
    raise ValueError(f"unknown shade {x!r}; use 'plain'")


@value
class Paint(Value):
    sparsity: Share
    shade: Annotated[Any, BeforeValidator(parse_shade)] = "plain"
    every: int | float = 100
    mode: Literal["wet", "dry"] = "wet"
    layers: tuple[int, ...] = ()
    by_name: dict[str, Share] = dataclasses.field(default_factory=dict[str, float])
    floor: Annotated[float, Field(ge=0.0)] | None = None
    nesterov: bool = False


@value
class Fresco(Paint):
    sparsity: Share = 0.8
    every: int | float = 0.5
    name: str = "wall"


def message(**fields: Any) -> str:
    with pytest.raises(ValueError, match=r"^Paint") as error:
        Paint(**fields)
    assert type(error.value) is ValueError
    assert error.value.__cause__ is None
    assert error.value.__context__ is None
    return str(error.value)


def test_defaults_may_be_shorthand():
    assert Paint(0.5).shade == Plain()


def test_a_subclass_inherits_fields_and_changes_defaults():
    fresco = Fresco()
    assert (fresco.sparsity, fresco.every, fresco.shade, fresco.name) == (0.8, 0.5, Plain(), "wall")
    assert [f.name for f in dataclasses.fields(Fresco)][:2] == ["sparsity", "shade"]  # pyright: ignore[reportArgumentType]
    assert isinstance(fresco, Paint)
    assert fresco != Paint(0.8, every=0.5)
    with pytest.raises(ValueError, match=r"^Fresco\(sparsity=1.5\): sparsity must be in \[0, 1\), got 1.5$"):
        Fresco(1.5)


def test_a_default_may_change_without_its_annotation():
    @value
    class Sketch(Fresco):
        name = "paper"
        sparsity = 2.0  # checked as the inherited Share that it is

    with pytest.raises(ValueError, match=r"Sketch\(\): sparsity must be in \[0, 1\), got 2.0"):
        Sketch()
    assert Sketch(0.5) == from_dict({"kind": "Sketch", "sparsity": 0.5, "name": "paper"})


def test_str_shows_what_is_not_default():
    assert str(Paint(0.9)) == "Paint(sparsity=0.9)"
    assert str(Paint(0.9, shade=Ratio(1, 2), mode="dry")) == "Paint(sparsity=0.9, shade=1/2, mode='dry')"
    assert str(Fresco()) == "Fresco()"
    assert "shade=Ratio(part=1, whole=2)" in repr(Paint(0.9, shade=Ratio(1, 2)))


def test_values_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Paint(0.5).sparsity = 0.6  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"sparsity": 1.5}, "Paint(sparsity=1.5): sparsity must be in [0, 1), got 1.5"),
        ({"sparsity": float("nan")}, "Paint(sparsity=nan): sparsity must be finite, got nan"),
        ({"sparsity": True}, "Paint(sparsity=True): sparsity must be a number, got True"),
        ({"sparsity": "0.5"}, "Paint(sparsity='0.5'): sparsity must be a number, got '0.5'"),
        ({}, "Paint(): sparsity is missing"),
        ({"sparsity": 0.5, "evry": 3}, "Paint(sparsity=0.5, evry=3): there is no field 'evry'; did you mean 'every'?"),
        ({"sparsity": 0.5, "every": True}, "every must be an integer or a number, got True"),
        ({"sparsity": 0.5, "mode": "oil"}, "mode must be 'wet' or 'dry', got 'oil'"),
        ({"sparsity": 0.5, "layers": (1, "a")}, "layers[1] must be an integer, got 'a'"),
        ({"sparsity": 0.5, "by_name": {"fc1": 2.0}}, "by_name['fc1'] must be in [0, 1), got 2.0"),
        ({"sparsity": 0.5, "floor": -1}, "floor must be at least 0.0, got -1"),
        ({"sparsity": 0.5, "shade": "pale"}, "shade: unknown shade 'pale'; use 'plain'"),
        ({"sparsity": 0.5, "nesterov": 1}, "nesterov must be True or False, got 1"),
    ],
)
def test_an_error_says_what_was_asked_seen_and_works(fields: dict[str, Any], problem: str):
    assert message(**fields).endswith(problem)


def test_an_error_has_one_line_for_each_problem():
    assert message(sparsity=2.0, mode="oil").splitlines() == [
        "Paint(sparsity=2.0, mode='oil'): sparsity must be in [0, 1), got 2.0",
        "mode must be 'wet' or 'dry', got 'oil'",
    ]


def test_errors_name_positional_arguments_and_cross_checks():
    with pytest.raises(ValueError, match=r"^Ratio\(part=3, whole=2\): the part must be at most 2, got 3$"):
        Ratio(3, 2)
    with pytest.raises(ValueError, match=r"^Ratio\(part=True, whole=2\): part must be an integer, got True$"):
        Ratio(True, 2)
    with pytest.raises(ValueError, match=r"takes 2 arguments \(part, whole\)"):
        Ratio(1, 2, 3)  # pyright: ignore[reportCallIssue]


def test_a_long_argument_does_not_drown_its_error():
    assert len(message(sparsity=0.5, mode="x" * 10_000)) < 300


shades = st.just(Plain()) | st.builds(Ratio, st.integers(0, 3), st.integers(3, 9))
paints = st.builds(
    Fresco,
    sparsity=st.floats(0, 1, exclude_max=True),
    shade=shades,
    every=st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    mode=st.sampled_from(["wet", "dry"]),
    layers=st.lists(st.integers()).map(tuple),
    by_name=st.dictionaries(st.text(), st.floats(0, 0.5)),
    floor=st.none() | st.floats(0, 1e300),
    nesterov=st.booleans(),
    name=st.text(),
)


@SETTINGS
@given(paints)
def test_json_and_copies_are_exact(paint: Fresco):
    again = from_dict(json.loads(json.dumps(paint.to_dict())))
    copies = [again, copy.copy(paint), copy.deepcopy(paint), pickle.loads(pickle.dumps(paint))]  # noqa: S301
    copies.append(dataclasses.replace(paint))  # pyright: ignore[reportArgumentType]
    for other in copies:
        assert type(other) is Fresco
        assert (other, hash(other), repr(other)) == (paint, hash(paint), repr(paint))


def test_an_int_and_a_float_stay_apart_in_json():
    for every in (1, 1.0):
        again = from_dict(json.loads(json.dumps(Paint(0, every=every).to_dict())))
        assert isinstance(again, Paint)
        assert type(again.every) is type(every)


def test_hash_follows_equality():
    assert hash(Paint(0.5, every=1)) == hash(Paint(0.5, every=1.0))
    assert hash(Paint(0.5, by_name={"a": 0.1, "b": 0.2})) == hash(Paint(0.5, by_name={"b": 0.2, "a": 0.1}))
    assert len({Paint(0.5), Paint(0.5, shade="plain"), Paint(0.6)}) == 2


@pytest.mark.parametrize(
    ("d", "problem"),
    [
        ({"kind": "Pant"}, "from_dict: unknown kind 'Pant'; did you mean 'Paint'"),
        ({"knd": "Paint"}, "a value needs a 'kind', the name of its class"),
        ({"kind": "Paint", "sparsity": 0.5, "sort": 1}, "there is no field 'sort'"),
        ({"kind": "Paint", "sparsity": 0.5, "shade": {"kind": "Ratio", "part": 2, "whole": 1}}, "at most 1, got 2"),
    ],
)
def test_from_dict_refuses_foreign_input(d: dict[str, Any], problem: str):
    with pytest.raises(ValueError, match=re.escape(problem)):
        from_dict(d)


@value
class Loose(Value):
    held: Any


@pytest.mark.parametrize("held", [len, float("inf"), {"kind": "Paint"}, {1: 2}, (1, print)])
def test_to_dict_refuses_what_json_cannot_hold(held: object):
    with pytest.raises(ValueError, match="held"):
        Loose(held).to_dict()


def test_the_registry_knows_subclasses_in_order_and_refuses_a_second_class_of_a_name():
    assert registered(Shade) == (Plain, Ratio)
    other = type("Plain", (Value,), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match="already has a value of the name 'Plain'"):
        value(other)
    assert registered(Shade) == (Plain, Ratio)
