"""What the Progress tab draws, out of the store: plain numbers, no HTML."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from zorl.apps.page.charts import Point
from zorl.probe import Choice
from zorl.rewards.agreement import Share

WINDOW = 20  # comparisons that one point of the win rate looks back on


def win_rate(votes: Sequence[tuple[int, Choice]]) -> list[Point]:
    """The current model's share against the starting one, at each step that has comparisons.

    Args:
        votes: step of the current model, and the verdict with the current model as the first.

    Returns:
        Per step the share of the last `WINDOW` opinions up to it, ties as halves, with its 95% interval. (Within a step
        the order of verdicts does not matter: all of them speak of the same model.)
    """
    known = sorted((step, choice.preference) for step, choice in votes if choice is not Choice.ABSTAIN)
    last = {step: i for i, (step, _) in enumerate(known, 1)}
    points = []
    for step, end in last.items():
        latest = [preference for _, preference in known[max(0, end - WINDOW) : end]]
        share = Share.of(sum((preference + 1) / 2 for preference in latest), len(latest))
        points.append(Point(step, share.value, share.low, share.high, share.n))
    return points


def decided_share(votes: Iterable[tuple[int, Choice]]) -> list[Point]:
    """Of the opinions on each step, the share that preferred a side."""
    steps: dict[int, list[bool]] = defaultdict(list)
    for step, choice in votes:
        if choice is not Choice.ABSTAIN:
            steps[step].append(choice in (Choice.FIRST, Choice.SECOND))
    return [Point(step, sum(decided) / len(decided)) for step, decided in sorted(steps.items())]
