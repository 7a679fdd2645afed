"""From verdicts to a number: by how much is one side of a direction better, when all that is known is who won?

A verdict on θ+εz and θ−εz is a coin whose bias is the difference of their rewards. With w₊ and w₋ votes for the two sides,
ties (and both bad) half a vote each and abstentions none:

    share   w₊/n − w₋/n                  the mean preference: bounded, and linear near a tie
    logit   log(w₊ + a) − log(w₋ + a)    the difference that a logistic rater feels (Bradley & Terry 1952), shrunk by a so
                                         that a unanimous vote stays finite
    sign    sign(w₊ − w₋)                the majority alone

Each is divided by 2ε by the estimator. Each is odd in its sides, 0 on a tie and NaN where nobody had an opinion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

Comparison = Literal["share", "logit", "sign"]
COMPARISONS: tuple[Comparison, ...] = get_args(Comparison)
SHRINKAGE = 0.5  # a of the logit: half a vote for each side before anybody has voted (Anscombe 1956)


def preference_difference(preferences: Sequence[float], comparison: Comparison = "share") -> float:
    """The difference in reward of the plus side over the minus side.

    Args:
        preferences: of each verdict: +1 plus, −1 minus, 0 neither, NaN no opinion.
        comparison: "share", "logit" or "sign".

    Raises:
        ValueError: there is no such comparison.
    """
    if comparison not in COMPARISONS:
        raise ValueError(f"comparison={comparison!r}; choose one of {', '.join(map(repr, COMPARISONS))}")
    opinions = [p for p in preferences if not math.isnan(p)]
    return _RULES[comparison](opinions) if opinions else math.nan


def _share(opinions: Sequence[float]) -> float:
    return sum(opinions) / len(opinions)


def _logit(opinions: Sequence[float]) -> float:
    plus = sum(0.5 + 0.5 * p for p in opinions)  # votes, ties half each
    minus = sum(0.5 - 0.5 * p for p in opinions)
    return math.log(plus + SHRINKAGE) - math.log(minus + SHRINKAGE)


def _sign(opinions: Sequence[float]) -> float:
    total = sum(opinions)
    return math.copysign(1.0, total) if total else 0.0


_RULES: dict[Comparison, Callable[[Sequence[float]], float]] = {"share": _share, "logit": _logit, "sign": _sign}
