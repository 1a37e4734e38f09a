"""What was measured, on disk, so that the same layer on the same machine is not measured again.

One JSON file for each machine and build in `$XDG_CACHE_HOME/rarefy` (or `~/.cache/rarefy`), replaced whole. A damaged
file counts as none. RAREFY_CACHE=0 switches it off; a folder that cannot be written to is no error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import secrets
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

from rarefy.core import native

Times = dict[str, float]
"""Seconds, by the name of a way."""

_FORMAT = 1


class Cache:
    """Times of candidates, by problem. `find` and `keep` touch memory only; `save` writes the file."""

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / f"choices-{_digest(environment())}.json"
        self._known: dict[str, Times] = {} if self.path is None else _read(self.path)
        self._new: dict[str, Times] = {}

    def find(self, key: str) -> Times:
        """What is known of a problem; nothing is known of most."""
        return dict(self._known.get(key, {}))

    def keep(self, key: str, times: Times) -> None:
        """Remember."""
        self._known.setdefault(key, {}).update(times)
        self._new.setdefault(key, {}).update(times)

    def save(self) -> None:
        """Write what is new, beside what another process may have written meanwhile."""
        if self.path is None or not self._new:
            return
        merged = _read(self.path)
        for key, times in self._new.items():
            merged.setdefault(key, {}).update(times)
        content = {"format": _FORMAT, "environment": environment(), "seconds": merged}
        with contextlib.suppress(OSError):
            _replace(self.path, json.dumps(content, indent=1))
            self._new = {}


def opened() -> Cache:
    """The cache of this user, or one that forgets."""
    return Cache(folder())


def folder() -> Path | None:
    """Where files are; None where the user wants none."""
    if os.environ.get("RAREFY_CACHE") == "0":
        return None
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "rarefy"
    except RuntimeError:  # nobody knows where home is
        return None


@cache
def environment() -> dict[str, str]:
    """What times depend on beside the problem: the processor, the kernels' build, torch."""
    status = native.status()
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count() or 1),
        "isa": status.isa or "none",
        "kernels": _build(status.path) if status.isa else "none",
        "torch": torch.__version__,
    }


def _build(path: Path | None) -> str:
    return "none" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _digest(content: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, Times]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    found = cast(dict[str, Any], content)
    if found.get("format") != _FORMAT or found.get("environment") != environment():
        return {}
    problems = found.get("seconds")
    if not isinstance(problems, dict):
        return {}
    listed = cast(dict[str, Any], problems)
    return {key: dict(times) for key, times in listed.items() if _are_times(times)}


def _are_times(times: Any) -> bool:
    if not isinstance(times, dict):
        return False
    values = cast(dict[Any, Any], times).values()
    return all(isinstance(v, float) and math.isfinite(v) and v > 0 for v in values)


def _replace(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.write_text(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
