"""Whether a launcher, such as torchrun, started several processes of a command, and which of them this is."""

from __future__ import annotations

import os


def is_first() -> bool:
    """Whether this is the first of them, or the only one: it alone speaks and writes. Known before torch is loaded."""
    return os.environ.get("RANK", "0") == "0"
