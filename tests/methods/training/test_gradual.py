import pytest

import rarefy
from rarefy import AtLeast, Cubic, OneShot, PerLayer
from rarefy.methods.training.gradual import _on_the_way, share_at


def test_the_share_is_that_of_the_schedule():
    assert share_at(Cubic(start=0, end=100), 0.9, 50, 200) == pytest.approx(0.7875)
    assert share_at(Cubic(start=0, end=100), 0.9, 100, 200) == 0.9


def test_n_m_begins_where_the_share_leaves_zero():
    cubic = Cubic(start=10, end=20, every=5)
    assert [share_at(cubic, None, t, 100) > 0 for t in (0, 10, 15, 20)] == [False, False, True, True]
    assert [share_at(OneShot(at=0.5), None, t, 10) > 0 for t in (4, 5)] == [False, True]


def test_a_run_of_unknown_length_has_only_begun():
    assert share_at(Cubic(start=0.25), 0.9, 0, None) == 0.0
    assert share_at(Cubic(initial=0.5), 0.9, 0, None) == 0.5
    assert share_at(rarefy.axes.AtInit(), 0.9, 0, None) == 0.9


def test_sparsities_by_layer_grow_in_step():
    halfway = _on_the_way(PerLayer({"a": 0.8, "b": 0.2}), 0.3, 0.6)
    assert halfway == PerLayer({"a": 0.4, "b": 0.1})
    assert _on_the_way(AtLeast(PerLayer({"a": 0.8})), 0.3, 0.6) == AtLeast(PerLayer({"a": 0.4}))
    assert _on_the_way(PerLayer({"a": 0.8}), 0.6, 0.6) == PerLayer({"a": 0.8})
    assert _on_the_way(rarefy.Global(), 0.3, 0.6) == rarefy.Global()
    assert _on_the_way(PerLayer({"a": 0.8}), 0.3, None) == PerLayer({"a": 0.8})
