"""How many directions a step averages over: constant, or growing linearly (MeZO, Appendix A, n-SPSA)."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Directions:
    """n of each step: from `start` to `end`, linearly over `steps` steps, then constant.

    Written as `4`, or `"1-8/1000"` for 1 to 8 within 1000 steps.

    Raises:
        ValueError: a number below one.
    """

    start: int
    end: int
    steps: int = 1

    def __post_init__(self) -> None:
        if self.start < 1 or self.end < 1 or self.steps < 1:
            raise ValueError(f"n_spsa needs at least one direction and one step, got {self}")

    @classmethod
    def parse(cls, value: int | str | Directions) -> Directions:
        """Raises ValueError where the text is neither a number nor `start-end/steps`."""
        if isinstance(value, Directions):
            return value
        match = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9})\s*/\s*(\d{1,9}))?\s*", str(value))
        if match is None:
            raise ValueError(f"n_spsa must be a number such as 4, or a schedule such as '1-8/1000', got {value!r}")
        start, end, steps = match.groups()
        return cls(int(start), int(end or start), int(steps or 1))

    def at(self, step: int) -> int:
        """n at 0-based step `step`."""
        done = min(step / self.steps, 1.0)
        return round(self.start + (self.end - self.start) * done)

    def __str__(self) -> str:
        return str(self.start) if self.start == self.end else f"{self.start}-{self.end}/{self.steps}"
