"""A folder that appears whole or not at all, and what is copied into it beside the weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

JOURNAL: Final = "journal"

_WEIGHTS: Final = frozenset({
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml", ".ot",
    ".tflite", ".mlmodel", ".npz", ".npy", ".pkl", ".pickle", ".nemo",
})  # fmt: skip
_SKIPPED: Final = frozenset({".git", ".cache", "__pycache__"})
_OWN: Final = "rarefy.json"


def partial_of(out: Path) -> Path:
    """Where OUT is made: a folder beside it. It holds the journal of a long run, too."""
    out = Path(os.path.abspath(out))
    return out.with_name(f".{out.name}.partial")


def refuse_taken(out: Path, source: Path | None = None) -> None:
    """Raises FileExistsError where OUT is there and not empty, ValueError where it lies in the source's folder."""
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} exists and is not empty: nothing is written over. Name a new directory.")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} exists and is a file. Name a new directory.")
    if not Path(os.path.abspath(out)).parent.is_dir():
        raise FileNotFoundError(f"{out}: the folder that it would be in does not exist. Make it first.")
    if source is not None and Path(os.path.realpath(source)) in Path(os.path.realpath(out)).parents:
        raise ValueError(f"{out} lies in {source}, whose files are copied: name a directory outside of it")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder to write to, which becomes OUT at the end. Whatever fails leaves no OUT, and of the partial folder
    only a journal, if there is one. Raises FileExistsError as `refuse_taken` does.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with staged(Path(folder) / "out") as files:
    ...         _ = (files / "a").write_text("b")
    ...         before = (Path(folder) / "out").exists()
    ...     before, [path.name for path in Path(folder).iterdir()]
    (False, ['out'])
    """
    refuse_taken(out)
    partial = partial_of(out)
    files = partial / "model"
    if files.exists():
        shutil.rmtree(files)
    files.mkdir(parents=True)
    try:
        yield files
        for folder, _, names in os.walk(files):
            for name in names:
                _sync(Path(folder) / name)
            _sync(Path(folder))
        if out.is_dir():
            out.rmdir()
        os.rename(files, out)
    except BaseException:
        shutil.rmtree(files, ignore_errors=True)
        with suppress(OSError):
            partial.rmdir()  # stays where it has a journal
        raise
    shutil.rmtree(partial, ignore_errors=True)
    _sync(partial.parent)


def _sync(path: Path) -> None:
    with suppress(OSError):  # folders cannot be synced everywhere
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def copy_others(source: Path, target: Path, skip: frozenset[str] = frozenset()) -> tuple[list[str], list[str]]:
    """Copy all files but weights, byte for byte; returns the names that were copied and those that were left out.

    Weights in any format are left out, since they would be those of the model as it was: safetensors that the index
    does not name, *.bin, *.gguf, *.onnx and their like. skip: names that are written by somebody else.
    """
    copied: list[str] = []
    left_out: list[str] = []
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(set(folders) - _SKIPPED)
        for name in sorted(names):
            path = Path(folder) / name
            relative = path.relative_to(source)
            if str(relative) in skip or str(relative) == _OWN:
                continue
            if _is_weights(name):
                left_out.append(relative.as_posix())
                continue
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)
            copied.append(relative.as_posix())
    return copied, left_out


def _is_weights(name: str) -> bool:
    return Path(name.lower().removesuffix(".index.json")).suffix in _WEIGHTS
