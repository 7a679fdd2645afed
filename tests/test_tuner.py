"""The process that tunes while people judge: every verdict counts once, whatever is killed, and the store is the truth."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
import torch

from zorl.apps.cli import main
from zorl.apps.judge_settings import JudgeSettings
from zorl.apps.learning import Replay
from zorl.apps.store_trajectory import follow_store
from zorl.apps.tuner import Tuner
from zorl.generation import Generation
from zorl.models import load_model
from zorl.output_bias import add_output_bias
from zorl.parameters import ParameterSet, select
from zorl.perturbation import Scratch
from zorl.probe import CENTRE, Choice
from zorl.prompts import Prompt
from zorl.replay import replay
from zorl.rewards.judgment_store import AlreadyClosed, JudgmentStore, StoredStep
from zorl.rewards.judgment_tables import pairs
from zorl.rewards.judgment_url import split_password
from zorl.trajectory import Record, Trajectory, read

PROMPTS = ["the film was", "a great", "the user asked", "who wrote the book?", "an odd ending", "it was"]
Kind = Callable[[str], Any]


@pytest.fixture(params=["direct", "replay"])
def run(request: pytest.FixtureRequest, parts: Kind, tmp_path: Path) -> Path:
    """A run's folder, with a tiny model, for either method."""
    return new_run(parts, tmp_path, request.param)


@pytest.fixture
def direct(parts: Kind, tmp_path: Path) -> Path:
    return new_run(parts, tmp_path, "direct")


def new_run(parts: Kind, folder: Path, method: str, **changes: Any) -> Path:
    some = parts("llama")
    some.model.save_pretrained(folder / "model")
    some.tokenizer.save_pretrained(folder / "model")
    settings(folder, method=method, **changes).write(folder / "run")
    return folder / "run"


def settings(folder: Path, **changes: Any) -> JudgeSettings:
    given = {
        "model": str(folder / "model"), "prompts": PROMPTS, "prompts_per_step": 2, "comparisons_per_step": 1,
        "max_completion_length": 5, "learning_rate": 0.01, "epsilon": "0.1", "max_drift": 0.0, "method": "direct",
        "parameters": ["*"] if changes.get("method", "direct") == "direct" else [], "directions": 2,
    }  # fmt: skip
    return JudgeSettings(**{**given, **changes})


def store_of(run: Path, **options: Any) -> JudgmentStore:
    return JudgmentStore(run / "judgments.sqlite", **options)


@contextmanager
def working(run: Path) -> Iterator[Tuner]:
    """A tuner at work in a thread."""
    tuner, stop = Tuner(run), threading.Event()
    thread = threading.Thread(target=tuner.work, args=(stop,))
    thread.start()
    try:
        yield tuner
    finally:
        stop.set()
        thread.join()


def judge(store: JudgmentStore, until: Callable[[], bool], choose: Callable[[Any], Choice], seconds: float = 60) -> int:
    """Votes as one rater until something holds; returns how many votes."""
    rater, votes, deadline = store.rater("ann"), 0, time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, f"nothing came of {votes} votes: {store.tuner()}"
        showing = store.next_pair(rater)
        if showing is None:
            time.sleep(0.01)
            continue
        try:
            store.vote(showing.id, rater, choose(showing))
            votes += 1
        except AlreadyClosed:
            pass
    return votes


def records_of(step: StoredStep) -> list[Record]:
    own = [Record(step.projected, step.coefficients)] if step.projected else []
    return [*own, *(Record(*each) for each in step.replayed)]


def unpacked(archive: str, folder: Path) -> str:
    shutil.unpack_archive(archive, folder)
    return str(folder)


def shorter(showing: Any) -> Choice:
    return Choice.FIRST if len(showing.first) <= len(showing.second) else Choice.SECOND


def weights_by_replay(run: Path) -> str:
    """SHA-256 of the weights that base and trajectory give."""
    kept = JudgeSettings.read(run)
    model = load_model(kept.model)
    if kept.output_bias:
        add_output_bias(model)
    parameters = ParameterSet(select(model, ["lm_head.bias"] if kept.output_bias else None))
    replay(*read(run / "trajectory.zorl"), parameters)
    return parameters.sha256()


def test_verdicts_make_steps_and_the_trajectory_gives_the_weights(run: Path):
    store = store_of(run, repeat_share=0.0)
    with working(run) as tuner:
        judge(store, lambda: len(store.steps()) >= 5, shorter)
    steps = store.steps()
    assert [step.step for step in steps] == list(range(len(steps)))
    records = [r for step in steps for r in records_of(step)]
    assert any(c != 0.0 for record in records for c in record.coefficients)
    assert tuner.mezo.parameters.sha256() == weights_by_replay(run)
    assert [bytes(record) for record in read(run / "trajectory.zorl")[1]] == [bytes(record) for record in records]
    assert {"verdicts", "updates", "decided_share"} <= steps[-2].figures.keys()
    assert {"drift", "perplexity"} <= steps[-2].figures.keys()


