"""Cells at once, in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from compare_runs import cells, words

from zorl.apps.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


def test_cells_in_processes_are_those_that_run_in_turn(
    files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")  # there are none here; a reward sees what its process was given
    rewards = files / "rewards.py"
    more = ["--methods", "zero_shot", "mezo", "--seeds", "1", "--metrics", f"{rewards}:failing", f"{rewards}:gpu"]
    assert main(words(files, tmp_path / "turn", *more)) == 0
    (files / "fail").touch()
    capfd.readouterr()
    assert main(words(files, tmp_path / "processes", *more, "--jobs", "2")) == 2
    said = capfd.readouterr()
    assert "failed: mezo with seed 1; the same command" in " ".join(said.err.split())
    assert "nothing to divide by" in said.err
    assert "Traceback" not in said.err
    found = cells(tmp_path / "processes")
    assert set(found) == {"zero_shot-1"}
    assert "| zero-shot |" in (tmp_path / "processes" / "table.md").read_text(encoding="utf-8")
    (files / "fail").unlink()
    more += ["--seeds", "2"]
    assert main(words(files, tmp_path / "turn", *more)) == 0
    assert main(words(files, tmp_path / "processes", *more, "--jobs", "2")) == 0
    expected, found = cells(tmp_path / "turn"), cells(tmp_path / "processes")
    assert set(found) == set(expected) == {f"{name}-{seed}" for name in ("zero_shot", "mezo") for seed in (1, 2)}
    measured = ("seconds", "peak_memory_mb", "gpu")
    for name, cell in found.items():
        assert {k: v for k, v in cell.items() if k not in measured} == {
            k: v for k, v in expected[name].items() if k not in measured
        }
        assert cell["gpu"] in (3.0, 5.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_one_that_started_it(files: Path, tmp_path: Path, number: int):
    command = words(files, tmp_path, "--methods", "mezo", "mezo_lora", "--seeds", "1", "2", "--jobs", "2")
    slow = ["--metrics", f"{files / 'rewards.py'}:slow"]
    started = subprocess.Popen(
        [sys.executable, "-m", "zorl.apps.cli", *command, *slow], stderr=subprocess.PIPE, text=True
    )
    first = psutil.Process(started.pid)
    begun = tmp_path / "runs"
    deadline = time.monotonic() + 120
    while len(list(begun.glob("*/run.lock"))) < 2:
        assert time.monotonic() < deadline
        assert started.poll() is None
        time.sleep(0.05)
    others = first.children(recursive=True)
    started.send_signal(number)
    said = started.communicate(timeout=60)[1]
    _, alive = psutil.wait_procs(others, timeout=60)
    assert not alive
    assert started.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    if number == signal.SIGINT:
        assert "finished cells are kept, and the same command continues" in said
        assert "Traceback" not in said


def test_a_process_that_is_killed_is_told_and_what_is_done_is_kept(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    more = [
        "--methods",
        "zero_shot",
        "mezo",
        "--seeds",
        "1",
        "--metrics",
        f"{files / 'rewards.py'}:killed",
        "--jobs",
        "2",
    ]
    (files / "fail").touch()
    assert main(words(files, tmp_path, *more)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "was killed, as systems do when memory runs out (--jobs 2)" in said
    (files / "fail").unlink()
    assert main(words(files, tmp_path, *more)) == 0
    assert set(cells(tmp_path)) == {"zero_shot-1", "mezo-1"}
