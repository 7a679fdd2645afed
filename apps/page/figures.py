"""The figures that the Progress tab draws: plain numbers, no HTML."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from zorl.apps.page.charts import Point
from zorl.probe import Choice
from zorl.rewards.agreement import Share

WINDOW = 20  # latest comparisons that one point of the win rate covers


def win_rate(votes: Sequence[tuple[int, Choice]]) -> list[Point]:
    """The current model's win rate against the starting one, at each step that has comparisons.

    Args:
        votes: step of the current model, and the verdict with the current model as the first.

    Returns:
        For each step the share of the latest `WINDOW` opinions up to that step which the current model wins, with its 95%
        interval. Ties count as halves. The opinions on one step stay in the order of `votes`.
    """
    opinions = [(step, choice.preference) for step, choice in votes if choice is not Choice.ABSTAIN]
    # By the step alone: sorting by preference too would put the wins last, where the window keeps them.
    known = sorted(opinions, key=lambda opinion: opinion[0])
    last = {step: i for i, (step, _) in enumerate(known, 1)}
    points = []
    for step, end in last.items():
        latest = [preference for _, preference in known[max(0, end - WINDOW) : end]]
        share = Share.of(sum((preference + 1) / 2 for preference in latest), len(latest))
        points.append(Point(step, share.value, share.low, share.high, share.n))
    return points


def decided_share(votes: Iterable[tuple[int, Choice]]) -> list[Point]:
    """The share of the opinions on each step that prefer one side."""
    steps: dict[int, list[bool]] = defaultdict(list)
    for step, choice in votes:
        if choice is not Choice.ABSTAIN:
            steps[step].append(choice in (Choice.FIRST, Choice.SECOND))
    return [Point(step, sum(decided) / len(decided)) for step, decided in sorted(steps.items())]
