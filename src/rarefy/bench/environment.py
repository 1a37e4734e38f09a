"""What a number depends on beside the run itself: versions, hardware, threads and the code that made it."""

import hashlib
import os
import platform
from functools import cache
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

import rarefy

__all__ = ["Environment", "environment"]

_PACKAGE = Path(__file__).parents[1]
# What decides a result: not the tables, the report or the command line.
_DECISIVE = ("axes/**/*.py", "core/**/*.py", "methods/**/*.py", *(f"bench/{n}.py" for n in (
    "account", "controls", "data", "execute", "lineup", "models", "seeds", "tasks", "train"
)))  # fmt: skip


class Environment(BaseModel):
    """The environment section of a result file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    rarefy: str
    code: str
    """Hash of the source files that decide a result."""
    python: str
    torch: str
    numpy: str
    system: str
    machine: str
    processor: str
    instructions: str
    cores: int
    device: str
    threads: int
    flush_denormal: bool

    def decisive(self) -> dict[str, str | int | bool]:
        """The part that a run's numbers depend on: a change of it is another run."""
        return self.model_dump(include={
            "rarefy", "code", "torch", "machine", "instructions", "device", "threads", "flush_denormal"
        })  # fmt: skip


def environment(*, threads: int, flush_denormal: bool) -> Environment:
    """The environment of this process, for runs with these settings."""
    return Environment(
        rarefy=rarefy.__version__,
        code=source_digest(),
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=np.__version__,
        system=platform.system(),
        machine=platform.machine(),
        processor=_processor(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        cores=os.cpu_count() or 1,
        device="cpu",
        threads=threads,
        flush_denormal=flush_denormal,
    )


@cache
def source_digest() -> str:
    """16 hex digits that change with any source file that decides a result."""
    digest = hashlib.sha256()
    for path in sorted(found for pattern in _DECISIVE for found in _PACKAGE.glob(pattern)):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
