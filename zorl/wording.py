"""Numbers in messages."""

from __future__ import annotations


def counted(number: int, one: str, many: str) -> str:
    """`1 step`, `2 steps`: a number with the noun that agrees with it."""
    return f"{number} {one if number == 1 else many}"


def lasting(seconds: float) -> str:
    """`45 s`, `4 min`, `3 h`: a time in whole units."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
