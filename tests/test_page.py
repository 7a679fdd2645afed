"""The page without a browser: what it shows, whom it lets in, its API, and the `zorl judge` command around it."""

from __future__ import annotations

import gc
import html
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from zorl.apps import judge
from zorl.apps.cli import main
from zorl.apps.embedded import REVIEWER
from zorl.apps.judge_prompts import built_in_prompts, read_prompts
from zorl.apps.judge_settings import JudgeSettings
from zorl.apps.page.app import Page
from zorl.apps.page.charts import Point, chart_html
from zorl.apps.page.desk import Desk
from zorl.apps.page.difference import difference
from zorl.apps.page.figures import decided_share, win_rate
from zorl.apps.page.judge_tab import DOWN, guidelines_html, pair_html, status_html
from zorl.apps.page.markup import answers_html, prompt_html
from zorl.apps.page.progress_tab import Charts, refusal
from zorl.apps.page.security import is_foreign, is_local, read_users, sign_in
from zorl.apps.supervisor import Supervisor
from zorl.probe import Choice
from zorl.rewards import HumanJudge
from zorl.rewards.judgment_store import JudgmentStore, NewPair, Progress, Showing, StoredStep

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> ![x](http://example.com/x.png) ${alert(1)} {{7*7}}"
TEXTS = [("the drama was", "truly witty .", "truly dull ."), ("the plot was", "far from flat .", "flat .")]


# --- what is shown -------------------------------------------------------------------------------------------------


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
    shown = pair_html(Showing(1, 1, HOSTILE, HOSTILE, f"{HOSTILE} more"), _progress())
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
    shown = status_html(_progress(steps=1, votes_needed=4, votes_given=3, message='"><script>'))
    assert "<b>3</b> of 4 verdicts for step 2" in shown
    assert "<b>1</b> step done" in shown
    assert "<script" not in shown
    assert "Step 1 is being prepared" in status_html(_progress())


def test_the_status_says_what_the_next_step_waits_for() -> None:
    held = status_html(_progress(votes_needed=8, votes_given=7, votes_held=1))
    assert "<b>7</b> of 8 verdicts for step 1; the last pair is with another rater" in held
    assert "the other 2 are with other raters" in status_html(_progress(votes_needed=8, votes_given=6, votes_held=2))
    # There is still one for this rater.
    assert "other raters" not in status_html(_progress(votes_needed=8, votes_given=6, votes_held=1))
    for computing in (
        _progress(votes_needed=8, votes_given=8),
        _progress("computing", votes_needed=8, votes_given=0),  # those of the step after it
    ):
        assert "<span>Computing step 1</span>" in status_html(computing)
        assert "Model: computing a step" in status_html(computing)
        assert "width:100%" in status_html(computing)
    assert "<b>3</b> of 8 verdicts for step 1 (2 skipped)" in status_html(
        _progress(votes_needed=8, votes_given=3, votes_skipped=2)
    )


def test_without_a_trainer_the_page_says_how_to_start_one() -> None:
    alone = _progress("unconnected", "Start: zorl train --judge human --judgments jp/judgments.sqlite …")
    assert "<h2>No trainer is connected yet.</h2><p>Start: zorl train --judge human" in pair_html(None, alone)
    assert "Model: no trainer connected" in status_html(alone, steps=False)
    assert "0</b> steps done" not in status_html(alone, steps=False)
    assert "of 8 verdicts for the next step" in status_html(_progress(votes_needed=8), steps=False)


def test_a_trainer_that_is_gone_is_not_waited_for() -> None:
    gone = _progress("silent", "It has not looked for verdicts for 4 min.")
    assert "<h2>The trainer does not answer.</h2><p>It has not looked for verdicts for 4 min.</p>" in pair_html(
        None, gone
    )
    assert "z-is-silent" in status_html(gone)
    assert "Model: not answering" in status_html(gone)


def test_what_is_down_is_not_said_to_be_writing() -> None:
    for state in DOWN:
        waiting = pair_html(None, _progress(state, "because"))
        assert f"<h2>{DOWN[state]}</h2><p>because</p>" in waiting
        assert "z-pulse" not in waiting
    assert "z-pulse" in pair_html(None, _progress("generating"))


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
    assert "The model is writing the next pairs…" in pair_html(None, _progress())
    assert "out of &lt;memory&gt;" in pair_html(None, _progress(state="failed", message="out of <memory>"))


def test_guidelines_are_text_their_first_line_the_question() -> None:
    shown = guidelines_html("Which is <b>better</b>?\n\nGo by taste,\nalways.\n\n- one\n- two")
    assert "<h1>Which is &lt;b&gt;better&lt;/b&gt;?</h1>" in shown
    assert "<p>Go by taste, always.</p><ul><li>one</li><li>two</li></ul>" in shown
    assert "<details" not in guidelines_html("Which?")


# --- figures ---------------------------------------------------------------------------------------------------------


def test_the_win_rate_counts_ties_as_halves_and_leaves_abstentions_out() -> None:
    votes = [(1, Choice.FIRST), (1, Choice.TIE), (1, Choice.ABSTAIN), (2, Choice.SECOND), (2, Choice.BOTH_BAD)]
    points = win_rate(votes)
    assert [(p.step, p.value, p.n) for p in points] == [(1, 0.75, 2), (2, 0.5, 4)]
    assert all(p.low is not None and p.high is not None and p.low < p.value < p.high for p in points)
    assert win_rate([(1, Choice.ABSTAIN)]) == []


def test_the_win_rate_looks_back_on_the_latest_comparisons_alone() -> None:
    votes = [(step, Choice.SECOND if step < 10 else Choice.FIRST) for step in range(30) for _ in range(2)]
    assert win_rate(votes)[-1].value == 1.0


def test_a_window_that_cuts_into_a_step_keeps_its_latest_verdicts_whoever_won() -> None:
    votes = [(1, Choice.FIRST if i % 2 else Choice.SECOND) for i in range(40)]
    assert [(p.value, p.n) for p in win_rate(votes)] == [(0.5, 20)]
    lost_at_last = [(1, Choice.FIRST)] * 20 + [(1, Choice.SECOND)] * 20
    assert win_rate(lost_at_last)[0].value == 0.0


def test_the_decided_share_is_of_opinions() -> None:
    votes = [(1, Choice.FIRST), (1, Choice.TIE), (1, Choice.ABSTAIN), (2, Choice.BOTH_BAD), (3, Choice.ABSTAIN)]
    assert decided_share(votes) == [Point(1, 0.5), Point(2, 0.0)]


def test_the_charts_leave_out_the_steps_that_were_undone(tmp_path: Path) -> None:
    store = JudgmentStore(tmp_path / "judgments.sqlite", comparison_share=0, repeat_share=0)
    ann = store.rater("Ann")

    def judge_one() -> None:
        store.vote(_shown(store.next_pair(ann)).id, ann, Choice.FIRST)

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


# --- the desk --------------------------------------------------------------------------------------------------------


def test_a_verdict_brings_the_next_pair_and_undo_the_last_one(tmp_path: Path) -> None:
    desk = _desk(tmp_path)
    first = _shown(desk.next_pair("ada").showing)
    second = _shown(desk.vote("ada", first.id, Choice.FIRST).showing)
    assert second.id != first.id
    back = desk.undo("ada")
    assert back.showing == first
    assert back.notice == "Verdict undone. Judge this pair again."
    assert desk.undo("ada").notice == "You have nothing to undo."


def test_a_verdict_on_a_pair_that_is_closed_says_so_and_brings_the_next_pair(tmp_path: Path) -> None:
    desk = _desk(tmp_path)
    late = _shown(desk.next_pair("ada").showing)
    (probe, *_) = desk.store.open_probes()
    desk.store.close_probe(probe.id)
    turn = desk.vote("ada", late.id, Choice.FIRST)
    assert turn.notice.startswith("This pair is already closed:")
    assert turn.showing is None


def test_nobody_judges_under_another_s_login(tmp_path: Path) -> None:
    desk = Desk(_desk(tmp_path).store, logins=True)
    assert desk.name("", "ada") == desk.name("ada", "ada") == "ada"
    with pytest.raises(ValueError, match="signed in as ada, so you cannot judge as bob"):
        desk.name("bob", "ada")
    with pytest.raises(ValueError, match="Sign in first"):
        desk.name("bob", None)
    with pytest.raises(ValueError, match="A rater needs a name"):
        Desk(desk.store).name(" ", None)


# --- the page, served --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, pretend_tuner: Any) -> Iterator[tuple[str, JudgmentStore]]:
    folder = tmp_path_factory.mktemp("served")
    with _page(folder, pretend_tuner) as (address, store):
        yield address, store


def test_the_api_takes_verdicts_from_another_program(served: tuple[str, JudgmentStore]) -> None:
    address, store = served
    client = Client(address, verbose=False)
    assert set(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == {
        "/next_pair",
        "/vote",
        "/undo",
        "/progress",
    }
    pair = client.predict("robot", api_name="/next_pair")
    assert set(pair) == {"showing", "prompt", "first", "second"}
    assert client.predict("robot", api_name="/next_pair") == pair
    following = client.predict("robot", pair["showing"], "both bad", api_name="/vote")
    assert following["showing"] != pair["showing"]
    assert client.predict("robot", api_name="/progress")["verdicts"] == 1
    assert client.predict("robot", api_name="/undo") == pair
    client.predict("robot", pair["showing"], "tie", api_name="/vote")
    (judged,) = [record for record in store.showings() if record.choice is not None]
    assert (judged.rater, judged.choice) == ("robot", Choice.TIE)


@pytest.mark.parametrize(
    ("endpoint", "arguments", "message"),
    [
        ("/vote", ["robot", 10**6, "tie"], "showing 1000000 was not given to rater"),
        (
            "/vote",
            ["robot", 1, "left"],
            "choice must be one of 'first', 'second', 'tie', 'both bad', 'abstain', got 'left'",
        ),
        ("/next_pair", [""], "A rater needs a name"),
        ("/next_pair", ["x" * 41], "a name must have 1 to 40"),
        ("/undo", ["somebody new"], "You have nothing to undo"),
    ],
)
def test_the_api_says_in_a_sentence_what_does_not_fit(
    served: tuple[str, JudgmentStore], endpoint: str, arguments: list[Any], message: str
) -> None:
    with pytest.raises(AppError, match=message):
        Client(served[0], verbose=False).predict(*arguments, api_name=endpoint)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../../../etc/passwd",
        "/gradio_api/file=%2Fetc%2Fpasswd",
        "/gradio_api/file=file:///etc/passwd",
        "/gradio_api/file=http://example.com/",
        "/gradio_api/proxy=http://example.com/",
        "/file=/etc/passwd",
        "/static/../../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/assets/..%2f..%2f..%2fetc/passwd",
        "/gradio_api/file={run}/judgments.sqlite",
        "/gradio_api/file={cwd}/pyproject.toml",
    ],
)
def test_no_file_of_the_machine_can_be_read(served: tuple[str, JudgmentStore], path: str) -> None:
    address, store = served
    run = Path(str(store._database.name)).parent
    answer = _get(address, path.format(run=run, cwd=Path.cwd()))
    assert answer.status_code in (400, 403, 404), answer.text
    assert "root:" not in answer.text


