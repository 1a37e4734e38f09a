"""The finder that waits for transformers."""

import importlib
import sys
from pathlib import Path

import pytest

from rarefy.io import register as module_of_register  # noqa: F401  the function; its module is imported by name
from rarefy.io.register import register

waiting = sys.modules["rarefy.io.register"]


@pytest.fixture
def finders(monkeypatch: pytest.MonkeyPatch) -> list:
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if type(f).__name__ != "_Waiting"])
    return sys.meta_path


def test_it_waits_once_and_goes(finders: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    told: list[bool] = []
    (tmp_path / "awaited_module.py").write_text("x = 1")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(waiting, "_AWAITED", "awaited_module")
    monkeypatch.setattr(waiting, "_tell", lambda: told.append(sys.modules["awaited_module"].x == 1))
    before = len(finders)
    register()
    register()
    assert len(finders) == before + 1
    assert importlib.util.find_spec("json") is not None
    assert len(finders) == before + 1
    awaited = importlib.import_module("awaited_module")
    assert told == [True]
    assert len(finders) == before
    assert type(awaited.__loader__).__name__ == "SourceFileLoader"
    register()  # it is there: told at once
    assert told == [True, True]
    del sys.modules["awaited_module"]


def test_a_module_that_is_not_there_stays_so(finders: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(waiting, "_AWAITED", "module_that_is_not_there")
    register()
    with pytest.raises(ModuleNotFoundError, match="module_that_is_not_there"):
        importlib.import_module("module_that_is_not_there")


def test_an_old_transformers_works_on_and_is_warned_of(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rarefy.io.transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.quantizers.auto", sys)
    with pytest.warns(UserWarning, match="packed directories cannot be loaded with this transformers"):
        register()
