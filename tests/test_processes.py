"""Several processes tune one model: the same weights everywhere, few bytes between them, and nothing lost when one dies."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from zorl.apps.embedded import REVIEWER
from zorl.trajectory import read

SCRIPT = Path(__file__).parent / "several_processes.py"


SHARING = """
import json, sys
from pathlib import Path

import torch
from torch import distributed

from zorl import processes

distributed.init_process_group("gloo")
mine, found = processes.index(), {}
thirds = processes.share(list(range(7)), lambda part: {"x": torch.tensor(part, dtype=torch.float64)})
found["order"] = torch.cat([part["x"] for part in thirds]).tolist()
found["few"] = [len(part["x"]) for part in processes.share([5], lambda part: {"x": torch.tensor(part)})]
found["first"] = processes.first(lambda: {"who": mine, "text": "ü\\u2028", "nan": float("nan")})
for name, action in {
    "share failed": lambda: processes.share([1, 2, 3], lambda part: 1 // 0 if mine == 1 else {}),
    "first failed": lambda: processes.first(lambda: 1 // 0),
    "differ": lambda: processes.agree("their seeds", mine),
}.items():
    try:
        action()
    except (ZeroDivisionError, processes.ProcessError) as error:
        found[name] = f"{type(error).__name__}: {error}"
Path(sys.argv[1], f"{mine}.json").write_text(json.dumps(found))
distributed.destroy_process_group()
"""


def launch(what: str, folder: Path, processes: int) -> tuple[list[dict[str, Any]], str]:
    """What each process found, and all that they printed."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*start, str(SCRIPT), what, str(folder)], capture_output=True, text=True, timeout=300, check=False
    )
    files = [folder / f"{what}-{i}-of-{processes}.json" for i in range(processes)]
    assert what == "die" or all(file.exists() for file in files), done.stderr
    return [json.loads(file.read_text()) for file in files if file.exists()], done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Every scenario in one process, and in two."""
    alone, _ = launch("all", tmp_path_factory.mktemp("one"), 1)
    together, _ = launch("all", tmp_path_factory.mktemp("two"), 2)
    return alone[0], together


def test_all_processes_hold_the_same_weights(trained: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    _, (one, two) = trained
    assert one.keys() == two.keys()
    for name in one:
        assert one[name]["processes"] == 2
        assert one[name]["weights"] == two[name]["weights"], name
        assert one[name]["evaluations"] == two[name]["evaluations"], name


def test_two_processes_measure_what_one_does(trained: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    alone, (together, _) = trained
    for name, found in alone.items():
        assert len(found["projected"]) == len(together[name]["projected"]) > 0
        for expected, measured in zip(found["projected"], together[name]["projected"], strict=True):
            # Batches of another size round otherwise, and a coefficient is logged with 8 bits.
            assert measured == pytest.approx(expected, rel=0.05, abs=0.02), name


def test_rewards_are_asked_once_and_not_in_every_process(
    trained: tuple[dict[str, Any], list[dict[str, Any]]],
) -> None:
    alone, (one, two) = trained
    name = "generation, a reward that differs each time"
    assert one[name]["asked"] == alone[name]["asked"] > 0
    assert two[name]["asked"] == 0


def test_bytes_are_logged_and_few(trained: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    alone, (one, _) = trained
    name = "label words, accuracy, no head"
    assert alone[name]["bytes"] == 0
    assert not alone[name]["logged"]
    assert one[name]["logged"]
    assert all(0 < value < 10_000 for value in one[name]["logged"])


def test_items_come_back_in_order_and_failures_reach_everybody(tmp_path: Path) -> None:
    (tmp_path / "sharing.py").write_text(SHARING, encoding="utf-8")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    subprocess.run(
        [*start, str(tmp_path / "sharing.py"), str(tmp_path)], check=True, stdout=subprocess.DEVNULL, timeout=120
    )
    found = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(3)]
    for i, of in enumerate(found):
        assert of["order"] == list(range(7))
        assert sum(of["few"]) == 1
        assert of["first"]["who"] == 0
        assert of["first"]["text"] == "ü\u2028"
        assert math.isnan(of["first"]["nan"])
        assert of["share failed"].startswith(
            "ZeroDivisionError" if i == 1 else "ProcessError: process 1 of 3 failed: Zero"
        )
        assert of["first failed"].startswith(
            "ZeroDivisionError" if i == 0 else "ProcessError: the first process failed: Zer"
        )
        assert (
            of["differ"]
            == "ProcessError: the processes differ in their seeds: process 0 has 0, process 1 has 1, process 2 has 2"
        )


WAITING = """
import json, os, signal, sys, time
from datetime import timedelta
from pathlib import Path

from torch import distributed

from zorl import processes

signal.signal(signal.SIGINT, signal.default_int_handler)  # test runners may start their processes without
distributed.init_process_group("gloo", timeout=timedelta(seconds=2))
processes.PULSE, mine = 0.3, processes.index()
found = {"answer": processes.first(lambda: time.sleep(5) or "at last")}
found["again"] = processes.first(lambda: "at once")
if mine == 1:
    Path(sys.argv[1], "1.json").write_text(json.dumps(found))
    os.kill(os.getpid(), signal.SIGKILL)
begin = time.monotonic()
try:
    processes.first(lambda: time.sleep(60))
except processes.ProcessError as error:
    found["gone"] = str(error)
found["seconds"] = time.monotonic() - begin
Path(sys.argv[1], "0.json").write_text(json.dumps(found))
os._exit(0)
"""


def test_the_first_process_may_wait_for_people_longer_than_an_exchange_may_take(tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(WAITING, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not by torchrun, which would end the first process when the other is gone.
    where = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, str(tmp_path / "waiting.py"), str(tmp_path)]
    both = [subprocess.Popen(command, env={**where, "RANK": str(rank)}, stderr=subprocess.DEVNULL) for rank in range(2)]
    for process in both:
        process.wait(timeout=120)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["answer"] == second["answer"] == "at last"
    assert first["again"] == second["again"] == "at once"
    assert "process 0 of 2 lost contact with the others" in first["gone"]
    assert first["seconds"] < 30


@pytest.fixture(scope="module")
def dead(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of a run of two processes of which one was killed after three of eight steps, and what the other noted."""
    folder = tmp_path_factory.mktemp("dead")
    left, _ = launch("die", folder, 2)
    return folder, left


def test_a_run_whose_process_died_goes_on_with_another_number_of_processes(
    tmp_path: Path, dead: tuple[Path, list[dict[str, Any]]]
) -> None:
    folder, left = dead
    shutil.copytree(folder / "run", tmp_path / "run")
    assert len(left) <= 1  # torchrun may end the other one first
    if left:
        assert "lost contact with the others" in left[0]["error"]
    resumed, _ = launch("resume", tmp_path, 3)
    for of in resumed:
        assert len(of["projected"]) == 8 * 8, "eight steps of eight directions"
        assert of["weights"] == of["replayed"] == resumed[0]["weights"]


def test_what_is_exchanged_does_not_grow_with_the_model(tmp_path: Path) -> None:
    for of in launch("widths", tmp_path, 2)[0]:
        narrow, wide = of["1"], of["4"]
        assert wide["parameters"] > 4 * narrow["parameters"]
        # Numbers are sent in as many digits as they have.
        assert wide["bytes"] == pytest.approx(narrow["bytes"], rel=0.05)


def test_weights_that_differ_end_the_run(tmp_path: Path) -> None:
    """At the next look, or without one at the end of the run."""
    for of in launch("diverge", tmp_path, 2)[0]:
        for check in ("1", "1000"):
            assert "the processes differ in their weights" in of[check], check


def test_a_killed_process_ends_the_command_line_with_a_word_on_how_to_go_on(tmp_path: Path) -> None:
    """`torchrun … zorl train`, as a user starts it."""
    rows, run = tmp_path / "rows.jsonl", tmp_path / "run"
    rows.write_text("".join(json.dumps({"text": f"a {word} film", "label": label}) + "\n"
                            for word, label in (("great", 1), ("terrible", 0), ("good", 1), ("bad", 0))))  # fmt: skip
    zorl = Path(sys.executable).parent / "zorl"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no_python", str(zorl), "train",
        "--model", str(REVIEWER), "--dataset", str(rows), "--prompt", "{text} It was {mask}", "--label_words", "0=terrible",
        "1=great", "--reward", "accuracy", "--calibration", "none", "--per_device_train_batch_size", "2", "--use_cpu",
        "--max_steps", "100000", "--output_dir", str(run),
    ]  # fmt: skip
    with (tmp_path / "said.txt").open("w+") as said:
        started = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            trajectory, patience = run / "trajectory.zorl", time.monotonic() + 120
            while not (trajectory.exists() and len(read(trajectory)[1]) > 20):
                assert started.poll() is None
                assert time.monotonic() < patience
                time.sleep(0.2)
            (second,) = [
                of for of in psutil.Process(started.pid).children(recursive=True) if of.environ().get("RANK") == "1"
            ]
            second.kill()
            assert started.wait(timeout=60) != 0
        finally:
            started.kill()
        said.seek(0)
        text = said.read()
    assert "nothing is lost: the same command continues" in text or "lost contact with the others" in text, text
    assert len(read(trajectory)[1]) > 20
