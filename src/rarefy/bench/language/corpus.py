"""Text that every machine has: the Python standard library's own source, about 30 MB.

Packages held out are judged on and never trained on; neither are their tests. Calibration texts come from the training
part. The text depends on the version of Python, which results name.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["HELD_OUT", "Corpus", "standard_library"]

HELD_OUT = ("asyncio", "email", "http", "json", "sqlite3", "tomllib", "xml", "zoneinfo")
"""Packages whose source and tests no model sees in training."""

_SKIPPED = {"__pycache__", "site-packages", "dist-packages", "lib2to3", "pydoc_data"}  # data, or not the library's own


@dataclass(frozen=True)
class Corpus:
    """Files to train on and files to judge on, in one order on every machine with this version of Python."""

    train: tuple[Path, ...]
    judged: tuple[Path, ...]

    def text(self, part: str) -> str:
        """All files of "train" or "judged", one after another, a line with the module's name before each."""
        files = self.train if part == "train" else self.judged
        return "".join(f"# {path.stem}\n{_read(path)}\n" for path in files)

    def digest(self) -> str:
        """sha256 of both parts: which text it was."""
        whole = hashlib.sha256()
        for part in ("train", "judged"):
            whole.update(self.text(part).encode())
        return whole.hexdigest()


def standard_library(folder: Path | None = None) -> Corpus:
    """The corpus of this Python, or of the library in `folder`. Raises FileNotFoundError where there is no source."""
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    train: list[Path] = []
    judged: list[Path] = []
    for path in _sources(root):
        (judged if _is_held_out(path.relative_to(root)) else train).append(path)
    if not train or not judged:
        raise FileNotFoundError(f"{root} holds no source of the standard library: install Python with its .py files")
    return Corpus(tuple(train), tuple(judged))


def _sources(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if not _SKIPPED.intersection(path.relative_to(root).parts):
            yield path


def _is_held_out(path: Path) -> bool:
    """asyncio/…, test/test_asyncio/…, test/test_json.py."""
    names = [part.removesuffix(".py").removeprefix("test_") for part in path.parts]
    return any(name in HELD_OUT for name in names)


def _read(path: Path) -> str:
    return path.read_bytes().decode(errors="replace").replace("\r\n", "\n")
