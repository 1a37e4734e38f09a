import collections
import dataclasses
from typing import Any

import pytest
import torch

from rarefy.core.capture.tree import Mark, at, leaves, replaced, tensors

Pair = collections.namedtuple("Pair", "a b")


@dataclasses.dataclass
class Output:
    hidden: Any
    other: Any = None


@dataclasses.dataclass(frozen=True)
class Told(Mark):
    number: int


X, Y = torch.zeros(1), torch.ones(1)


@pytest.mark.parametrize(
    ("value", "paths"),
    [
        (X, [()]),
        ((X, None, [Y]), [(0,), (2, 0)]),
        ({"a": X, "b": (Y,)}, [("a",), ("b", 0)]),
        (Pair(X, Y), [(0,), (1,)]),
        (Output(X, Output(Y)), [("hidden",), ("other", "hidden")]),
        (collections.OrderedDict(a=X), [("a",)]),
        ((), []),
    ],
)
def test_tensors_have_paths(value: Any, paths: list[Any]):
    assert [path for path, _ in tensors(value)] == paths
    assert all(at(value, path) is leaf for path, leaf in tensors(value))
    copied = replaced(value, lambda leaf: leaf + 1 if isinstance(leaf, torch.Tensor) else leaf)
    assert type(copied) is type(value)
    assert [path for path, _ in tensors(copied)] == paths
    assert all(torch.equal(at(copied, p), at(value, p) + 1) for p in paths)


def test_marks_are_leaves():
    assert list(leaves([Told(3)])) == [((0,), Told(3))]
    assert replaced(Output(1), lambda leaf: Told(2)) == Output(Told(2), Told(2))
