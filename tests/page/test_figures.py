"""Win rate, decided share and the charts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from judging_pages import TEXTS, shown

from zorl.apps.page.charts import Point, chart_html
from zorl.apps.page.figures import decided_share, win_rate
from zorl.apps.page.progress_tab import Charts
from zorl.probe import Choice
from zorl.rewards.judgment_records import ComparisonVote
from zorl.rewards.judgment_store import JudgmentStore, NewPair, StoredStep


def compared(votes: Iterable[tuple[int, Choice]]) -> list[ComparisonVote]:
    """Each vote on a comparison of its own."""
    return [ComparisonVote(pair, 0, 0, "ann", choice, step) for pair, (step, choice) in enumerate(votes)]


def test_the_win_rate_counts_ties_as_halves_and_leaves_abstentions_out() -> None:
    votes = [(1, Choice.FIRST), (1, Choice.TIE), (1, Choice.ABSTAIN), (2, Choice.SECOND), (2, Choice.BOTH_BAD)]
    points = win_rate(compared(votes))
    assert [(p.step, p.value, p.n) for p in points] == [(1, 0.75, 2), (2, 0.5, 4)]
    assert all(p.low is not None and p.high is not None and p.low < p.value < p.high for p in points)
    assert win_rate(compared([(1, Choice.ABSTAIN)])) == []


def test_a_comparison_counts_once_however_many_judge_it() -> None:
    once = win_rate(compared([(1, Choice.FIRST)] * 4))
    thrice = [ComparisonVote(pair, 0, 0, name, Choice.FIRST, 1) for pair in range(4) for name in ("ann", "bob", "cid")]
    assert win_rate(thrice) == once
    split = [
        ComparisonVote(0, 0, 0, name, choice, 1) for name, choice in (("ann", Choice.FIRST), ("bob", Choice.SECOND))
    ]
    assert [(p.value, p.n) for p in win_rate(split)] == [(0.5, 1)]


def test_the_win_rate_looks_back_on_the_latest_comparisons_alone() -> None:
    votes = [(step, Choice.SECOND if step < 10 else Choice.FIRST) for step in range(30) for _ in range(2)]
    assert win_rate(compared(votes))[-1].value == 1.0


def test_a_window_that_cuts_into_a_step_keeps_its_latest_verdicts_whoever_won() -> None:
    votes = [(1, Choice.FIRST if i % 2 else Choice.SECOND) for i in range(40)]
    assert [(p.value, p.n) for p in win_rate(compared(votes))] == [(0.5, 20)]
    lost_at_last = [(1, Choice.FIRST)] * 20 + [(1, Choice.SECOND)] * 20
    assert win_rate(compared(lost_at_last))[0].value == 0.0


def test_the_decided_share_is_of_opinions() -> None:
    votes = [(1, Choice.FIRST), (1, Choice.TIE), (1, Choice.ABSTAIN), (2, Choice.BOTH_BAD), (3, Choice.ABSTAIN)]
    assert decided_share(votes) == [Point(1, 0.5), Point(2, 0.0)]


def test_the_charts_leave_out_the_steps_that_were_undone(tmp_path: Path) -> None:
    store = JudgmentStore(tmp_path / "judgments.sqlite", comparison_share=0, repeat_share=0)
    ann = store.rater("Ann")

    def judge_one() -> None:
        store.vote(shown(store.next_pair(ann)).id, ann, Choice.FIRST)

    for step in range(3):
        probe = store.add_probe([NewPair(0, 0, *TEXTS[0])], key=f"step {step}", step=step)
        judge_one()
        store.close_probe(probe.id)
        store.commit_step(StoredStep(step, probe.id, 0.1, (step,), (1.0,), (0.5,), {"drift": 0.1}))
        store.add_comparisons([NewPair(0, 0, *TEXTS[0])], step=step + 1)
        judge_one()
    assert [vote.step for vote in store.comparisons()] == [1, 2, 3]
    assert "step 3" in Charts(store).html()[0]
    store.rewind(1)
    assert [vote.step for vote in store.comparisons()] == [1]
    assert set(re.findall(r"<span>step (\d)", Charts(store).html()[0])) == {"1"}


@pytest.mark.parametrize("values", [[0.0], [0.5, 0.25], [3.7, 0.0, 12.0], [0.0004, 0.0001]])
def test_a_chart_stays_within_its_frame_and_has_its_figures_in_a_table(values: list[float]) -> None:
    points = [Point(step, value, 0.0, value) for step, value in enumerate(values, 1)]
    drawn = chart_html("A <title>", "–", "about", points)
    numbers = [
        float(n) for n in re.findall(r"[ML ,\"](-?\d+\.\d+)", " ".join(re.findall(r'(?:d|points)="[^"]+"', drawn)))
    ]
    assert all(0 <= number <= 100 for number in numbers)
    assert drawn.count('<th scope="row">') == len(values)
    assert "<title>" not in drawn
