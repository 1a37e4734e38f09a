import pytest

import rarefy
from rarefy.axes import PerLayer, value
from rarefy.cli.recipe import make_recipe, per_layer, usable_names
from rarefy.core import Method, all_methods
from rarefy.core.method import _METHODS


@pytest.fixture
def smooth(monkeypatch):
    """A stage that goes on from another method's mask."""

    @value
    class Smooth(Method):
        method: object

        needs = frozenset({"data"})

    monkeypatch.setitem(_METHODS, "Smooth", Smooth)
    return Smooth


def recipe(text, **changed):
    given = {"sparsity": 0.5, "pattern": "unstructured", "allocation": None, "refit": False, **changed}
    return make_recipe(text, **given)


def test_a_name_is_a_method_with_what_was_asked():
    assert recipe("magnitude", allocation="uniform") == rarefy.Magnitude(0.5, allocation="uniform")
    assert recipe("Magnitude", sparsity=None, pattern="2:4") == rarefy.Magnitude(pattern="2:4")
    assert recipe("random", pattern="4x1").pattern == rarefy.Block(4, 1)


def test_stages_refine_from_left_to_right(smooth):
    inner = rarefy.Magnitude(0.5)
    assert recipe("magnitude+smooth") == smooth(inner)
    assert recipe("magnitude + smooth+ smooth") == smooth(smooth(inner))


@pytest.mark.skipif("Refit" not in all_methods(), reason="needs the method Refit")
def test_refit_comes_last(smooth):
    assert recipe("magnitude", refit=True) == all_methods()["Refit"](method=rarefy.Magnitude(0.5))


@pytest.mark.skipif("DSnoT" not in all_methods(), reason="needs the method DSnoT")
def test_a_stage_alone_goes_on_from_wanda():
    assert recipe("dsnot") == recipe("wanda+dsnot")
    assert recipe("dsnot").method == all_methods()["Wanda"](sparsity=0.5)


def test_only_stages_refine(smooth):
    with pytest.raises(ValueError, match="random chooses a mask of its own"):
        recipe("magnitude+random")


@pytest.mark.parametrize(
    ("text", "changed", "words"),
    [
        ("rigl", {}, "it needs optimizer, steps; a directory is pruned by"),
        ("snip", {}, "it needs loss"),
        ("imp", {}, "it needs train"),
        ("magnitud", {}, "did you mean magnitude"),
        ("magnitude", {"pattern": "4:2"}, "4:2|n:m"),
        ("magnitude", {"allocation": "unifrm"}, "did you mean 'uniform'"),
    ],
)
def test_what_cannot_be_is_refused(text, changed, words):
    with pytest.raises(ValueError, match=words):
        recipe(text, **changed)


def test_usable_methods_need_no_training():
    assert {"magnitude", "random"} <= set(usable_names())
    assert not {"rigl", "snip", "imp", "dense"} & set(usable_names())


def test_per_layer_is_json_or_a_file(tmp_path):
    expected = PerLayer({"*.mlp.*": 0.6})
    assert per_layer('{"*.mlp.*": 0.6}') == expected
    (tmp_path / "a.json").write_text('{"*.mlp.*": 0.6}')
    assert per_layer(str(tmp_path / "a.json")) == expected
    for text, words in (("absent.json", "no file that can be read"), ("{", "no JSON"), ('{"a": 2}', r"in \[0, 1\)")):
        with pytest.raises(ValueError, match=words):
            per_layer(text)
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match="an object of sparsities"):
        per_layer(str(tmp_path / "a.json"))
