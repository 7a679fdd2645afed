"""What the page shows: texts that are no HTML, the status, guidelines."""

from __future__ import annotations

import html
import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judging_pages import HOSTILE, progress

from zorl.apps.page.difference import difference
from zorl.apps.page.judge_tab import DOWN, WAITING, guidelines_html, pair_html, status_html
from zorl.apps.page.markup import answers_html, prompt_html
from zorl.apps.page.progress_tab import refusal
from zorl.rewards.judgment_store import Showing


@given(st.text(), st.text())
def test_the_parts_of_a_difference_are_the_two_texts(first: str, second: str) -> None:
    parts = difference(first, second)
    assert ["".join(part.text for part in side) for side in parts] == [first, second]
    assert all(part.text.strip() for side in parts for part in side if part.differs)


@given(st.text())
def test_a_text_does_not_differ_from_itself(text: str) -> None:
    assert not any(part.differs for side in difference(text, text) for part in side)


@pytest.mark.parametrize(
    ("first", "second", "marked"),
    [
        ("it was a hit .", "it was a flop .", [["hit"], ["flop"]]),
        ("not very  good", "very good", [["not"], []]),
        ("don't stop", "do stop", [["don't"], ["do"]]),
        ("电影很好", "电影不好", [["很"], ["不"]]),
        ("", "anything", [[], ["anything"]]),
    ],
)
def test_words_that_the_other_answer_lacks_are_marked(first: str, second: str, marked: list[list[str]]) -> None:
    assert [[part.text for part in side if part.differs] for side in difference(first, second)] == marked


def test_long_answers_are_compared_in_the_time_of_a_click() -> None:
    first, second = (" ".join(f"{name}{i % 97}" for i in range(20_000)) for name in ("a", "b"))
    began = time.perf_counter()
    difference(first, second)
    assert time.perf_counter() - began < 1.0


def test_nothing_of_a_model_s_text_is_html() -> None:
    shown = pair_html(Showing(1, 1, HOSTILE, HOSTILE, f"{HOSTILE} more"), progress())
    assert set(re.findall(r"<(\w+)", shown)) == {"article", "section", "h2", "div", "span", "mark"}
    assert html.unescape(re.sub(r"</?(mark)>", "", shown)).count(HOSTILE) == 3


def test_a_conversation_is_shown_turn_by_turn_and_what_only_looks_like_one_as_it_is() -> None:
    turns = [{"role": "user", "content": "<b>Hi</b>"}, {"role": "assistant", "content": "Yes?"}]
    assert prompt_html(json.dumps(turns)).count("<dt>") == 2
    assert "&lt;b&gt;Hi&lt;/b&gt;" in prompt_html(json.dumps(turns))
    for text in ('[{"role": 1}]', "[{", '[{"role"'):
        assert html.escape(text) in prompt_html(text)
    answer = [{"role": "assistant", "content": "Of course."}]
    assert ">Of course.<" in re.sub("</?mark>", "", answers_html(json.dumps(answer), "No.", ("A", "B")))


def test_an_empty_answer_says_so() -> None:
    assert "(an empty answer)" in answers_html(" ", "something", ("A", "B"))


def test_the_status_counts_verdicts_to_the_next_step_and_a_message_cannot_break_out_of_it() -> None:
    shown = status_html(progress(steps=1, votes_needed=4, votes_given=3, message='"><script>'))
    assert "<b>3</b> of 4 verdicts for step 2" in shown
    assert "<b>1</b> step done" in shown
    assert "<script" not in shown
    assert "Step 1 is being prepared" in status_html(progress())


