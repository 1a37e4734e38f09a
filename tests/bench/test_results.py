import json
import os
from pathlib import Path

import pytest

from bench.made import result
from rarefy.bench.files import write_whole
from rarefy.bench.results import Result, key_of, load_results


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "a.json"
    result().write(path)
    return path


def test_a_result_survives_its_file(written):
    assert Result.read(written) == result()
    assert load_results(written.parent) == ([result()], [])
    assert set(json.loads(written.read_text())) == {"format", "key", "run", "method", "train", "environment"}


def test_no_truncation_is_read_as_a_result(written):
    whole = written.read_bytes()
    end = len(whole.rstrip())
    for size in [*range(0, end, 97), end - 1]:
        written.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is not a whole result file"):
            Result.read(written)


@pytest.mark.parametrize(
    ("section", "name", "x"),
    [
        ("train", "labels", []),
        ("train", "labels", None),
        ("train", "sites", ""),
        ("train", "nonzeros", 0),
        ("train", "nonzeros", "10"),
        ("train", "accuracy", float("nan")),
        ("train", "accuracy", 101.0),
        ("train", "surprise", 1),
        ("run", "seed", None),
        ("run", "control", "other"),
        ("run", "sparsity", 1.5),
        ("environment", "threads", "two"),
    ],
)
def test_a_file_that_is_not_exactly_a_result_is_refused(written, section, name, x):
    content = json.loads(written.read_text())
    content[section][name] = x
    written.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"a\.json is not a whole result file"):
        Result.read(written)


@pytest.mark.parametrize("name", ["labels", "sites", "nonzeros", "flops"])
def test_a_file_without_what_a_comparison_stands_on_is_refused(written, name):
    content = json.loads(written.read_text())
    del content["train"][name]
    written.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"train.{name}: Field required"):
        Result.read(written)


def test_an_edited_file_is_refused(written):
    edited = json.loads(written.read_text())
    edited["run"]["seed"] = 7
    written.write_text(json.dumps(edited))
    with pytest.raises(ValueError, match="its key does not follow from its content"):
        Result.read(written)


def test_counts_that_contradict_each_other_are_refused(written):
    edited = json.loads(written.read_text())
    edited["train"]["kept"]["fc"] += 1
    written.write_text(json.dumps(edited))
    with pytest.raises(ValueError, match="10 non-zeros are not the sum of kept"):
        Result.read(written)


def test_foreign_files_are_reported_and_left_alone(written):
    (written.parent / "other.json").write_text('{"hello": 1}')
    (written.parent / "list.json").write_text("[1, 2]")
    (written.parent / "binary.json").write_bytes(b"\xff\x00")
    found, problems = load_results(written.parent)
    assert found == [result()]
    assert len(problems) == 3
    assert (written.parent / "other.json").exists()


def test_no_folder_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="rarefy bench digits --out"):
        load_results(tmp_path / "none")


def test_the_key_changes_with_everything_that_decides_the_numbers():
    base = result()
    keys = {base.key}
    for change in ({"seed": 1}, {"sparsity": 0.5}, {"control": "extended"}, {"steps": 9}, {"data": "x"}, {"name": "y"}):
        keys.add(key_of(base.run.model_copy(update=change), base.method, base.environment))
    keys.add(key_of(base.run, {**base.method, "sparsity": 0.8}, base.environment))
    for change in ({"threads": 2}, {"torch": "9"}, {"code": "z"}, {"flush_denormal": False}, {"instructions": "none"}):
        keys.add(key_of(base.run, base.method, base.environment.model_copy(update=change)))
    assert len(keys) == 13


def test_the_key_does_not_change_with_what_decides_nothing():
    base = result()
    other = base.environment.model_copy(update={"cores": 99, "processor": "other", "python": "3.99"})
    assert key_of(base.run, base.method, other) == base.key


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_bytes() == b"old"


def test_files_can_be_read_by_others(written):
    umask = os.umask(0)
    os.umask(umask)
    assert written.stat().st_mode & 0o777 == 0o666 & ~umask
