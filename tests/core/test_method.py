import pytest

import rarefy
from rarefy.axes import value
from rarefy.core.method import Driver, Method, all_methods, method_from_dict, register


@value
class Idle(Method):
    """Does nothing; in no list."""

    size: int = 3


def test_the_contract_by_default():
    assert Idle.needs == frozenset()
    assert Idle.stage == "one shot"
    assert not Idle.dense_backward
    assert not Idle().wants_dense_gradient(0, None)
    for hook in (Idle().on_gradients, Idle().on_weights, Idle().end):
        assert hook(None) is None
    with pytest.raises(NotImplementedError, match="Idle has no begin"):
        Idle().begin(None)


def test_a_name_is_registered_once():
    assert register(rarefy.RigL) is rarefy.RigL  # again is no offence
    with pytest.raises(ValueError, match="a method named 'RigL' is registered already"):
        register(type("RigL", (Method,), {}))
    assert all_methods()["RigL"] is rarefy.RigL
    assert "Idle" not in all_methods()


def test_the_list_is_a_copy():
    all_methods().clear()
    assert all_methods()


def test_from_a_dictionary():
    assert method_from_dict({"kind": "Idle", "size": 5}) == Idle(5)
    assert isinstance(method_from_dict(rarefy.IMP(0.5).to_dict()), Driver)
    with pytest.raises(ValueError, match="expected a method, got Global"):
        method_from_dict(rarefy.Global().to_dict())
    with pytest.raises(ValueError, match="unknown kind 'RigLL'; did you mean 'RigL'"):
        method_from_dict({"kind": "RigLL"})


def test_values_are_frozen():
    method = rarefy.RigL(0.9)
    with pytest.raises(AttributeError):
        method.sparsity = 0.5
    assert {method: 1}[rarefy.RigL(0.9)] == 1
