"""Pairs, raters and a clock for the tests of the judgment store."""

from __future__ import annotations

import math
from collections.abc import Callable

from zorl.probe import Choice
from zorl.rewards.judgment_store import JudgmentStore, NewPair, Showing, StoredStep

Open = Callable[..., JudgmentStore]


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def new_pairs(n: int, text: str = "") -> list[NewPair]:
    return [NewPair(i % 2, i // 2, f"prompt {i}{text}", f"plus {i}{text}", f"minus {i}{text}") for i in range(n)]


def shown(store: JudgmentStore, rater: int) -> Showing:
    showing = store.next_pair(rater)
    assert showing is not None
    return showing


def choice_of_plus(showing: Showing) -> Choice:
    """What a rater says who likes the plus side."""
    return Choice.FIRST if showing.first.startswith("plus") else Choice.SECOND


def step_of(probe: int, step: int) -> StoredStep:
    return StoredStep(step, probe, 0.5, (7,), (math.nan,), (0.25,), {"drift": 0.1})
