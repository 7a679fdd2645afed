"""What holds of a judgment store on PostgreSQL alone: the server's own ways to fail, passwords, and machines that share it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from zorl.apps import judge
from zorl.apps.cli import main
from zorl.apps.judge_settings import JudgeSettings
from zorl.probe import Choice
from zorl.rewards import HumanJudge, load_judge
from zorl.rewards.judgment_store import JudgmentStore, NewPair, StoredStep
from zorl.rewards.judgment_url import shown, split_password, store_url

PAIRS = [NewPair(0, row, f"prompt {row}", "plus", "minus") for row in range(4)]
PLAIN = {"repeat_share": 0.0, "comparison_share": 0.0}
SECRET = "pa55word"
Call = Callable[..., Any]


@pytest.fixture
def url(postgres: Any) -> str:
    return str(postgres.new_database())


@pytest.fixture
def store(url: str) -> Iterator[JudgmentStore]:
    with JudgmentStore(url, **PLAIN) as opened:
        yield opened


def verdict(store: JudgmentStore, rater: int) -> int:
    """Gives one; returns its showing."""
    showing = store.next_pair(rater)
    assert showing is not None
    store.vote(showing.id, rater, Choice.FIRST)
    return showing.id


# --- transactions ---------------------------------------------------------------------------------------------------------


def test_a_commit_is_on_disk_whatever_the_server_is_set_to(postgres: Any, url: str) -> None:
    database = store_url(url).database
    for setting in ("synchronous_commit = off", "default_transaction_isolation = 'serializable'"):
        postgres.run(f"ALTER DATABASE {database} SET {setting}")
    with JudgmentStore(url) as store:
        asked = []
        for transaction in (store._database.reading(), store._database.writing()):
            with transaction as connection:
                for name in ("synchronous_commit", "transaction_isolation", "transaction_read_only"):
                    asked.append(connection.exec_driver_sql(f"SHOW {name}").scalar())
    assert asked == ["on", "repeatable read", "on", "on", "read committed", "off"]


def test_a_reader_sees_one_state_and_waits_for_nobody(store: JudgmentStore) -> None:
    with store._database.reading() as connection:
        count = "SELECT count(*) FROM probes"
        before = connection.exec_driver_sql(count).scalar()
        store.add_probe(PAIRS, key="a")
        assert connection.exec_driver_sql(count).scalar() == before == 0
    with store._database.writing():
        assert store.probes_written() == 1


def test_a_writer_that_is_cut_off_leaves_nothing_and_no_lock(store: JudgmentStore, url: str, postgres: Any) -> None:
    def write_half() -> None:
        with store._database.writing() as connection:
            connection.exec_driver_sql("INSERT INTO raters (name, created) VALUES ('half', 0)")
            backend = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
            postgres.run(f"SELECT pg_terminate_backend({backend})")
            connection.exec_driver_sql("SELECT 1")

    with pytest.raises(
        ConnectionError, match=r"^the judgment store 'postgresql://zorl:\*\*\*@/judgments_\d+' does not ans"
    ):
        write_half()
    with JudgmentStore(url) as other:
        assert other.rater("whole") > 0
    assert postgres.run("SELECT name FROM raters", store_url(url).database) == [("whole",)]
    assert store.rater("whole") > 0  # the store that was cut off goes on


def test_verdicts_outlive_a_server_that_crashes_and_the_store_goes_on_when_it_is_back(
    store: JudgmentStore, postgres: Any
) -> None:
    ann = store.rater("Ann")
    probe = store.add_probe(PAIRS, key="a").id
    given = [verdict(store, ann) for _ in range(3)]
    postgres.crash()
    try:
        for call in (store.progress, lambda: store.next_pair(ann), lambda: store.set_tuner("waiting")):
            with pytest.raises(ConnectionError, match="does not answer: .*No such file or directory"):
                call()
        judge._tell_store(store, "failed", "nobody hears it")
    finally:
        postgres.start()
    assert [record.showing for record in store.showings() if record.choice is not None] == given
    verdict(store, ann)
    assert len(store.close_decided(probe) or []) == 4


def test_one_process_makes_the_steps(store: JudgmentStore, url: str) -> None:
    with JudgmentStore(url) as other:
        with store.tuning():
            with (
                pytest.raises(ValueError, match="another process is making the steps of the judgment store"),
                other.tuning(),
            ):
                pass
            other.add_probe(PAIRS, key="a")  # pages go on
        with other.tuning():
            pass


def test_who_has_lost_the_claim_makes_no_more_steps(store: JudgmentStore, url: str, postgres: Any) -> None:
    with JudgmentStore(url) as other, store.tuning():
        probe = store.add_probe(PAIRS, key="a").id
        postgres.crash()
        postgres.start()
        store.set_tuner("generating")  # its other connections are opened anew
        with other.tuning():
            for act in (
                lambda: store.add_probe(PAIRS, key="b"),
                lambda: store.commit_step(StoredStep(0, probe, 0.1, (1,), (1.0,), (1.0,))),
            ):
                with pytest.raises(ConnectionError, match="does not answer|has ended this process's right"):
                    act()
        assert other.probes_written() == 1


def test_a_run_asks_and_people_answer_from_elsewhere(url: str) -> None:
    asking = load_judge("human", judgments=url)
    assert isinstance(asking, HumanJudge)
    found: list[Choice] = []
    thread = threading.Thread(target=lambda: found.extend(asking(["p"], ["one"], ["two"], request_id="1")))
    thread.start()
    with JudgmentStore(url) as page:
        ann = page.rater("Ann")
        until(lambda: page.next_pair(ann) is not None)
        showing = page.next_pair(ann)
        assert showing is not None
        page.vote(showing.id, ann, Choice.SECOND)
        thread.join(20)
    asking.store.close()
    assert found == [Choice.SECOND if showing.second == "two" else Choice.FIRST]


# --- what cannot be opened ------------------------------------------------------------------------------------------------


def test_a_database_of_somebody_else_is_refused_and_left_alone(postgres: Any, url: str) -> None:
    database = store_url(url).database
    postgres.run("CREATE TABLE recipes (id integer)", database)
    with pytest.raises(
        ValueError, match=f"'postgresql://zorl:.*/{database}' is not a judgment store: .* the tables recipes"
    ):
        JudgmentStore(url)
    assert postgres.run("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", database) == [("recipes",)]


def test_a_database_that_cannot_keep_every_character_is_refused(postgres: Any) -> None:
    with pytest.raises(ValueError, match="its encoding is LATIN1.*createdb --encoding UTF8"):
        JudgmentStore(postgres.new_database("ENCODING 'LATIN1' TEMPLATE template0"))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("postgresql://zorl:pa55word@127.0.0.1:1/x", "cannot open the judgment store 'postgresql://zorl:***@127.0.0.1:1/x': "),
        ("postgresql://zorl@127.0.0.1:1/x?password=pa55word", "'postgresql://zorl@127.0.0.1:1/x': .*Connection refused"),
        ("postgresql://zorl:pa55word@host:port/x", "that is not the URL of a database"),
        ("postgresql://zorl:b@pa55word@host/x", "in a password @ is written %40"),
        ("mysql://zorl:pa55word@host/x", "cannot open 'mysql://zorl:***@host/x': judgments are kept in an SQLite file or"),
        ("postgresql://zorl:pa55word@/nowhere?host=HOST", "password authentication failed"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_sentence_without_the_password(
    postgres: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str, expected: str
) -> None:
    address, start = address.replace("HOST", str(postgres.folder)), time.monotonic()
    run = tmp_path / "run"
    pattern = expected.replace("***", "\\*\\*\\*")
    with pytest.raises(ValueError, match=pattern) as raised:
        JudgmentStore(address)
    assert main(["judge", "--run", str(run), "--no_browser", "--database", address]) == 2
    told = capsys.readouterr().err
    assert SECRET not in f"{raised.value} {told}"
    assert told.count("\n") == 1
    assert "\n" not in str(raised.value)
    assert not (run / "judge.json").exists()
    assert time.monotonic() - start < 10


def test_a_server_that_is_there_is_refused_without_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(
        ValueError, match=r"'postgresql://h/x': PostgreSQL needs the driver psycopg; pip install 'psycopg\[binary\]'"
    ):
        JudgmentStore("postgresql://h/x")


@pytest.mark.parametrize(
    ("address", "saved", "password", "name"),
    [
        ("postgresql://u:a%40%2Fb@h:5433/d?sslmode=require", "postgresql://u@h:5433/d?sslmode=require", "a@/b",
         "postgresql://u:***@h:5433/d"),
        ("postgres://u@h/d?password=x&host=/run", "postgresql://u@h/d?host=%2Frun", "x", "postgresql://u@h/d"),
        ("postgresql+psycopg2://h/d", "postgresql://h/d", None, "postgresql://h/d"),
    ],
)  # fmt: skip
def test_the_password_is_split_off(address: str, saved: str, password: str | None, name: str) -> None:
    assert split_password(address) == (saved, password)
    assert shown(store_url(address)) == name


@pytest.mark.parametrize(
    "address", ["judgments.sqlite", "sqlite:///judgments.sqlite", "postgresql://h/d?sslpassword=x"]
)
def test_what_cannot_be_kept_as_a_database_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="--database"):
        split_password(address)


# --- page and tuner -------------------------------------------------------------------------------------------------------


TUNER = """
import sys, time
from pathlib import Path
from zorl.apps.judge_settings import JudgeSettings
from zorl.rewards.judgment_store import JudgmentStore, NewPair, StoredStep
run = Path(sys.argv[2])
store = JudgmentStore(JudgeSettings.read(run).store(run))
with store.tuning():
    probe = store.add_probe([NewPair(0, row, f"prompt {row}", "plus", "minus") for row in range(3)], key="a")
    while store.close_decided(probe.id) is None:
        time.sleep(0.05)
    store.commit_step(StoredStep(0, probe.id, 0.5, (1,), (0.0,), (0.0,), {}))
    time.sleep(60)
