"""Freed memory is kept for the next forward, where the C library can be told so."""

import ctypes
import mmap
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from zorl.apps.allocator import keep_freed_memory
keep_freed_memory()
def forward():
    blocks = [torch.ones(4 << 20) for _ in range(8)]  # 16 MB each
for _ in range(3):
    forward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    forward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc"
)
def test_freed_blocks_are_not_cleared_anew_for_every_forward() -> None:
    faults = int(subprocess.check_output([sys.executable, "-c", PROGRAM], text=True))
    touched = 10 * 8 * (16 << 20) // mmap.PAGESIZE
    assert faults < touched / 100, f"{faults} of {touched} pages were cleared again"
