"""The figures that the Progress tab draws: plain numbers, no HTML."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable

from zorl.apps.page.charts import Point
from zorl.probe import Choice
from zorl.rewards.agreement import Share
from zorl.rewards.judgment_records import ComparisonVote

WINDOW = 20  # latest comparisons that one point of the win rate covers


def win_rate(votes: Iterable[ComparisonVote]) -> list[Point]:
    """The tuned model's win rate against the starting one, at each step that has comparisons.

    Returns:
        For each step the share of the latest `WINDOW` comparisons up to that step which the tuned model wins, with its 95%
        interval. What several raters say of one comparison is averaged, so that it counts once; ties count as halves.
        Comparisons on which nobody has an opinion are left out.
    """
    opinions: dict[tuple[int, int], list[float]] = defaultdict(list)
    for vote in votes:
        if vote.choice is not Choice.ABSTAIN:
            opinions[vote.step, vote.pair].append((vote.choice.preference + 1) / 2)
    known = [(step, statistics.fmean(wins)) for (step, _), wins in sorted(opinions.items())]
    last = {step: i for i, (step, _) in enumerate(known, 1)}
    points = []
    for step, end in last.items():
        latest = [won for _, won in known[max(0, end - WINDOW) : end]]
        share = Share.of(sum(latest), len(latest))
        points.append(Point(step, share.value, share.low, share.high, share.n))
    return points


def decided_share(votes: Iterable[tuple[int, Choice]]) -> list[Point]:
    """The share of the opinions on each step that prefer one side."""
    steps: dict[int, list[bool]] = defaultdict(list)
    for step, choice in votes:
        if choice is not Choice.ABSTAIN:
            steps[step].append(choice in (Choice.FIRST, Choice.SECOND))
    return [Point(step, sum(decided) / len(decided)) for step, decided in sorted(steps.items())]
