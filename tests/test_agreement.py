"""Agreement of raters: alpha against published figures, bias of position, repeats."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from zorl.probe import Choice
from zorl.rewards.agreement import Share, agreement, krippendorff_alpha
from zorl.rewards.judgment_store import JudgmentStore, NewPair, ShowingRecord

F, S, T, B, A = Choice.FIRST, Choice.SECOND, Choice.TIE, Choice.BOTH_BAD, Choice.ABSTAIN


def record(
    pair: int, rater: str, choice: Choice | None, *, flipped: bool = False, repeat: bool = False, seconds: float = 2.0
) -> ShowingRecord:
    opinion = choice.flipped if choice is not None and flipped else choice
    answered = None if choice is None else 100.0 + seconds
    return ShowingRecord(0, pair, "probe", 1, 0, rater, repeat, flipped, choice, opinion, 100.0, answered)


def test_alpha_is_one_where_all_agree_and_below_zero_where_they_contradict() -> None:
    agreeing = [{"ann": choice, "bob": choice} for choice in (F, S, F, T, S)]
    assert krippendorff_alpha(agreeing) == pytest.approx(1.0)
    contradicting = [{"ann": choice, "bob": choice.flipped} for choice in (F, S, F, S)]
    assert krippendorff_alpha(contradicting) < -0.5


def test_alpha_of_two_categories_is_the_published_one() -> None:
    """Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", example A: binary, two observers, alpha = 0.095."""
    first = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    second = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    units = [{"A": (F, S)[a], "B": (F, S)[b]} for a, b in zip(first, second, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.095, abs=5e-4)


def test_alpha_leaves_out_who_has_no_opinion_and_is_nan_where_nothing_speaks_for_it() -> None:
    votes = [record(1, "ann", F), record(1, "bob", F), record(2, "ann", S), record(2, "bob", S)]
    silent = [record(3, "ann", F), record(3, "bob", A), record(4, "bob", S), record(5, "cid", None)]
    assert agreement(votes).alpha == agreement([*votes, *silent]).alpha == pytest.approx(1.0)
    assert agreement([*votes, *silent]).shared_pairs == 2
    assert math.isnan(agreement([]).alpha)
    assert math.isnan(agreement([record(1, "ann", F), record(2, "bob", S)]).alpha)
    assert math.isnan(agreement([record(1, "ann", F), record(1, "bob", F)]).alpha)


def test_both_bad_is_as_neutral_as_a_tie() -> None:
    units = [{"ann": F, "bob": F}, {"ann": T, "bob": B}, {"ann": S, "bob": S}]
    assert krippendorff_alpha(units) == pytest.approx(1.0)


def test_position_bias_counts_what_was_seen_first() -> None:
    votes = [record(i, "ann", F, flipped=bool(i % 2)) for i in range(30)]
    votes += [record(30 + i, "ann", S) for i in range(10)] + [record(40, "ann", T), record(41, "ann", A)]
    found = agreement(votes).first
    assert (found.value, found.n) == (0.75, 40)
    assert 0.5 < found.low < 0.75 < found.high < 1


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1)]
)
def test_the_interval_is_wilsons(hits: int, n: int, low: float, high: float) -> None:
    share = Share.of(hits, n)
    assert (share.low, share.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert math.isnan(Share.of(0, 0).value)


def test_a_swapped_repeat_is_consistent_when_the_opinion_stays() -> None:
    votes = [
        record(1, "ann", F), record(1, "ann", S, flipped=True, repeat=True),  # the same answer, in the other place
        record(2, "ann", F), record(2, "ann", F, flipped=True, repeat=True),  # always the left one
        record(3, "ann", T), record(3, "ann", B, flipped=True, repeat=True),
        record(4, "ann", F), record(4, "ann", A, flipped=True, repeat=True),  # no opinion is no contradiction
        record(5, "bob", S),
    ]  # fmt: skip
    found = agreement(votes)
    assert (found.consistency.value, found.consistency.n) == (pytest.approx(2 / 3), 3)
    assert [rater.consistency.n for rater in found.raters] == [3, 0]


def test_the_table_has_a_row_a_rater() -> None:
    votes = [record(i, "ann", F, seconds=3.0) for i in range(4)] + [record(i, "bob", F) for i in range(3)]
    votes += [record(0, "cid", S), record(1, "cid", T, seconds=8.0), record(2, "cid", A)]
    ann, bob, cid = agreement(votes).raters
    assert (ann.name, ann.votes, ann.seconds, ann.first.value) == ("ann", 4, 3.0, 1.0)
    assert (ann.with_others.value, ann.with_others.n) == (1.0, 1), "Bob's and Cid's differ on two of the three"
    assert (cid.votes, cid.ties, cid.abstained, cid.with_others.value) == (3, 1, 1, 0.0)
    assert (bob.with_others.value, bob.with_others.n) == (1.0, 1)


def test_who_always_differs_is_the_one_who_does_not_agree_with_others() -> None:
    votes = [record(i, name, choice) for i in range(30) for name, choice in (("ann", F), ("bob", F), ("cid", S))]
    ann, bob, cid = (rater.with_others for rater in agreement(votes).raters)
    assert (cid.value, cid.n) == (0.0, 30)
    assert ann.n == bob.n == 0, "where the two others differ, there is no majority to agree with"
    more = [*votes, *(record(i, "dan", F) for i in range(30))]
    assert [rater.with_others.value for rater in agreement(more).raters] == [1.0, 1.0, 0.0, 1.0]


def test_a_store_tells_what_is_needed(tmp_path: Path) -> None:
    with JudgmentStore(tmp_path / "store", votes_per_pair=2, repeat_share=0.2, comparison_share=0.0) as store:
        store.add_probe([NewPair(0, i, f"p{i}", f"plus {i}", f"minus {i}") for i in range(30)], key="a")
        for name in ("ann", "bob"):
            rater = store.rater(name)
            while (showing := store.next_pair(rater)) is not None:
                likes = "plus" if showing.pair % 3 else "minus"
                store.vote(showing.id, rater, F if showing.first.startswith(likes) else S)
        found = agreement(store.showings())
    assert found.alpha == pytest.approx(1.0)
    assert (found.shared_pairs, found.consistency.value) == (30, 1.0)
    assert found.consistency.n > 3
    assert [rater.votes for rater in found.raters] == [30, 30]
