"""Sentences that every machine has: docstrings and comments of the standard library and of packages installed here.

Files are read, never imported. Whole modules (`torch.nn.modules`, `email`) are held out, chosen by a hash of their
names, so that no sentence of theirs is trained on; a sentence that stands in both parts belongs to training alone. The
text depends on the versions of Python and of the packages; a digest tells which text it was.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import torch

from rarefy.bench.files import write_whole
from rarefy.bench.seeds import generator

__all__ = ["PACKAGES", "Sentences", "clean", "held_out", "installed", "read", "sentences_of"]

PACKAGES = ("torch", "scipy", "sklearn", "numpy", "transformers", "sympy", "networkx")
"""Packages read besides the standard library: those that the project installs, and those that come with torch."""

_SKIPPED = {"__pycache__", "site-packages", "dist-packages", "lib2to3", "pydoc_data", "test", "tests", "idlelib"}
_SHARE = 0.1  # of modules held out
_SPLIT = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_MARKUP = (
    (re.compile(r":[a-z:]+:`[~!]?([^`<]+?)\s*(?:<[^`]*>)?`"), r"\1"),  # :class:`~x.y`
    (re.compile(r"`+([^`]*?)`+_*"), r"\1"),
    (re.compile(r"\[([^]]*)]\(([^)]*)\)"), r"\1"),
    (re.compile(r"\[\d+]_?|\*+"), ""),
    (re.compile(r"\s+"), " "),
)
_NOT_PROSE = re.compile(r"https?:|>>>|\.\. |::|={2,}|-{3,}|[{}|<>=\\$@#]|\blicen[sc]e", re.IGNORECASE)
_NAME = re.compile(r"\S*(?:[_\d./()]|[a-z][A-Z])\S+|\S*\d\S*|\b[A-Z]+\b")


@dataclass(frozen=True)
class Sentences:
    """train: what may be learned from. corpus, queries: held out; retrieved are sentences of `corpus` for `queries`."""

    train: tuple[str, ...]
    corpus: tuple[str, ...]
    queries: tuple[str, ...]

    def save(self, path: Path) -> None:
        """Write all of it, as JSON."""
        write_whole(path, json.dumps(asdict(self), ensure_ascii=False, indent=0).encode())

    @classmethod
    def load(cls, path: Path) -> Sentences:
        """What `save` wrote."""
        return cls(**{part: tuple(texts) for part, texts in json.loads(path.read_bytes()).items()})

    def digest(self) -> str:
        """sha256 of all three."""
        whole = hashlib.sha256()
        for part in (self.train, self.corpus, self.queries):
            whole.update(("\n".join(part) + "\0").encode())
        return whole.hexdigest()


def installed() -> dict[str, Path]:
    """Folders of sources by name: the standard library under "" and the packages that are there."""
    found = {"": Path(sysconfig.get_path("stdlib"))}
    for name in PACKAGES:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            found[name] = Path(next(iter(spec.submodule_search_locations)))
    return found


def read(folders: Mapping[str, Path] | None = None, corpus: int = 5000, queries: int = 500, seed: int = 0) -> Sentences:
    """All sentences of the folders' sources, in an order drawn from the seed; `corpus` and `queries` are held out.

    Raises ValueError where there are too few to hold out, or none to train on.
    """
    parts: dict[bool, dict[str, str]] = {False: {}, True: {}}
    for module, path in _sources(installed() if folders is None else folders):
        part = parts[held_out(module)]
        for sentence in sentences_of(path.read_bytes().decode(errors="replace")):
            part.setdefault(_key(sentence), sentence)
    train = list(parts[False].values())
    judged = [sentence for key, sentence in parts[True].items() if key not in parts[False]]
    if len(judged) < corpus + queries or not train:
        raise ValueError(
            f"the sources here hold {len(judged)} held-out sentences and {len(train)} to train on; {corpus} + "
            f"{queries} held-out ones are asked for: install {', '.join(PACKAGES)} with their .py files"
        )
    train, judged = _shuffled(train, seed), _shuffled(judged, seed)
    return Sentences(tuple(train), tuple(judged[:corpus]), tuple(judged[corpus : corpus + queries]))


def held_out(module: str) -> bool:
    """Whether a module, such as "torch.nn.modules" or "email", is judged on; the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"sentences {module}".encode()).digest()[:4]) < _SHARE * 2**32


def sentences_of(source: str) -> Iterator[str]:
    """Clean sentences of a source file's docstrings and comments; none where it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for paragraph in _paragraphs((ast.get_docstring(node) or "").split("\n")):
                yield from clean(paragraph)
    for comment in _comments(source.split("\n")):
        for paragraph in _paragraphs(comment):
            yield from clean(paragraph)


def clean(paragraph: str) -> Iterator[str]:
    """Its sentences without markup: 8 to 60 words, nearly all letters, from a capital to a full stop.

    >>> list(clean("Return the ``value`` of :class:`~a.Key`, or None where there is no such key. See also x."))
    ['Return the value of a.Key, or None where there is no such key.']
    """
    for pattern, instead in _MARKUP:
        paragraph = pattern.sub(instead, paragraph)
    for sentence in _SPLIT.split(paragraph.strip()):
        words = sentence.count(" ") + 1
        if 8 <= words <= 60 and sentence[0].isupper() and sentence[-1] in ".!?" and not _NOT_PROSE.search(sentence):
            letters = sum(c.isalpha() or c == " " for c in sentence)
            if letters >= 0.88 * len(sentence) and sentence.isprintable() and len(sentence) < 12 * words:
                yield sentence


def _key(sentence: str) -> str:
    """What makes two sentences the same: words without case, and without names and numbers that fill a template."""
    return re.sub(r"[^a-z]+", " ", _NAME.sub("", sentence).lower())


def _paragraphs(lines: Sequence[str]) -> Iterator[str]:
    """Lines of one indentation that follow one another, joined; fields such as `:param x: …` are left out."""
    lines = ["" if line.lstrip().startswith((":", "@")) else line for line in lines]
    for indent, group in groupby(lines, key=lambda line: len(line) - len(line.lstrip()) if line.strip() else -1):
        if indent >= 0:
            yield " ".join(line.strip() for line in group).removeprefix("- ")


def _comments(lines: Iterable[str]) -> Iterator[list[str]]:
    """Texts of comments that have lines of their own."""
    for is_comment, group in groupby(lines, key=lambda line: line.lstrip().startswith("# ")):
        if is_comment:
            yield [line.lstrip()[2:] for line in group]


def _sources(folders: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    """Modules (the package and two parts below it; of the standard library one) and files, in one order everywhere."""
    for name, folder in folders.items():
        for path in sorted(folder.rglob("*.py"), key=lambda p: p.relative_to(folder).as_posix()):
            parts = path.relative_to(folder).with_suffix("").parts
            if not _SKIPPED.intersection(parts):
                yield ".".join((name, *parts[:2]) if name else parts[:1]), path


def _shuffled(items: list[str], seed: int) -> list[str]:
    order = torch.randperm(len(items), generator=generator("sentences", seed))
    return [items[i] for i in order.tolist()]
