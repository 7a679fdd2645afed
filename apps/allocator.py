"""How the C library hands memory back on Linux: less eagerly than it would.

glibc returns freed blocks at once when they are large, or at the top of the heap, and the operating system clears them anew for
the next forward. The activations of a batch are such blocks, of the same sizes every time, so that work is for nothing. Blocks
below 32 MB, and 256 MB of what is free, are kept. Only programs choose this, never the library: it holds for the whole process.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> None:
    """Does nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 256 << 20)
