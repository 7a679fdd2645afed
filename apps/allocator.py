"""Makes the C library on Linux return freed memory to the operating system less eagerly.

glibc returns freed blocks at once if they are large or at the top of the heap, and the operating system has to clear them for
the next forward pass. The activations of a batch are such blocks and have the same sizes every time, so that work is wasted.
Here blocks below 32 MB, and up to 256 MB of free memory, are kept. Only programs do this, never the library: it affects the
whole process.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)


def keep_freed_memory() -> None:
    """Sets the thresholds. Does nothing if the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 256 << 20)