def test_it_works_on_a_server_with_the_password_in_the_environment(
    parts: Kind, tmp_path: Path, postgres: Any, monkeypatch: pytest.MonkeyPatch
):
    url = postgres.new_database()
    database, password = split_password(url)
    monkeypatch.setenv("PGPASSWORD", str(password))
    run = new_run(parts, tmp_path, "direct", database=database)
    with JudgmentStore(url, repeat_share=0.0) as store, working(run) as tuner:
        judge(store, lambda: len(store.steps()) >= 3, shorter)
    tuner.store.close()
    assert tuner.mezo.parameters.sha256() == weights_by_replay(run)
    assert not (run / "judgments.sqlite").exists()


def test_the_step_follows_the_preferred_side(direct: Path):
    """Whoever prefers the plus side throughout gets a step along +z, whichever way round the pairs were shown."""
    store = store_of(direct, repeat_share=0.0, comparison_share=0.0)
    tuner = Tuner(direct)
    while tuner._ask_ahead(2):
        pass
    first = store.open_probes()[0]
    with store._database.reading() as connection:
        plus = {(row.prompt, row.plus, row.minus) for row in connection.execute(sqlalchemy.select(pairs))}
    judge(
        store,
        lambda: store.decided(first.id),
        lambda s: Choice.FIRST if (s.prompt, s.first, s.second) in plus else Choice.SECOND,
    )
    assert tuner._apply_decided()
    (step,) = store.steps()
    assert step.projected[0] < 0.0
    assert step.coefficients[0] > 0.0
    tuner.mezo.close()


