import json

import pytest
import torch

from rarefy.runtime import cache, measure, pack
from rarefy.runtime.cache import Cache
from runtime.nets import Clock, have_kernels, mlp, ratio, thin
from runtime.test_layers import inputs


def test_what_is_kept_is_found_by_another(tmp_path):
    first = Cache(tmp_path)
    first.keep("a", {"torch": 1.0, "bitmap few": 0.5})
    first.save()
    other = Cache(tmp_path)
    assert other.find("a") == {"torch": 1.0, "bitmap few": 0.5}
    assert other.find("b") == {}
    other.find("a")["torch"] = 9.0
    assert other.find("a")["torch"] == 1.0


def test_two_processes_add_to_one_file(tmp_path):
    one, two = Cache(tmp_path), Cache(tmp_path)
    one.keep("a", {"torch": 1.0})
    two.keep("b", {"torch": 2.0})
    one.save()
    two.save()
    assert Cache(tmp_path).find("a") == {"torch": 1.0}
    assert Cache(tmp_path).find("b") == {"torch": 2.0}
    assert [p.suffix for p in tmp_path.iterdir()] == [".json"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 99}',
        '{"format": 1, "environment": {}, "seconds": {"a": {"torch": 1.0}}}',
        b"\xff\xfe",
    ],
    ids=range(6),
)
def test_a_damaged_file_counts_as_none_and_is_written_anew(tmp_path, content):
    path = Cache(tmp_path).path
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    made = Cache(tmp_path)
    assert made.find("a") == {}
    made.keep("a", {"torch": 1.0})
    made.save()
    assert Cache(tmp_path).find("a") == {"torch": 1.0}


def test_times_that_cannot_be_are_left_out(tmp_path):
    made = Cache(tmp_path)
    problems = {"a": {"torch": 1.0}, "b": {"torch": -1.0}, "c": {"torch": "fast"}, "d": 3}
    content = {"format": 1, "environment": cache.environment(), "seconds": problems}
    made.path.write_text(json.dumps(content))
    assert [bool(Cache(tmp_path).find(key)) for key in "abcd"] == [True, False, False, False]


def test_the_file_belongs_to_a_machine_and_a_build(tmp_path, monkeypatch):
    before = Cache(tmp_path).path
    assert {"processor", "cores", "isa", "kernels", "torch"} == cache.environment().keys()
    other = {**cache.environment(), "kernels": "another build"}
    monkeypatch.setattr(cache, "environment", lambda: other)
    assert Cache(tmp_path).path != before


def test_where_it_is(tmp_path, monkeypatch):
    monkeypatch.delenv("RAREFY_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "rarefy"
    monkeypatch.setenv("RAREFY_CACHE", "0")
    assert cache.folder() is None
    off = cache.opened()
    off.keep("a", {"torch": 1.0})
    off.save()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    made = Cache(tmp_path / "file" / "below")
    made.keep("a", {"torch": 1.0})
    made.save()
    assert made.find("a") == {"torch": 1.0}


@pytest.mark.filterwarnings("ignore:this process has loaded")
@pytest.mark.skipif(not have_kernels(), reason="there is nothing to choose from without compiled kernels")
def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("RAREFY_CACHE", raising=False)
    clock = Clock(lambda name: 1e-6 if name.startswith("bitmap") else 9e-6)
    monkeypatch.setattr(measure, "times", clock.times)
    monkeypatch.setattr(measure, "ratios", ratio(2.0))
    reports = [pack(thin(mlp(64, 48, 10)), example=inputs(1, 64)) for _ in range(2)]
    assert len(clock.asked) == 2  # one for each layer, once
    assert reports[0].rows == reports[1].rows
    pack(thin(mlp(64, 48, 10)), example=inputs(2, 64))
    pack(thin(mlp(64, 48, 10)), example=inputs(1, 64), threads=2)
    pack(thin(mlp(64, 48, 10)), example=inputs(1, 64), dtype="bfloat16")
    assert len(clock.asked) == 8
    assert torch.get_num_threads() == 1