"""


def test_page_and_tuner_meet_on_the_server_and_the_password_is_in_no_file(postgres: Any, tmp_path: Path) -> None:
    """`zorl judge` with a tuner that has no model to load, in a process of its own as the real one, and a rater on the API."""
    run, url = tmp_path / "run", postgres.new_database()
    with JudgmentStore(url, **PLAIN) as store:
        with judging(run, "--database", url) as call:
            vote_until(call, lambda: len(store.steps()) == 1)
        assert store.tuner()["message"] == "zorl judge is not running."
        assert [record.choice for record in store.showings()] == [Choice.FIRST] * 3
    kept = JudgeSettings.read(run)
    assert kept.database == split_password(url)[0]
    assert judge.make_settings(run, {}) == kept
    assert not (run / "judgments.sqlite").exists()
    for file in run.rglob("*"):
        held = file.read_bytes() if file.is_file() else b""
        assert not any(secret.encode() in held for secret in (postgres.PASSWORD, postgres.IN_A_URL)), file


def test_the_judgments_of_another_run_are_refused(store: JudgmentStore, url: str, tmp_path: Path) -> None:
    store.add_probe(PAIRS, key="a")
    with pytest.raises(ValueError, match="holds the judgments of another run; choose another database, or the folder"):
        judge.run(["--run", str(tmp_path / "run"), "--no_browser", "--database", url])
    assert "PGPASSWORD" not in os.environ


# --- helpers --------------------------------------------------------------------------------------------------------------


@contextmanager
def judging(run: Path, *flags: str) -> Iterator[Call]:
    """`zorl judge` in a process of its own, for a block; gives what calls its API."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = (
        f"import sys; from zorl.apps import cli, judge; judge.TUNER = (sys.executable, '-c', {TUNER!r}, '--run')\n"
        "sys.exit(cli.main(['judge', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", program, "--run", str(run), "--port", str(port), "--no_browser"]
    process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, stdout=subprocess.PIPE)

    def call(name: str, *data: Any) -> Any:
        answer = client.post(f"http://127.0.0.1:{port}/gradio_api/run/{name}", json={"data": data}, timeout=20)
        return answer.json()["data"][0] if answer.is_success else None

    def serves() -> bool:
        assert process.poll() is None, process.communicate()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        with httpx.Client(trust_env=False) as client:
            until(serves)
            yield call
    finally:
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=30)
    assert process.returncode == 0, said


def vote_until(call: Call, condition: Callable[[], bool]) -> None:
    """Judges on the page until something holds."""

    def one_more() -> bool:
        pair = call("next_pair", "ann")
        if pair is not None:
            call("vote", "ann", pair["showing"], "first")
        return condition()

    until(one_more)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)