def test_the_status_says_what_the_next_step_waits_for() -> None:
    held = status_html(progress(votes_needed=8, votes_given=7, votes_held=1))
    assert "<b>7</b> of 8 verdicts for step 1; the last pair is with another rater" in held
    assert "the other 2 are with other raters" in status_html(progress(votes_needed=8, votes_given=6, votes_held=2))
    # There is still one for this rater.
    assert "other raters" not in status_html(progress(votes_needed=8, votes_given=6, votes_held=1))
    for computing in (
        progress(votes_needed=8, votes_given=8),
        progress("computing", votes_needed=8, votes_given=0),  # those of the step after it
    ):
        assert "<span>Computing step 1</span>" in status_html(computing)
        assert "Model: computing a step" in status_html(computing)
        assert "width:100%" in status_html(computing)
    assert "<b>3</b> of 8 verdicts for step 1 (2 skipped)" in status_html(
        progress(votes_needed=8, votes_given=3, votes_skipped=2)
    )


def test_without_a_trainer_the_page_says_how_to_start_one() -> None:
    alone = progress("unconnected", "Start: zorl train --judge human --judgments jp/judgments.sqlite …")
    assert "<h2>No trainer is connected yet.</h2><p>Start: zorl train --judge human" in pair_html(None, alone)
    assert "Model: no trainer connected" in status_html(alone, steps=False)
    assert "0</b> steps done" not in status_html(alone, steps=False)
    assert "of 8 verdicts for the next step" in status_html(progress(votes_needed=8), steps=False)


def test_a_trainer_that_is_gone_is_not_waited_for() -> None:
    gone = progress("silent", "It has not looked for verdicts for 4 min.")
    assert "<h2>The trainer does not answer.</h2><p>It has not looked for verdicts for 4 min.</p>" in pair_html(
        None, gone
    )
    assert "z-is-silent" in status_html(gone)
    assert "Model: not answering" in status_html(gone)


@pytest.mark.parametrize(("age", "said"), [(119.0, None), (125.0, "2 min ago"), (7300.0, "2 h ago")])
def test_a_trainer_that_has_long_been_at_work_may_be_gone(age: float, said: str | None) -> None:
    busy = progress("generating")
    busy.tuner["age"] = age
    shown = pair_html(None, busy)
    assert WAITING in shown
    assert said in shown if said else "ago" not in shown


def test_what_is_down_is_not_said_to_be_writing() -> None:
    for state in DOWN:
        waiting = pair_html(None, progress(state, "because"))
        assert f"<h2>{DOWN[state]}</h2><p>because</p>" in waiting
        assert "z-pulse" not in waiting
    assert "z-pulse" in pair_html(None, progress("generating"))


@pytest.mark.parametrize(
    ("wished", "done", "said"),
    [
        (1.0, 3, ""),
        (0.0, 3, ""),
        (3.0, 3, "3 steps have been made; choose a whole number from 0 to 2."),
        (1.5, 3, "choose a whole number from 0 to 2."),
        (-1.0, 3, "choose a whole number from 0 to 2."),
        (None, 3, "choose a whole number from 0 to 2."),
        (1.0, 1, "1 step has been made; the only step to go back to is 0."),
        (0.0, 0, "No step has been made yet."),
    ],
)
def test_only_a_step_that_was_made_can_be_gone_back_to(wished: float | None, done: int, said: str) -> None:
    assert refusal(wished, done).endswith(said)
    assert bool(refusal(wished, done)) == bool(said)


def test_where_there_is_no_pair_the_page_says_what_it_waits_for() -> None:
    assert "The model is writing the next pairs…" in pair_html(None, progress())
    assert "out of &lt;memory&gt;" in pair_html(None, progress(state="failed", message="out of <memory>"))


def test_guidelines_are_text_their_first_line_the_question() -> None:
    shown = guidelines_html("Which is <b>better</b>?\n\nGo by taste,\nalways.\n\n- one\n- two")
    assert "<h1>Which is &lt;b&gt;better&lt;/b&gt;?</h1>" in shown
    assert "<p>Go by taste, always.</p><ul><li>one</li><li>two</li></ul>" in shown
    assert "<details" not in guidelines_html("Which?")
