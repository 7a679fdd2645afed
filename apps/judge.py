"""`zorl judge`: a page on which people choose the better of two answers, and a model that is tuned by their choices."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from zorl.apps.arguments import JudgeArguments
from zorl.apps.command_line import build, parse
from zorl.apps.commands import JUDGE
from zorl.apps.embedded import REVIEWER
from zorl.apps.inputs import check_model_folder, say
from zorl.apps.judge_prompts import built_in_prompts, read_prompts
from zorl.apps.judge_settings import JudgeSettings
from zorl.apps.page.app import Page
from zorl.apps.page.security import is_local, read_users, sign_in
from zorl.apps.supervisor import Supervisor
from zorl.rewards.judgment_store import JudgmentStore
from zorl.rewards.judgment_url import split_password
from zorl.text_files import read_text

AT_REST = ("stopped", "failed", "silent", "unconnected")  # what a trainer that is not there has said last
TUNER = (sys.executable, "-m", "zorl.apps.tuner", "--run")
STORED = ("votes_per_pair", "lease_seconds", "repeat_share", "comparison_share")  # settings that are kept in the store


def run(argv: Sequence[str]) -> str:
    """Runs the command until it is interrupted, and returns what to print.

    Raises:
        ValueError: an argument does not fit, or the folder or the database holds another run.
        ConnectionError: the database no longer answers.
    """
    given = parse(JUDGE, argv)
    arguments = build(JudgeArguments, given)
    if arguments.password is not None and arguments.users is not None:
        raise ValueError(
            "--password is one password for all and --users gives each rater their own: leave one of them out"
        )
    users = {} if arguments.users is None else read_users(Path(arguments.users))
    auth = sign_in(arguments.password, users)
    if not is_local(arguments.host) and auth is None:
        raise ValueError(
            f"--host {arguments.host} lets other machines in, so it needs --password, or --users FILE with lines "
            "name:password"
        )
    _check_address(arguments.host, arguments.port)
    guidelines = None if arguments.guidelines is None else _read_guidelines(Path(arguments.guidelines))
    folder = Path(arguments.run).expanduser()
    password = None
    if arguments.database is not None:
        given["database"], password = split_password(arguments.database)
    settings = _of_another_process(folder, given) if arguments.page_only else make_settings(folder, given)
    folder.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = {name: given[name] for name in STORED if name in given}
    with (
        _claimed(folder),
        _environment(password) as scratch,
        JudgmentStore(settings.store(folder), **kept) as store,
    ):
        if not arguments.page_only:
            _refuse_judgments_of_another_run(store, settings, folder)
            settings.write(folder)
        if not arguments.page_only:
            store.set_tuner("starting")
        elif store.tuner()["state"] in AT_REST:  # else a trainer is at work, and other pages may be open
            store.set_tuner("unconnected", _start_trainer(settings, folder))
        page = Page(store, settings, folder, scratch, auth=auth, guidelines=guidelines, page_only=arguments.page_only)
        tuner = Supervisor([*TUNER, str(folder)], folder / "tuner.log", lambda told: _tell_store(store, "failed", told))
        address = page.open(arguments.host, arguments.port)
        try:
            if not arguments.page_only:
                tuner.start()
            _tell(address, folder, arguments, page)
            _wait()
        finally:
            tuner.stop()
            page.close()
            with suppress(ConnectionError):  # if the database does not answer, nobody could read it anyway
                if not arguments.page_only or store.tuner()["state"] == "unconnected":
                    store.set_tuner("stopped", "zorl judge is not running.")
    return f"Stopped. Every verdict is kept in {settings.database or folder}; {_again(settings, folder, arguments)} continues."


def make_settings(folder: Path, given: Mapping[str, Any]) -> JudgeSettings:
    """The settings of a run: the given ones, else those in the folder, else the defaults.

    Raises:
        ValueError: a file of prompts is damaged (see `read_prompts`), there is no such model, or a setting is out of range.
    """
    values = {f.name: given[f.name] for f in fields(JudgeSettings) if f.name in given}
    for name in ("prompts", "held_out"):
        if name in values:
            values[name] = read_prompts(Path(values[name]).expanduser())
    if "model" in values:
        check_model_folder(values["model"])
        if Path(values["model"]).expanduser().is_dir():
            values["model"] = str(Path(values["model"]).expanduser().resolve())
    if (folder / "judge.json").exists():
        kept = JudgeSettings.read(folder)
        return JudgeSettings(**{f.name: values.get(f.name, getattr(kept, f.name)) for f in fields(kept)})
    if "model" in values and "prompts" not in values:
        raise ValueError("--prompts is required with --model: the built-in prompts are for the embedded model")
    return JudgeSettings(**{"model": str(REVIEWER), "prompts": built_in_prompts(), **values})


def _of_another_process(folder: Path, given: Mapping[str, Any]) -> JudgeSettings:
    """The settings that the page shows for a run that `zorl train` tunes.

    Raises:
        ValueError: the folder holds a run of `zorl judge`.
    """
    if (folder / "judge.json").exists():
        raise ValueError(
            f"{folder} holds a run that zorl judge tunes; leave out --page_only, or choose another --run folder"
        )
    return JudgeSettings(model="zorl train", prompts=["Once upon a time"], database=given.get("database", ""))


def _start_trainer(settings: JudgeSettings, folder: Path) -> str:
    """The command that asks questions on a page that does not tune."""
    return f"Start: zorl train --judge human --judgments {shlex.quote(str(settings.store(folder)))} …"


def _again(settings: JudgeSettings, folder: Path, arguments: JudgeArguments) -> str:
    """The command that continues the run. A run with settings of its own keeps its database in them."""
    flags = ["--run", str(folder)]
    if arguments.page_only:
        flags = ["--page_only", *flags, *(["--database", settings.database] if settings.database else [])]
    return shlex.join(["zorl", "judge", *flags])


def _check_address(host: str, port: int | None) -> None:
    """Checks that the page can be served there, before anything is written.

    Raises:
        ValueError: the port is out of range or cannot be used, or the host is not an address of this machine.
    """
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"--port {port}: expected 1 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host.strip("[]"), port or 0), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"--port {port} is in use; choose another, or leave --port out") from None
        if error.errno == errno.EACCES:
            raise ValueError(f"--port {port} is for the administrator only; choose one from 1024 on") from None
        raise ValueError(f"--host {host} is not an address of this machine: {error.strerror}") from None


def _refuse_judgments_of_another_run(store: JudgmentStore, settings: JudgeSettings, folder: Path) -> None:
    """Checks that a database on a server belongs to this run. (A file lies in the folder of its run.)

    Raises:
        ValueError: the store holds pairs, and the folder holds no run that could have written them.
    """
    if store.probes_written() and settings.database and not (folder / "judge.json").exists():
        raise ValueError(
            f"{settings.database} holds the judgments of another run; choose another database, or the folder of that run "
            "with --run"
        )


def _tell_store(store: JudgmentStore, state: str, message: str) -> None:
    """Records the tuner's state. If the database does not answer, nobody could read it anyway."""
    with suppress(ConnectionError):
        store.set_tuner(state, message)


