"""The `zorl judge` command around the page, and what keeps the tuner running."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from judging_pages import answers, free_port, get, until

from zorl.apps import judge
from zorl.apps.cli import main
from zorl.apps.embedded import REVIEWER
from zorl.apps.judge_prompts import built_in_prompts, read_prompts
from zorl.apps.judge_settings import JudgeSettings
from zorl.apps.supervisor import Supervisor
from zorl.probe import Choice
from zorl.rewards import HumanJudge
from zorl.rewards.judgment_store import JudgmentStore


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
    until(lambda: len(told) >= 3)
    supervisor.stop()
    assert told[0] == "It ended unexpectedly (exit status 3): out of <luck>. Restarting in 0 s."
    assert starts.read_text().startswith("xxx")


def test_a_child_is_ended_with_us_and_that_is_no_failure(tmp_path: Path) -> None:
    told: list[str] = []
    supervisor = Supervisor([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", told.append)
    supervisor.start()
    until(lambda: supervisor.pid is not None)
    supervisor.stop()
    supervisor.stop()
    assert supervisor.pid is None
    assert told == []


def test_the_command_serves_a_page_keeps_a_tuner_beside_it_and_ends_both_when_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    port = free_port()
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
        until(lambda: (run / "pid").exists() and (run / "pid").read_text() != "", 60)
        tuner = int((run / "pid").read_text())
        assert get(f"http://127.0.0.1:{port}", "/config").status_code == 200
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
    run, port, found = tmp_path / "run", free_port(), []
    command = [sys.executable, "-m", "zorl.apps.cli", "judge", "--run", str(run), "--port", str(port), "--page_only"]
    process = subprocess.Popen([*command, "--no_browser"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        until(lambda: answers(port), 60)
        alone = JudgmentStore(run / "judgments.sqlite").tuner()
        assert alone["state"] == "unconnected"
        assert alone["message"] == f"Start: zorl train --judge human --judgments {run / 'judgments.sqlite'} …"
        people = HumanJudge(run / "judgments.sqlite", poll_seconds=0.05)
        asking = threading.Thread(target=lambda: found.extend(people(["p"], ["one"], ["two"], request_id="1")))
        asking.start()

        def call(name: str, *data: Any) -> Any:
            return httpx.post(f"http://127.0.0.1:{port}/gradio_api/run/{name}", json={"data": data}).json()["data"][0]

        until(lambda: call("next_pair", "ann") is not None)
        pair = call("next_pair", "ann")
        call("vote", "ann", pair["showing"], "second")
        asking.join(20)
        said = people.store.tuner()
        assert said["state"] == "generating"
    finally:
        process.terminate()
        out, _ = process.communicate(timeout=30)
    assert f"zorl judge --page_only --run {run} continues" in out
    assert people.store.tuner()["state"] == "generating", "the trainer goes on, and other pages may be open"
    assert found == [Choice.FIRST if pair["second"] == "one" else Choice.SECOND]
    (run / "judge.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run that zorl judge tunes; leave out --page_only"):
        judge.run(["--run", str(run), "--page_only", "--no_browser"])
