"""Numbers in messages."""

from __future__ import annotations


def counted(number: int, one: str, many: str) -> str:
    """`1 step`, `2 steps`: a number with the noun that agrees with it."""
    return f"{number} {one if number == 1 else many}"