def test_zorl_replay_rebuilds_the_model_from_the_trajectory(run: Path, capsys: pytest.CaptureFixture[str]):
    store = store_of(run, repeat_share=0.0)
    with working(run) as tuner:
        judge(store, lambda: len(store.steps()) >= 2, shorter)
    flags = ["--model", tuner.settings.model, "--trajectory", str(run), "--output_dir", str(run.parent / "rebuilt")]
    assert main(["replay", *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights_sha256"] == tuner.mezo.parameters.sha256()


def test_it_goes_on_where_it_was_stopped_and_asks_nothing_twice(run: Path):
    store = store_of(run, repeat_share=0.0)
    with working(run):
        judge(store, lambda: len(store.steps()) >= 2, shorter)
    written, steps = store.probes_written(), len(store.steps())
    tuner = Tuner(run)
    assert tuner.step == steps
    assert tuner.mezo.steps == sum(len(records_of(step)) for step in store.steps())
    assert store.probes_written() == written
    tuner.mezo.close()


def test_a_comparison_is_written_once_and_another_after_going_back(parts: Kind, tmp_path: Path):
    direct = new_run(parts, tmp_path, "direct", learning_rate=0.5)  # so that answers differ
    store = store_of(direct, repeat_share=0.0, comparison_share=0.5)
    with working(direct):
        judge(store, lambda: len(store.steps()) >= 2 and store.has_comparisons(2), shorter)
    written = store.comparisons_written()
    again = Tuner(direct)
    assert again._compare(), "drift is measured"
    assert store.comparisons_written() == written
    again.mezo.close()
    store.rewind(1)
    assert not store.has_comparisons(1)
    back = Tuner(direct)
    assert back._compare()
    assert store.comparisons_written() == written + 1
    with sqlalchemy.create_engine(f"sqlite:///{direct / 'judgments.sqlite'}").connect() as connection:
        shown = connection.execute(sqlalchemy.select(pairs).where(pairs.c.kind == "comparison")).all()
    assert len({(pair.prompt, pair.plus, pair.minus) for pair in shown}) == len(shown), "nobody sees the same again"
    back.mezo.close()


@pytest.mark.parametrize("problem", [torch.OutOfMemoryError("no room"), IndexError("odd")])
def test_a_request_that_fails_is_answered_and_ends_nothing(direct: Path, monkeypatch: Any, problem: Exception):
    store = store_of(direct)

    def fail(*_: Any, **__: Any) -> Any:
        raise problem

    monkeypatch.setattr(Tuner, "_export", fail)
    number = store.request("export_model", {})
    tuner = Tuner(direct)
    assert not tuner._answer_requests()
    assert store.request_result(number) == {"error": f"{type(problem).__name__}: {problem}"}
    assert not store.pending_requests()
    tuner.mezo.close()


def test_a_request_that_killed_the_process_does_not_kill_the_next(direct: Path):
    store = store_of(direct)
    number = store.request("export_model", {})
    assert store.begin_request(number)  # and then, say, the system ran out of memory
    tuner = Tuner(direct)
    assert not tuner._answer_requests()
    result = store.request_result(number)
    assert result is not None
    assert "ended while it carried this out" in result["error"]
    again = store.request("export_model", {})
    assert not tuner._answer_requests()
    assert "path" in (store.request_result(again) or {})
    tuner.mezo.close()


def test_answers_that_never_differ_pause_it(parts: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("zorl.apps.tuner._MOST_UNSEEN", 5)
    run = new_run(parts, tmp_path, "replay", temperature=1e-5)
    store = store_of(run)
    with working(run) as tuner:
        judge(store, lambda: store.tuner()["state"] == "paused", shorter)
        assert len(store.steps()) == 5
        assert "the same answer twice to every prompt" in store.tuner()["message"]
        store.request("go_on", {})
        judge(store, lambda: len(store.steps()) == 10 and bool(tuner.paused), shorter)
        judge(store, lambda: store.tuner()["state"] == "paused" and store.has_comparisons(10), shorter)
        assert store.accepted_drift() is None, "that was not asked"


def test_going_back_gives_the_weights_of_that_step_again(run: Path):
    store = store_of(run, repeat_share=0.0)
    hashes = {}
    with working(run) as tuner:
        for n in (2, 4):
            judge(store, lambda n=n: len(store.steps()) >= n, shorter)  # type: ignore[misc]
    hashes[len(store.steps())] = tuner.mezo.parameters.sha256()
    number = store.request("rewind", {"step": 2})
    again = Tuner(run)
    assert again.work(threading.Event()), "it wants a new Tuner"
    assert store.request_result(number) == {"step": 2}
    back = Tuner(run)
    assert back.step == len(store.steps()) == 2
    assert back.mezo.parameters.sha256() == weights_by_replay(run) not in hashes.values()
    back.mezo.close()
    number = store.request("rewind", {"step": 7})
    last = Tuner(run)
    assert not last._answer_requests()
    assert store.request_result(number) == {"error": "cannot go back to step 7: only 2 steps have been made"}
    last.mezo.close()


def test_requests_are_answered(run: Path):
    store = store_of(run)
    numbers = [store.request("try", {"prompt": "the film was"}), store.request("try", {"prompt": " "})]
    numbers += [store.request("export_model", {}), store.request("sing", {})]
    tuner = Tuner(run)
    assert not tuner._answer_requests()
    tuner.mezo.close()
    tried, empty, export, unknown = (store.request_result(number) for number in numbers)
    assert tried is not None
    assert tried["start"] == tried["current"], "nothing is tuned yet"
    assert empty == {"error": "type a prompt first"}
    assert unknown == {"error": "there is no request 'sing'"}
    assert export is not None
    assert list((run / "export").iterdir()) == [Path(export["path"])], "one file, and no unpacked copy beside it"
    load_model(unpacked(export["path"], run / "unpacked"))


def test_too_much_drift_pauses_until_people_say_go_on(run: Path):
    method = JudgeSettings.read(run).method
    (run / "judge.json").unlink()
    settings(run.parent, max_drift=1e-9, learning_rate=0.1, method=method).write(run)
    store = store_of(run, repeat_share=0.0)
    with working(run):
        judge(store, lambda: store.tuner()["state"] == "paused", shorter)
        assert "above the limit of 1e-09" in store.tuner()["message"]
        drift = float(store.steps()[-1].figures["drift"])
        store.request("go_on", {})
        judge(store, lambda: store.accepted_drift() is not None, shorter)
    assert store.accepted_drift() == pytest.approx(drift + 1e-9, rel=1e-6)
    store.accept_drift(1e9)  # however far the steps went that were made in the meantime
    again = Tuner(run)
    assert again._compare()
    assert not again.paused
    again.mezo.close()


def test_a_probe_that_two_updates_have_overtaken_is_recorded_as_abstained(direct: Path):
    store = store_of(direct, repeat_share=0.0, comparison_share=0.0)
    tuner = Tuner(direct)
    while tuner._ask_ahead(2):
        pass
    first, second = store.open_probes()
    tuner._updates_since = lambda step: 2 * (tuner.step == 1)  # type: ignore[method-assign]
    judge(store, lambda: store.decided(first.id), shorter)
    assert tuner._apply_decided()
    assert tuner._apply_decided()
    assert store.probe(second.id).state in ("withdrawn", "expired")
    assert set(store.steps()[1].coefficients) == {0.0}
    tuner.mezo.close()


def test_every_decided_pair_is_replayed_and_ties_are_not(parts: Kind, tmp_path: Path):
    run = new_run(parts, tmp_path, "replay")
    store = store_of(run, repeat_share=0.0, comparison_share=0.0)
    with working(run) as tuner:
        judge(store, lambda: len(store.steps()) >= 4, lambda s: Choice.TIE if "film" in s.prompt else shorter(s))
    kept = {pair.pair for pair in store.preference_pairs() if pair.probe in {step.probe for step in store.steps()}}
    films = {pair.pair for pair in store.preference_pairs() if "film" in pair.prompt}
    assert isinstance(tuner.learner, Replay)
    assert len(tuner.learner.replay.pairs) == len(kept - films)


def test_the_exported_model_says_what_the_tuned_one_says(parts: Kind, tmp_path: Path):
    run = new_run(parts, tmp_path, "replay")
    tuner = Tuner(run)
    with torch.no_grad():
        tuner.model.lm_head.bias.normal_(0.0, 2.0)
    exported = load_model(unpacked(tuner._export()["path"], tmp_path / "unpacked"))
    said = [
        Generation(Scratch(m, ParameterSet(m.named_parameters())), tuner.tokenizer, Prompt("{prompt}"), max_new_tokens=8)
        .answers([{"prompt": "the film was"}], [CENTRE], noise_seed=1)
        for m in (tuner.model, exported)
    ]  # fmt: skip
    assert said[0] == said[1]
    tuner.mezo.close()


@pytest.mark.parametrize("written", ["longer", "shorter", "other", "damaged", "missing"])
def test_the_trajectory_is_brought_into_line_with_the_store(run: Path, written: str):
    store = store_of(run, repeat_share=0.0)
    with working(run) as tuner:
        judge(store, lambda: len(store.steps()) >= 3, shorter)
    path, steps = run / "trajectory.zorl", store.steps()
    whole = path.read_bytes()
    header, records = read(path)
    if written in ("longer", "shorter", "other"):
        extra = Record(*[(1.0,) * len(records[0].projected)] * 2)
        changed = {"longer": [*records, extra], "shorter": records[:-1], "other": [*records[:-1], extra]}[written]
        path.unlink()
        other = Trajectory.create(path, header)
        for record in changed:
            other.append(record)
        other.close()
    elif written == "damaged":
        path.write_bytes(whole[:-9] + bytes(9))
    else:
        path.unlink()
    again = Tuner(run)
    again.mezo.close()
    assert path.read_bytes() == whole
    assert again.mezo.parameters.sha256() == tuner.mezo.parameters.sha256()
    follow_store(path, header, steps)
    assert path.read_bytes() == whole


def test_killed_at_any_moment_it_uses_every_verdict_once(run: Path):
    """SIGKILL at random points; the weights are those that the committed verdicts make, and no step is missing."""
    store = store_of(run, repeat_share=0.0)
    generator, kills = random.Random(0), 0
    while kills < 3:
        process = subprocess.Popen(
            [sys.executable, "-m", "zorl.apps.tuner", "--run", str(run)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        steps = len(store.steps())
        judge(store, lambda steps=steps: len(store.steps()) > steps + 1, shorter, seconds=120)  # type: ignore[misc]
        moment = time.monotonic() + 0.5 * generator.random()
        judge(store, lambda moment=moment: time.monotonic() > moment, shorter)  # type: ignore[misc]
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    tuner = Tuner(run)
    tuner.mezo.close()
    steps = store.steps()
    assert [step.step for step in steps] == list(range(len(steps)))
    assert len({step.probe for step in steps}) == len(steps), "a probe makes one step"
    assert tuner.mezo.parameters.sha256() == weights_by_replay(run)
    used = sum(step.figures["verdicts"] for step in steps)
    closed = sum(len(store.close_probe(step.probe)) for step in steps if store.probe(step.probe).state == "applied")
    assert used == closed
    assert sum(s.choice is not None and s.kind == "probe" for s in store.showings()) >= used


def test_it_ends_with_the_page_that_was_killed(direct: Path):
    """Also where the page goes before the model is loaded."""
    command = [sys.executable, "-m", "zorl.apps.tuner", "--run", str(direct)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 0
    assert store_of(direct).tuner()["state"] == "stopped"


def test_settings_are_kept_and_others_refused(direct: Path):
    assert json.loads((direct / "judge.json").read_text())["prompts"] == PROMPTS
    settings(direct.parent).write(direct)
    with pytest.raises(
        ValueError, match=r"holds a run with other learning_rate: 0\.01 there, 0\.5 now; choose another"
    ):
        settings(direct.parent, learning_rate=0.5).write(direct)
    with pytest.raises(ValueError, match="holds no judging run: judge.json is missing"):
        Tuner(direct.parent)
    (direct / "judge.json").write_text("{")
    with pytest.raises(ValueError, match="does not hold the settings of a judging run"):
        Tuner(direct)
