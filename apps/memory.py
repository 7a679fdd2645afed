"""Peak memory of a process, or of a part of its work, as measured by the operating system or the GPU."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def peak_memory_mb() -> float:
    """The process's largest resident memory so far, in MB (10⁶ bytes)."""
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes; bytes on macOS
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


class Peak:
    """`megabytes` (10⁶ bytes): the peak of the process's resident memory, or of the GPU's allocations; None if unknown."""

    megabytes: float | None = None


@contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[Peak]:
    """Measures the peak memory of the block. On Linux it resets and reads the kernel's high-water mark, so no peak is missed."""
    peak = Peak()
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.megabytes = torch.cuda.max_memory_allocated(device) / 1e6
        return
    if not sys.platform.startswith("linux"):
        yield peak
        return
    _give_back_free_memory()
    try:
        _CLEAR.write_text("5")
    except OSError:  # not permitted in some containers
        yield peak
        return
    yield peak
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    peak.megabytes = int(line.split()[1]) * 1024 / 1e6


def _give_back_free_memory() -> None:
    """Returns freed memory to the operating system: it would count towards the next measurement."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
