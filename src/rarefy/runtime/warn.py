"""What is said once, when a process first packs: what would make it slower than it could be."""

from __future__ import annotations

import re
import warnings
from functools import cache
from pathlib import Path

from rarefy.core import native
from rarefy.runtime import kernels


@cache
def warn_once() -> None:
    """Warn of a second OpenMP runtime, and of missing kernels."""
    runtimes = openmp_runtimes()
    if len(runtimes) > 1:
        warnings.warn(
            f"this process has loaded {len(runtimes)} OpenMP runtimes ({', '.join(runtimes)}): their threads may fight "
            "over the processor. What loads another one than torch's is better imported in another process.",
            stacklevel=3,
        )
    if not kernels.available():
        warnings.warn(f"pack has nothing but torch to choose from: {native.status()}", stacklevel=3)


def openmp_runtimes(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """The OpenMP runtimes in this process, as file names; empty where the system does not tell."""
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[-1] for line in lines if re.search(r"/lib(?:gomp|iomp|omp)\d*\b[^/]*\.so", line)}
    return sorted(path.rpartition("/")[2] for path in paths)