def test_nothing_can_be_uploaded_and_no_other_site_is_asked_for_anything(served: tuple[str, JudgmentStore]) -> None:
    address, _ = served
    files = {"files": ("x.txt", b"x")}
    assert httpx.post(f"{address}gradio_api/upload", files=files, trust_env=False).status_code == 404
    page = _get(address, "/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "fonts.googleapis" not in page.text
    config = _get(address, "/config").json()
    assert config["run_history"] is False
    assert config["analytics_enabled"] is False


def test_another_name_for_this_machine_is_refused(served: tuple[str, JudgmentStore]) -> None:
    address, _ = served
    assert httpx.get(address, headers={"Host": "evil.example"}, trust_env=False).status_code == 403
    assert httpx.get(address, headers={"Host": "localhost:1"}, trust_env=False).status_code == 200


def test_where_there_are_passwords_nobody_gets_in_without_one(tmp_path: Path, pretend_tuner: Any) -> None:
    with _page(tmp_path, pretend_tuner, auth=sign_in(None, {"ada": "secret"})) as (address, store):
        assert _get(address, "/config").status_code == 401
        assert _get(address, "/gradio_api/file=/etc/passwd").status_code == 401
        assert httpx.post(f"{address}gradio_api/queue/join", json={}, trust_env=False).status_code in (401, 422)
        for name, password in (("ada", "wrong"), ("bob", "secret"), ("", ""), ("ada", "")):
            data = {"username": name, "password": password}
            assert httpx.post(f"{address}login", data=data, trust_env=False).status_code in (400, 422)
        client = Client(address, auth=("ada", "secret"), verbose=False)
        pair = client.predict("", api_name="/next_pair")
        client.predict("ada", pair["showing"], "first", api_name="/vote")
        with pytest.raises(AppError, match="signed in as ada"):
            client.predict("bob", api_name="/next_pair")
        assert {record.rater for record in store.showings()} == {"ada"}


def test_another_site_cannot_vote_with_the_cookie_of_somebody_who_has_signed_in(
    tmp_path: Path, pretend_tuner: Any
) -> None:
    with _page(tmp_path, pretend_tuner, auth=sign_in(None, {"ada": "secret"})) as (address, store):
        own = address.rstrip("/")
        with httpx.Client(base_url=address, trust_env=False) as browser:
            assert browser.post("login", data={"username": "ada", "password": "secret"}).status_code == 200
            pair = browser.post("gradio_api/run/next_pair", json={"data": ["ada"]}, headers={"Origin": own})
            vote = {"data": ["ada", pair.json()["data"][0]["showing"], "first"]}
            for origin in ("https://evil.example", "http://127.0.0.1:1", "null"):
                foreign = {"Origin": origin}
                answer = browser.post("gradio_api/run/vote", json=vote, headers=foreign)
                assert answer.status_code == 403, origin
                named = {**foreign, "X-Forwarded-Host": "evil.example", "Content-Type": "text/plain"}
                assert browser.post("gradio_api/run/vote", content=json.dumps(vote), headers=named).status_code == 403
            assert all(record.choice is None for record in store.showings())
            assert browser.post("gradio_api/run/vote", json=vote, headers={"Origin": own}).status_code == 200
            assert [str(record.choice) for record in store.showings() if record.choice is not None] == ["first"]


@pytest.mark.parametrize(
    ("method", "headers", "foreign"),
    [
        ("POST", {"host": "judge.example"}, False),  # no browser
        ("POST", {"host": "judge.example", "origin": "https://judge.example"}, False),
        # A proxy that drops the port.
        ("POST", {"host": "judge.example", "origin": "https://judge.example:8443"}, False),
        ("POST", {"host": "judge.example:7860", "origin": "http://judge.example:7860"}, False),
        ("POST", {"host": "localhost:7860", "origin": "http://localhost:3000"}, True),
        ("POST", {"host": "judge.example", "origin": "https://evil.example"}, True),
        ("POST", {"host": "judge.example", "origin": "null"}, True),
        # A proxy that knows the page by another name.
        ("POST", {"host": "10.0.0.7", "origin": "https://judge.example", "sec-fetch-site": "same-origin"}, False),
        ("POST", {"host": "judge.example", "origin": "https://judge.example", "sec-fetch-site": "cross-site"}, True),
        ("GET", {"host": "judge.example", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, False),
        ("POST", {"host": "judge.example", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, True),
        ("GET", {"host": "judge.example", "sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}, True),
        ("GET", {"host": "judge.example", "sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, False),
    ],
)
def test_who_is_another_site(method: str, headers: dict[str, str], foreign: bool) -> None:
    assert is_foreign(method, Headers(headers)) == foreign


def test_with_one_password_for_all_a_rater_chooses_a_name() -> None:
    check = sign_in("open sesame", {})
    assert check is not None
    assert check("anybody", "open sesame")
    assert not check("anybody", "open")
    assert not check("", "open sesame")
    assert not check("x" * 41, "open sesame")
    assert sign_in(None, {}) is None


def test_a_file_of_users_is_read_and_what_is_wrong_with_it_is_said(tmp_path: Path) -> None:
    file = tmp_path / "users.txt"
    file.write_text("# raters\nada:se:cret\n\nbob:x\n")
    assert read_users(file) == {"ada": "se:cret", "bob": "x"}
    for content, message in (
        ("ada", "line 1: expected name:password"),
        ("ada:x\nada:y", "line 2: the name 'ada' occurs twice"),
        ("\n", "names nobody"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_users(file)


def test_only_this_machine_s_own_addresses_are_local() -> None:
    assert all(map(is_local, ("127.0.0.1", "localhost", "::1", "[::1]", "127.0.0.2")))
    assert not any(map(is_local, ("0.0.0.0", "192.168.1.2", "example.com", "127.0.0.1.example.com", "", "::")))


# --- the command -------------------------------------------------------------------------------------------------------


def test_the_built_in_prompts_are_words_that_the_embedded_model_knows() -> None:
    known = set(json.loads((REVIEWER / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    prompts = built_in_prompts()
    assert len(set(prompts)) == len(prompts) > 40
    assert {word for prompt in prompts for word in prompt.split()} <= known


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\n\n two \none\n"),
        ("a.jsonl", '{"prompt": "one"}\n{"prompt": "two"}\n'),
        ("a.csv", "id,prompt\n1,one\n2,two\n"),
        ("a.tsv", "id\tprompt\n1\tone\n2\ttwo\n"),
        ("a.json", '[{"prompt": "one"}, {"prompt": "two"}]'),
    ],
)
def test_prompts_are_read_from_text_and_tables(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert read_prompts(tmp_path / name) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n", "holds no prompt"),
        ("a.md", "x", "expected a .txt file with one prompt per line"),
        ("a.csv", "text\nx\n", "no column 'prompt'"),
        ("a.jsonl", '{"prompt": 3}\n', "prompt 1: expected a text, found 3"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": " "}\n', "prompt 2: expected a text, found ' '"),
    ],
)
def test_what_is_wrong_with_a_file_of_prompts_is_said(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "lets other machines in, so it needs --password, or --users FILE"),
        (["--host", "198.51.100.7", "--password", "x"], "--host 198.51.100.7 is not an address of this machine"),
        (["--port", "99999"], "--port 99999: expected 1 to 65535"),
        (["--port", "0"], "--port 0: expected 1 to 65535"),
        (["--password", "open sesame", "--users", "users.txt"], "leave one of them out"),
        (["--epsilon", "abc"], "epsilon must be a positive number or 'auto', got 'abc'"),
        (["--model", "/no/such/model"], "there is no such folder"),
        (["--model", str(REVIEWER)], "--prompts is required with --model"),
        (["--prompts", "none.txt"], "there is no file 'none.txt'"),
        (["--guidelines", "none.txt"], "there is no such file"),
        (["--votes_per_pair", "0"], "votes_per_pair must be a whole number of at least 1"),
        (["--vote_per_pair", "2"], "unknown flag --vote_per_pair; did you mean '--votes_per_pair'?"),
    ],
)
def test_a_flag_that_does_not_fit_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["judge", "--run", str(tmp_path / "run"), "--no_browser", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_in_use_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["judge", "--run", str(tmp_path / "run"), "--no_browser", "--port", port]) == 2
    assert f"--port {port} is in use; choose another, or leave --port out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("epsilon", "abc", "a positive number or 'auto'"),
        ("epsilon", "-0.1", "a positive number or 'auto'"),
        ("epsilon", "inf", "a positive number or 'auto'"),
        ("learning_rate", -1.0, "a positive number"),
        ("learning_rate", math.inf, "a positive number"),
        ("temperature", 0.0, "a positive number"),
        ("temperature", math.nan, "a positive number"),
        ("brake", -1.0, "0 or a positive number"),
        ("max_drift", -1.0, "0 or a positive number"),
        ("max_drift", math.nan, "0 or a positive number"),
        ("comparisons_per_step", -3, "at least 0"),
        ("prompts_per_step", 0, "at least 1"),
        ("directions", 0, "at least 1"),
        ("max_completion_length", 0, "at least 1"),
        ("seed", -1, "in 0 … 2⁶³−1"),
    ],
)
def test_settings_out_of_their_range_are_refused_before_anything_starts(
    setting: str, value: object, expected: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{setting} must be {expected}, got {value!r}")):
        JudgeSettings("model", ["one"], **{setting: value})  # type: ignore[arg-type]


def test_a_run_goes_on_as_it_was_begun_and_refuses_to_be_another(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    run = tmp_path / "run"
    begun = judge.make_settings(run, {"prompts": str(prompts), "prompts_per_step": 7})
    begun.write(run)
    assert judge.make_settings(run, {}) == begun == JudgeSettings(str(REVIEWER), ["one", "two"], prompts_per_step=7)
    judge.make_settings(run, {"prompts": str(prompts)}).write(run)
    prompts.write_text("three\n")
    for given_now, name in (({"prompts": str(prompts)}, "prompts"), ({"seed": 3}, "seed")):
        with pytest.raises(ValueError, match=f"holds a run with other {name}.*choose another --run folder"):
            judge.make_settings(run, given_now).write(run)


def test_a_child_that_ends_is_started_again_and_the_reason_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    starts = tmp_path / "starts"
    program = f"open({str(starts)!r}, 'a').write('x'); print('out of <luck>', flush=True); raise SystemExit(3)"
    supervisor = Supervisor([sys.executable, "-c", program], tmp_path / "log", told.append, first_pause=0.01)
    supervisor.start()
    _until(lambda: len(told) >= 3)
    supervisor.stop()
    assert told[0] == "It ended unexpectedly (exit status 3): out of <luck>. Restarting in 0 s."
    assert starts.read_text().startswith("xxx")


def test_a_child_is_ended_with_us_and_that_is_no_failure(tmp_path: Path) -> None:
    told: list[str] = []
    supervisor = Supervisor([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", told.append)
    supervisor.start()
    _until(lambda: supervisor.pid is not None)
    supervisor.stop()
    supervisor.stop()
    assert supervisor.pid is None
    assert told == []


def test_the_command_serves_a_page_keeps_a_tuner_beside_it_and_ends_both_when_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    port = _free_port()
    child = (
        "import os, pathlib, sys, time; pathlib.Path(sys.argv[2], 'pid').write_text(str(os.getpid())); time.sleep(60)"
    )
    program = (
        f"import sys; from zorl.apps import judge, cli; judge.TUNER = (sys.executable, '-c', {child!r}, '--run')\n"
        f"sys.exit(cli.main(['judge', '--run', {str(run)!r}, '--port', '{port}', '--no_browser']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        _until(lambda: (run / "pid").exists() and (run / "pid").read_text() != "", 60)
        tuner = int((run / "pid").read_text())
        assert _get(f"http://127.0.0.1:{port}", "/config").status_code == 200
        with pytest.raises(ValueError, match="another zorl judge has"):
            judge.run(["--run", str(run), "--no_browser"])
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert f"judge at http://127.0.0.1:{port}/" in err
    assert f"Every verdict is kept in {run}" in out
    with pytest.raises(ProcessLookupError):
        os.kill(tuner, 0)
    assert JudgmentStore(run / "judgments.sqlite").tuner()["state"] == "stopped"


def test_the_page_alone_serves_the_questions_of_a_trainer(tmp_path: Path) -> None:
    run, port, found = tmp_path / "run", _free_port(), []
    command = [sys.executable, "-m", "zorl.apps.cli", "judge", "--run", str(run), "--port", str(port), "--page_only"]
    process = subprocess.Popen([*command, "--no_browser"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        _until(lambda: _answers(port), 60)
        alone = JudgmentStore(run / "judgments.sqlite").tuner()
        assert alone["state"] == "unconnected"
        assert alone["message"] == f"Start: zorl train --judge human --judgments {run / 'judgments.sqlite'} …"
        people = HumanJudge(run / "judgments.sqlite", poll_seconds=0.05)
        asking = threading.Thread(target=lambda: found.extend(people(["p"], ["one"], ["two"], request_id="1")))
        asking.start()

        def call(name: str, *data: Any) -> Any:
            return httpx.post(f"http://127.0.0.1:{port}/gradio_api/run/{name}", json={"data": data}).json()["data"][0]

        _until(lambda: call("next_pair", "ann") is not None)
        pair = call("next_pair", "ann")
        call("vote", "ann", pair["showing"], "second")
        asking.join(20)
    finally:
        process.terminate()
        out, _ = process.communicate(timeout=30)
    assert f"zorl judge --page_only --run {run} continues" in out
    assert found == [Choice.FIRST if pair["second"] == "one" else Choice.SECOND]
    (run / "judge.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run that zorl judge tunes; leave out --page_only"):
        judge.run(["--run", str(run), "--page_only", "--no_browser"])


# --- helpers -------------------------------------------------------------------------------------------------------------


def _progress(state: str = "waiting", message: str = "", **figures: int) -> Progress:
    counts = dict.fromkeys(
        ("steps", "votes_needed", "votes_given", "votes_skipped", "votes_held", "open_pairs", "verdicts", "raters"), 0
    )
    return Progress(**(counts | figures), can_undo=False, tuner={"state": state, "message": message})


def _desk(folder: Path) -> Desk:
    store = JudgmentStore(folder / "judgments.sqlite", comparison_share=0, repeat_share=0)
    store.add_probe([NewPair(0, row, *text) for row, text in enumerate(TEXTS)], key="first")
    return Desk(store)


def _shown(showing: Showing | None) -> Showing:
    assert showing is not None
    return showing


@contextmanager
def _page(
    folder: Path, tuner: Any, auth: Callable[[str, str], bool] | None = None
) -> Iterator[tuple[str, JudgmentStore]]:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Gradio leaves event loops to the garbage collector
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "scratch" / "served"))
        (folder / "run").mkdir()
        (folder / "scratch").mkdir()
        store = JudgmentStore(folder / "run" / "judgments.sqlite", comparison_share=0, repeat_share=0)
        tuner(folder / "run" / "judgments.sqlite", TEXTS).work()
        page = Page(store, JudgeSettings("m", ["the drama was"]), folder / "run", folder / "scratch", auth=auth)
        address = page.open(port=_free_port())
        try:
            yield address, store
        finally:
            page.close()
            store.close()
            del page
            gc.collect()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _get(address: str, path: str) -> httpx.Response:
    """The path goes out as it is written: a browser would resolve its dots, an attacker does not."""
    request = httpx.Request("GET", address)
    request.url = request.url.copy_with(raw_path=path.encode())
    with httpx.Client(trust_env=False) as client:
        return client.send(request)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)
