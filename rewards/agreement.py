"""How far raters agree: with one another, with themselves, and regardless of the order in which they saw the answers.

Everything is computed from the showings in a judgment store. A figure without data is NaN.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zorl.probe import Choice
from zorl.rewards.judgment_records import ShowingRecord

_NORMAL_975 = 1.959963984540054  # the quantile of a two-sided 95% interval
_DECIDED = (Choice.FIRST, Choice.SECOND)


@dataclass(frozen=True, slots=True)
class Share:
    """A share of n cases, with its 95% interval (Wilson 1927, score interval). All three are NaN if there are no cases."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, hits: float, n: int) -> Share:
        if n == 0:
            return cls(math.nan, math.nan, math.nan, 0)
        share, z2 = hits / n, _NORMAL_975**2
        centre = (share + z2 / (2 * n)) / (1 + z2 / n)
        half = _NORMAL_975 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
        return cls(share, max(0.0, centre - half), min(1.0, centre + half), n)


@dataclass(frozen=True, slots=True)
class RaterFigures:
    """One rater.

    Attributes:
        name: the rater's name.
        votes: the number of votes, without repeats.
        first: how often the answer seen first won, among votes that preferred one; 0.5 means no position bias.
        consistency: how often a swapped repeat got the same opinion.
        with_others: how often the opinion is that of the other raters, on pairs where more of them share one than any other.
        ties: votes for neither, "both bad" included.
        abstained: votes without an opinion.
        seconds: the median time between seeing a pair and answering it.
    """

    name: str
    votes: int
    first: Share
    consistency: Share
    with_others: Share
    ties: int
    abstained: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """All raters together.

    Attributes:
        alpha: Krippendorff's alpha of the opinions plus, neither, minus as ordered categories: 1 is full agreement, 0
            what chance gives. NaN unless two raters judged the same pair and the opinions differ anywhere.
        shared_pairs: pairs that two or more raters have an opinion on.
        first: as in `RaterFigures`.
        consistency: as in `RaterFigures`.
        raters: the figures of each, most votes first.
    """

    alpha: float
    shared_pairs: int
    first: Share
    consistency: Share
    raters: tuple[RaterFigures, ...]


def agreement(records: Iterable[ShowingRecord]) -> Agreement:
    """The agreement of raters.

    Args:
        records: the result of `JudgmentStore.showings()`; unanswered ones are left out.
    """
    answered = [record for record in records if record.opinion is not None]
    votes = [record for record in answered if not record.repeat]
    names = Counter(record.rater for record in votes)
    repeats = _repeats(answered)
    opinions = _opinions(votes)
    figures = tuple(
        _of_one(name, [vote for vote in votes if vote.rater == name], repeats, opinions)
        for name, _ in sorted(names.items(), key=lambda item: (-item[1], item[0]))
    )
    return Agreement(
        alpha=krippendorff_alpha(opinions.values()),
        shared_pairs=sum(len(of_pair) > 1 for of_pair in opinions.values()),
        first=_first(votes),
        consistency=_consistency(repeats),
        raters=figures,
    )


def krippendorff_alpha(opinions: Iterable[dict[str, Choice]]) -> float:
    """Krippendorff's alpha for ordered categories (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability").

    Args:
        opinions: for each pair the raters' opinions by name, abstentions left out.

    Returns:
        1 for full agreement, 0 for what chance gives; NaN where no pair has two opinions, or all opinions are the same.
    """
    units = [of_pair for of_pair in opinions if len(of_pair) > 1]
    values = {choice.preference for of_pair in units for choice in of_pair.values()}
    if len(values) < 2:
        return math.nan
    import krippendorff
    import numpy as np

    names = sorted({name for of_pair in units for name in of_pair})
    table = np.array([[unit[name].preference if name in unit else math.nan for unit in units] for name in names])
    return float(krippendorff.alpha(reliability_data=table, level_of_measurement="ordinal"))


def _opinions(votes: Iterable[ShowingRecord]) -> dict[int, dict[str, Choice]]:
    """Pair → rater → opinion, abstentions left out."""
    opinions: dict[int, dict[str, Choice]] = defaultdict(dict)
    for vote in votes:
        if vote.opinion is not None and vote.opinion is not Choice.ABSTAIN:
            opinions[vote.pair][vote.rater] = vote.opinion
    return opinions


def _repeats(answered: Iterable[ShowingRecord]) -> list[tuple[str, bool]]:
    """(rater, whether the opinion was the same) of each swapped repeat; abstentions are left out."""
    seen: dict[tuple[int, str], dict[bool, Choice]] = defaultdict(dict)
    for record in answered:
        if record.opinion is not None and record.opinion is not Choice.ABSTAIN:
            seen[record.pair, record.rater][record.repeat] = record.opinion
    return [
        (rater, both[False].preference == both[True].preference) for (_, rater), both in seen.items() if len(both) == 2
    ]


def _first(votes: Sequence[ShowingRecord]) -> Share:
    decided = [vote for vote in votes if vote.choice in _DECIDED]
    return Share.of(sum(vote.choice is Choice.FIRST for vote in decided), len(decided))


def _consistency(repeats: Sequence[tuple[str, bool]]) -> Share:
    return Share.of(sum(same for _, same in repeats), len(repeats))


def _majority(preferences: Iterable[float]) -> float | None:
    """The most frequent of several raters' preferences; None if there are none, or two are equally frequent."""
    counts = Counter(preferences).most_common(2)
    if not counts or (len(counts) == 2 and counts[0][1] == counts[1][1]):
        return None
    return counts[0][0]


def _of_one(
    name: str,
    votes: Sequence[ShowingRecord],
    repeats: Sequence[tuple[str, bool]],
    opinions: dict[int, dict[str, Choice]],
) -> RaterFigures:
    shared = [
        of_pair[name].preference == theirs
        for of_pair in opinions.values()
        if name in of_pair
        and (theirs := _majority(choice.preference for other, choice in of_pair.items() if other != name)) is not None
    ]
    times = [vote.answered_at - vote.shown_at for vote in votes if vote.answered_at is not None]
    return RaterFigures(
        name=name,
        votes=len(votes),
        first=_first(votes),
        consistency=_consistency([repeat for repeat in repeats if repeat[0] == name]),
        with_others=Share.of(sum(shared), len(shared)),
        ties=sum(vote.choice in (Choice.TIE, Choice.BOTH_BAD) for vote in votes),
        abstained=sum(vote.choice is Choice.ABSTAIN for vote in votes),
        seconds=statistics.median(times) if times else math.nan,
    )
