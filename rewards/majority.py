"""The majority of several raters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from zorl.probe import Choice


def majority(choices: Iterable[Choice]) -> Choice:
    """The most frequent opinion. Abstentions are left out; a draw is a tie; without any opinion it is an abstention.

    A tie and "both bad" are both votes for neither side: together they may outvote a side.
    """
    counts = Counter(choice for choice in choices if choice is not Choice.ABSTAIN)
    if not counts:
        return Choice.ABSTAIN
    neither = counts[Choice.TIE] + counts[Choice.BOTH_BAD]
    votes = {Choice.FIRST: counts[Choice.FIRST], Choice.SECOND: counts[Choice.SECOND], Choice.TIE: neither}
    most = max(votes.values())
    winners = [choice for choice, n in votes.items() if n == most]
    if winners == [Choice.TIE]:
        return Choice.BOTH_BAD if counts[Choice.BOTH_BAD] > counts[Choice.TIE] else Choice.TIE
    return winners[0] if len(winners) == 1 else Choice.TIE