def _read_guidelines(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"--guidelines {path}: there is no such file")
    guidelines = read_text(path)
    if not guidelines.strip():
        raise ValueError(f"--guidelines {path}: the file is empty; its first line is the question that raters see")
    return guidelines


def _tell(address: str, folder: Path, arguments: JudgeArguments, page: Page) -> None:
    say(f"judge at {address}    (Ctrl-C stops; the run is kept in {folder})")
    if not is_local(arguments.host):
        say(
            "passwords and verdicts are sent unencrypted: on a network that is not yours, put a proxy with TLS in front"
        )
    if not arguments.no_browser:
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()


def _wait() -> None:
    """Waits for Ctrl-C or SIGTERM."""

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        say("stopping")
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Reserves the run for this process.

    Raises:
        ValueError: another process has it open.
    """
    lock = FileLock(folder / "judge.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another zorl judge has {folder} open; stop it, or choose another --run folder") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _environment(password: str | None) -> Iterator[Path]:
    """Sets environment variables, here and for the tuner's process, and yields a private folder for the files that the page
    serves. Gradio connects to this machine only; the database's password is where the driver looks for it, and where other
    users of the machine cannot see it."""
    with tempfile.TemporaryDirectory(prefix="zorl-judge-") as scratch:
        local = "localhost,127.0.0.1,::1"
        kept = {name: os.environ.get(name) for name in ("GRADIO_TEMP_DIR", "NO_PROXY", "PGPASSWORD")}
        os.environ |= {
            "GRADIO_TEMP_DIR": str(Path(scratch) / "served"),
            "NO_PROXY": f"{kept['NO_PROXY']},{local}" if kept["NO_PROXY"] else local,
            **({} if password is None else {"PGPASSWORD": password}),
        }
        try:
            yield Path(scratch)
        finally:
            for name, value in kept.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
