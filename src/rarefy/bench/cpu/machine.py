"""What the processor can do at most: peaks of multiply-adds, memory bandwidth, size of the last-level cache.

Shares of the peak and byte floors are against these measured figures, not against a data sheet. They need a C compiler;
without one they are left out and so are the shares.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

__all__ = ["Machine", "last_level_cache", "measure_machine", "pin"]

_SOURCE = Path(__file__).with_name("machine.c")
_UNKNOWN_CACHE = 32 << 20


class Machine(BaseModel):
    """Limits at the thread count that is measured with.

    cache: bytes of the last-level cache. memory: GB/s read from memory. peak: GFLOP/s (int8: GOP/s) per dtype, a
    multiply-add counted as two. missing: why there are no measured figures.
    """

    model_config = ConfigDict(extra="forbid")

    processors: list[int]
    cache: int
    memory: float | None = None
    peak: dict[str, float] = {}
    missing: str | None = None

    def floor(self, nbytes: float) -> float | None:
        """Seconds to read that many bytes from memory, None where the bandwidth is not known."""
        return None if self.memory is None else nbytes / self.memory / 1e9

    def share(self, dtype: str, operations: float, seconds: float) -> float | None:
        """Share of the dtype's peak that so many operations in so many seconds are."""
        peak = self.peak.get(dtype)
        return None if peak is None else operations / seconds / (peak * 1e9)


def pin(threads: int) -> list[int]:
    """Keep this process and all its threads, other libraries' too, on the first `threads` processors it may use.

    Single threads are not tied to single processors: libraries hand the main thread's affinity on to the threads that
    they start, which would put a whole pool on one processor. Returns the processors.
    """
    torch.set_num_threads(threads)
    if not hasattr(os, "sched_setaffinity"):
        return []
    chosen = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, chosen)
    return chosen


def last_level_cache() -> int:
    """Bytes of the last-level cache, 32 MiB where the system does not say."""
    try:
        size = os.sysconf("SC_LEVEL3_CACHE_SIZE") or os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (ValueError, OSError):
        size = 0
    return size if size > 0 else _UNKNOWN_CACHE


def measure_machine(threads: int, processors: list[int]) -> Machine:
    """Limits of the processor, from a small program that is compiled for it; takes about three seconds."""
    machine = Machine(processors=processors, cache=last_level_cache())
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return machine.model_copy(update={"missing": "no C compiler was found"})
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "machine")
        command = [compiler, "-O3", "-march=native", "-fopenmp", str(_SOURCE), "-o", program]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            said = subprocess.run([program, str(threads)], check=True, capture_output=True, text=True, timeout=120)
        except (subprocess.SubprocessError, OSError) as error:
            return machine.model_copy(update={"missing": f"the program that measures them failed: {error}"})
    limits = {name: float(value) for name, value in map(str.split, said.stdout.splitlines())}
    return machine.model_copy(update={"memory": limits.pop("memory"), "peak": limits})
