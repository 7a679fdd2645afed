"""From verdicts to a number: odd in the sides, 0 for ties, NaN for no opinion."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zorl.comparisons import COMPARISONS, SHRINKAGE, Comparison, preference_difference
from zorl.estimators import SPSA
from zorl.probe import Choice, Verdict, Verdicts

NAN = math.nan
choices = st.sampled_from(list(Choice))


def of(votes: list[Choice], comparison: Comparison) -> float:
    return preference_difference([vote.preference for vote in votes], comparison)


def same(a: float, b: float) -> bool:
    return a == pytest.approx(b, nan_ok=True)


@pytest.mark.parametrize("comparison", COMPARISONS)
@given(votes=st.lists(choices))
def test_swapping_the_sides_negates_the_difference_and_an_abstention_survives_it(
    comparison: Comparison, votes: list[Choice]
):
    assert same(of([vote.flipped for vote in votes], comparison), -of(votes, comparison))


@pytest.mark.parametrize("comparison", COMPARISONS)
@given(votes=st.lists(choices, min_size=1))
def test_abstentions_are_left_out(comparison: Comparison, votes: list[Choice]):
    assert same(of([*votes, Choice.ABSTAIN], comparison), of(votes, comparison))


@pytest.mark.parametrize("comparison", COMPARISONS)
@given(votes=st.lists(st.sampled_from([Choice.TIE, Choice.BOTH_BAD]), min_size=1))
def test_nothing_but_ties_is_a_difference_of_zero(comparison: Comparison, votes: list[Choice]):
    assert of(votes, comparison) == 0.0


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_no_opinion_at_all_is_nan(comparison: Comparison):
    assert math.isnan(of([], comparison))
    assert math.isnan(of([Choice.ABSTAIN, Choice.ABSTAIN], comparison))


@pytest.mark.parametrize("comparison", COMPARISONS)
@given(votes=st.lists(choices))
def test_one_more_vote_for_a_side_never_counts_against_it(comparison: Comparison, votes: list[Choice]):
    before = of(votes, comparison)
    if not math.isnan(before):
        assert of([*votes, Choice.FIRST], comparison) >= before - 1e-12


def test_each_rule_says_what_it_promises():
    votes = [1.0, 1.0, 0.0, -1.0, NAN]  # w₊ = 2½, w₋ = 1½
    assert preference_difference(votes, "share") == 0.25
    assert preference_difference(votes, "sign") == 1.0
    assert preference_difference(votes, "logit") == pytest.approx(math.log((2.5 + SHRINKAGE) / (1.5 + SHRINKAGE)))


def test_more_people_of_one_mind_make_the_logit_larger_and_the_share_no_larger():
    assert preference_difference([1.0] * 9, "logit") > preference_difference([1.0], "logit")
    assert preference_difference([1.0] * 9, "share") == preference_difference([1.0], "share") == 1.0


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_the_estimator_uses_the_comparison_it_was_made_with(comparison: Comparison):
    verdicts = Verdicts(tuple(Verdict(0, 1, i, c) for i, c in enumerate((Choice.FIRST, Choice.FIRST, Choice.SECOND))))
    (g,) = SPSA(comparison).project(verdicts, 1, 0.25)
    assert g == pytest.approx(-preference_difference([1.0, 1.0, -1.0], comparison) / 0.5)


def test_an_unknown_comparison_is_refused():
    with pytest.raises(ValueError, match="comparison='median'; choose one of 'share', 'logit', 'sign'"):
        SPSA("median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="comparison='median'"):
        preference_difference([1.0], "median")  # type: ignore[arg-type]
