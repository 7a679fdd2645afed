"""What an objective is: it evaluates a probe's points, and answers in the estimator's terms.

The objectives are rewards (`zorl.reward_objective`), losses (`zorl.loss_objectives`) and judges (`zorl.judge_objective`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from zorl.policies import Row
from zorl.probe import Answers, Point


@dataclass(frozen=True, slots=True)
class Asked:
    """Answers to a probe, and figures for the log (name → number)."""

    answers: Answers
    figures: dict[str, float] = field(default_factory=dict)


class Objective(Protocol):
    @property
    def name(self) -> str: ...

    def ask(self, rows: Sequence[Row], points: Sequence[Point], noise_seed: int) -> Asked:
        """Evaluates the points on a batch of rows."""

    def evaluate(self, rows: Sequence[Row]) -> dict[str, float]:
        """Figures of θ itself on a whole split; `reward` is among them wherever there is one."""


def columns_of(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """The rows' columns as lists, as TRL passes them."""
    return {name: [row.get(name) for row in rows] for name in rows[0]}
