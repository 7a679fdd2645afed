"""Runs that are finished, stopped or killed, and go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import Files, Outcome, evaluations, train

from zorl.run_folder import RunFolder
from zorl.trajectory import Trajectory

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_finished_run_says_so_and_can_be_extended(zorl: Callable[..., Outcome], files: Files, tmp_path: Path) -> None:
    first = zorl(train(files, tmp_path / "out", "--json"))
    saved = (tmp_path / "out/trajectory.zorl").read_bytes()
    again = zorl(train(files, tmp_path / "out", "--json"))
    assert again.json == first.json
    assert "is finished: it has 6 steps. To extend it" in again.err
    assert (tmp_path / "out/trajectory.zorl").read_bytes() == saved
    longer = zorl(train(files, tmp_path / "out", "--json"), "--max_steps", "9")
    assert "continuing after step 6 of 9" in longer.err
    assert longer.json["steps"] == 9
    other = zorl(train(files, tmp_path / "out"), "--seed", "1")
    assert other.code == 2
    assert "seed was 42, is now 1" in other.err


@pytest.mark.parametrize(
    "stop",
    ["train 9 int", "evaluation 4 int", "evaluation 7 int"],
    ids=["in a step", "in an evaluation", "in the last evaluation"],
)
def test_ctrl_c_loses_nothing(zorl: Callable[..., Outcome], files: Files, tmp_path: Path, stop: str) -> None:
    reward = ["--reward", f"{files.rewards}:stopping", "--label_reward", "best", "--calibration", "none", "--json"]
    whole = zorl(train(files, tmp_path / "whole", *reward))
    files.write("stop", stop)
    stopped = zorl(train(files, tmp_path / "out", *reward))
    assert (stopped.code, stopped.out) == (130, "")
    assert "nothing is lost: the same command continues from there" in stopped.err
    assert zorl("eval", "--model", str(tmp_path / "out"), "--dataset", files.path("dev.tsv")).code == 2
    resumed = zorl(train(files, tmp_path / "out", *reward))
    for name in ("weights_sha256", "saved_step", "steps", "eval_reward", "start_reward"):
        assert resumed.json[name] == whole.json[name]
    whole_run, resumed_run = tmp_path / "whole", tmp_path / "out"
    assert (whole_run / "trajectory.zorl").read_bytes() == (resumed_run / "trajectory.zorl").read_bytes()
    assert evaluations(whole_run) == evaluations(resumed_run)


def test_a_killed_run_continues_to_the_same_bits(zorl: Callable[..., Outcome], files: Files, tmp_path: Path) -> None:
    reward = ["--reward", f"{files.rewards}:stopping", "--label_reward", "best", "--calibration", "none", "--json"]
    whole = zorl(train(files, tmp_path / "whole", *reward)).json
    files.write("stop", "train 8 kill")
    words = train(files, tmp_path / "out", *reward)
    killed = subprocess.run(
        [sys.executable, "-m", "zorl.apps.cli", *words],
        capture_output=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert killed.returncode == -signal.SIGKILL
    assert zorl(words).json["weights_sha256"] == whole["weights_sha256"]


def test_two_runs_cannot_share_a_folder(zorl: Callable[..., Outcome], files: Files, tmp_path: Path) -> None:
    assert zorl(train(files, tmp_path / "out")).code == 0
    trajectory, _ = Trajectory.resume(tmp_path / "out/trajectory.zorl")
    try:
        second = zorl(train(files, tmp_path / "out"), "--max_steps", "9")
    finally:
        trajectory.close()
    assert second.code == 2
    assert "another run is writing" in second.err


def test_the_command_that_finds_the_folder_taken_leaves_the_other_ones_files(files: Files, tmp_path: Path) -> None:
    """Both begin before there is a folder, as two runs do that were meant for different ones."""
    reward = ["--reward", f"{files.rewards}:right", "--tune", "head", "--calibration", "none"]
    command = [sys.executable, "-m", "zorl.apps.cli", *train(files, tmp_path / "out", *reward)]
    several = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
               for _ in range(2)]  # fmt: skip
    said = {process.wait() or 0: process.communicate()[1] for process in several}
    assert 0 in said, said
    assert RunFolder(tmp_path / "out").init.exists()
    if 2 in said:  # else one came only when the other was done, and read its result
        assert "another run is writing" in said[2]
    assert (tmp_path / "out" / "result.json").exists()


def test_the_seconds_of_a_run_that_goes_on_count_from_its_start(
    zorl: Callable[..., Outcome], files: Files, tmp_path: Path
) -> None:
    assert zorl(train(files, tmp_path / "out")).code == 0
    (tmp_path / "out" / "seconds.json").write_text("1000.0")
    longer = zorl(train(files, tmp_path / "out", "--json"), "--max_steps", "9")
    assert 1000.0 < longer.json["seconds"] < 1100.0
