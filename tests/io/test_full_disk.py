"""A disk that is full at any write: OUT is not there, nothing half-written is, and the same call goes on."""

import builtins
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rarefy
from language import save_llama, text_of
from rarefy.io.full import is_full
from rarefy.io.journal import Journal
from rarefy.io.prune import prune

pytest.importorskip("transformers")


class Disk:
    """Files under a folder that are opened for writing fail at write number `full`, of all of them, and ever after."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, full: int) -> None:
        self.folder, self.full, self.writes, self._open = str(folder), full, 0, builtins.open
        patch.setattr(builtins, "open", self.open)
        patch.setattr(io, "open", self.open)

    def open(self, path: Any, mode: str = "r", *args: Any, **named: Any) -> Any:
        file = self._open(path, mode, *args, **named)
        if set(mode) & set("wxa+") and str(path).startswith(self.folder):
            return _File(file, self)
        return file


class _File:
    def __init__(self, file: Any, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def write(self, data: Any) -> Any:
        self.disk.writes += 1
        if self.disk.writes > self.disk.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text_of(200))
    return path


def run(llama: Path, text: Path, out: Path, *, packed: bool = False) -> list[str]:
    """Names of the blocks that were worked on."""
    told: list[str] = []
    method = rarefy.SparseGPT(0.75)
    prune(
        llama,
        out,
        method,
        calibration=text,
        samples=2,
        packed=packed,
        progress=lambda done, of, name: told.append(name),
    )
    return [name for name in told if name]


def files(folder: Path) -> dict[str, bytes]:
    """But the record, which holds the time."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "rarefy.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@pytest.fixture(scope="module")
def whole(llama, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(folder, patch, 10**9)
        run(llama, text, folder / "out")
        run(llama, text, folder / "packed", packed=True)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(folder, patch, 10**9)
        run(llama, text, folder / "again")
    return {"dense": files(folder / "out"), "packed": files(folder / "packed"), "writes": disk.writes}


def kept_blocks(folder: Path) -> list[str]:
    """What is in the folder beside nothing at all: a journal of whole blocks."""
    there = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    if not there:
        assert not list(folder.iterdir())
        return []
    assert "out" not in os.listdir(folder)
    journal = folder / ".out.partial/journal"
    assert all((folder / name).parent == journal for name in there), there
    assert not [name for name in there if name.endswith(".partial")]
    return Journal(journal, json.loads((journal / "settings.json").read_text())).done()


def test_at_any_write(llama, text, tmp_path, whole):
    places = sorted({0, 1, 2, *range(3, whole["writes"], 11), whole["writes"] - 1})
    kept: set[int] = set()
    for full in places:
        folder = tmp_path / str(full)
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            Disk(folder, patch, full)
            with pytest.raises(OSError, match=r"the disk is full .*No space left.*run the same again") as raised:
                run(llama, text, folder / "out")
        assert raised.value.errno == errno.ENOSPC
        blocks = kept_blocks(folder)
        kept.add(len(blocks))
        assert (f"after the {len(blocks)} finished blocks" in str(raised.value)) == bool(blocks)
        assert run(llama, text, folder / "out") == ["model.layers.0", "model.layers.1"][len(blocks) :]
        assert os.listdir(folder) == ["out"]
        assert files(folder / "out") == whole["dense"]
    assert kept == {0, 1, 2}


def test_while_a_packed_directory_is_written(llama, text, tmp_path, whole):
    with pytest.MonkeyPatch.context() as patch:
        Disk(tmp_path, patch, whole["writes"] + 1)
        with pytest.raises(OSError, match="after the 2 finished blocks"):
            run(llama, text, tmp_path / "out", packed=True)
    assert len(kept_blocks(tmp_path)) == 2
    run(llama, text, tmp_path / "out", packed=True)
    assert os.listdir(tmp_path) == ["out"]
    assert files(tmp_path / "out") == whole["packed"]


def test_a_journal_that_cannot_begin_leaves_nothing(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        Disk(tmp_path, patch, 0)
        with pytest.raises(OSError, match="No space left"):
            Journal.of(tmp_path / "out", {"seed": 0})
    assert not list(tmp_path.iterdir())


LIMITED = """
import resource, sys
import rarefy
from pathlib import Path
from rarefy.io.prune import prune
model, text, out, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
try:
    prune(model, out, rarefy.SparseGPT(0.75), calibration=text, samples=2)
except OSError as error:
    print(error)
    raise SystemExit(3)
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [64, 2_000, 12_000])
def test_files_that_the_system_cuts_short(llama, text, tmp_path, limit, whole):
    """settings.json, the first block, and model.safetensors do not fit."""

    def limited(most: int) -> "subprocess.CompletedProcess[str]":
        given = [sys.executable, "-c", LIMITED, str(llama), str(text), str(tmp_path / "out"), str(most)]
        where = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(given, capture_output=True, text=True, env=where, check=False)

    sizes = [len(data) for name, data in whole["dense"].items() if name == "model.safetensors"]
    assert sizes[0] > 12_000
    found = limited(limit)
    assert found.returncode == 3, found.stderr
    assert "the disk is full" in found.stdout
    assert "File too large" in found.stdout
    kept_blocks(tmp_path)
    assert limited(0).returncode == 0
    assert os.listdir(tmp_path) == ["out"]
    assert files(tmp_path / "out") == whole["dense"]


def test_other_errors_are_not_taken_for_it():
    assert not is_full(PermissionError(errno.EACCES, "Permission denied"))
    assert not is_full(ValueError("the disk"))
    error = RuntimeError("block 'a': it failed")
    error.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert is_full(error)
