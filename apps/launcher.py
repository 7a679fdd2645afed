"""Which process of a command this is, if a launcher such as torchrun started several."""

from __future__ import annotations

import os


def is_first() -> bool:
    """Whether this is the first process, or the only one: it alone prints and writes. Works before torch is loaded."""
    return os.environ.get("RANK", "0") == "0"
