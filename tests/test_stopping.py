"""Stopping: a curve that has gone flat is told from one that still rises, and from one that is only noisy."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest

from zorl.stopping import Outlook, Stopping, looks_of, outlook

FORWARDS = [100.0 * i for i in range(1, 13)]


def history(scores: list[float]) -> list[dict[str, float]]:
    return [{"eval_reward": s, "eval_forwards": f, "step": i} for i, (f, s) in enumerate(zip(FORWARDS, scores))]  # noqa: B905


def test_a_logarithmic_curve_is_continued():
    scores = [0.5 + 0.1 * math.log(f) for f in FORWARDS]
    found = outlook(FORWARDS, scores, times=3.0)
    assert found is not None
    assert found.gain == pytest.approx(0.1 * math.log(3.0))
    assert found.low == pytest.approx(found.gain) == found.high
    assert found.looks == 6
    assert outlook([0.0, *FORWARDS], [0.1, *scores], times=3.0) == found, "what no forward was spent on is left out"


@pytest.mark.parametrize("times", [2.0, 5.0])
def test_the_interval_holds_the_truth_as_often_as_it_says(times: float):
    generator, inside, n = random.Random(0), 0, 1000
    for _ in range(n):
        scores = [0.02 * math.log(f) + generator.gauss(0.0, 0.03) for f in FORWARDS]
        found = outlook(FORWARDS, scores, times)
        assert found is not None
        inside += found.low <= 0.02 * math.log(times) <= found.high
    assert inside / n == pytest.approx(0.95, abs=0.02)


def test_too_few_looks_say_nothing():
    assert outlook(FORWARDS[:3], [0.1, 0.2, 0.3], 2.0) is None
    assert outlook(FORWARDS[:4], [0.1, 0.2, 0.3, math.nan], 2.0) is None
    assert outlook([], [], 2.0) is None
    assert isinstance(outlook(FORWARDS[:4], [0.1, 0.2, 0.3, 0.4], 2.0), Outlook)


def test_an_interval_that_is_wider_than_the_scores_seen_is_not_told():
    """A score of −22 that cannot exceed 0 was promised +49, give or take 240, in another hour."""
    rising = [0.5 + 0.1 * math.log(f) for f in FORWARDS]
    for scores, told in ((rising, True), ([-22.0, -24.0, -21.0, -25.0, -22.0, -23.0], False), ([0.5] * 8, False)):
        found = outlook(FORWARDS[: len(scores)], scores, times=100.0)
        assert found is not None
        assert found.can_be_told([*scores, math.nan]) is told


def test_a_run_stops_where_twice_as_much_would_buy_too_little():
    stopping = Stopping(None, least_gain=0.01)
    flat = [0.7, 0.79, 0.800, 0.801, 0.7995, 0.8, 0.8005, 0.7998]
    assert "doubling the forward passes would improve the held-out score by" in (stopping.reason(history(flat)) or "")
    assert stopping.reason(history([0.1 * i for i in range(8)])) is None, "still rising"
    assert stopping.reason(history([0.7, 0.8, 0.7, 0.8, 0.7, 0.85, 0.7, 0.8])) is None, "too noisy to tell"
    assert stopping.reason(history(flat[:3])) is None
    assert stopping.reason(history([0.75] * 5)) is not None, "level"
    assert stopping.reason(history([0.75] * 4)) is None, "once is not enough"
    assert stopping.reason(history([0.7, 0.79, 0.8, 0.82, 0.84, 0.86, 0.8, 0.8])) is None


def test_it_is_asked_after_every_evaluation_and_seldom_stops_a_run_that_still_gains():
    generator, stopped, stopping = random.Random(0), 0, Stopping(None, least_gain=0.005)
    for _ in range(200):
        scores = [0.02 * math.log2(100.0 * i) + generator.gauss(0.0, 0.01) for i in range(1, 13)]
        stopped += any(stopping.reason(history(scores[:n])) is not None for n in range(1, 13))
    assert stopped / 200 < 0.025


def test_a_run_stops_when_its_patience_is_over():
    stopping = Stopping(patience=2, least_gain=None)
    assert stopping.reason(history([0.5, 0.6])) is None
    assert stopping.reason(history([0.5, 0.6, 0.6])) is None
    assert stopping.reason(history([0.5, 0.6, 0.6, 0.59])) == "none of the last 2 evaluations did better than 0.6"
    assert stopping.reason(history([math.nan, 0.6, math.nan])) is None


def test_a_score_that_falls_can_be_the_better_one():
    losses = [{"eval_loss": loss, "eval_forwards": n} for n, loss in ((8, 0.9), (16, 0.7), (24, 0.8), (32, 0.71))]
    stopping = Stopping(2, None, "eval_loss", greater_is_better=False)
    assert stopping.reason(losses[:3]) is None
    assert stopping.reason(losses) == "none of the last 2 evaluations did better than 0.7"


def test_other_entries_of_the_log_are_no_looks():
    assert looks_of([{"loss": 1.0}, {"eval_reward": 0.5, "eval_forwards": 8}, {"eval_a_reward": 0.5}]) == ([8], [0.5])


def test_the_callback_raises_the_flag():
    control, state = SimpleNamespace(should_training_stop=False), SimpleNamespace(log_history=history([0.5, 0.4]))
    Stopping(2, None).on_evaluate(None, state, control)
    assert not control.should_training_stop
    Stopping(1, None).on_evaluate(None, state, control)
    assert control.should_training_stop
