"""What several raters say together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from zorl.probe import Choice


def majority(choices: Iterable[Choice]) -> Choice:
    """The opinion that most have. Abstentions are left out; a draw between opinions is a tie; without one all abstain.

    A tie and "both bad" are votes for neither side: together they may outvote one.
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
