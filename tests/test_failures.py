"""What a machine may do to a run: fill up, refuse, forget the time, kill. One sentence, and the run goes on to the same bits."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from zorl import MeZOConfig, MeZOTrainer, Prompt
from zorl.apps import cli
from zorl.parameters import ParameterSet
from zorl.reward_functions import RewardError
from zorl.rewards import accuracy
from zorl.trajectory import read

ROOT = Path(__file__).parents[1]
ROWS = [
    {"text": f"the film was {word}", "label": label}
    for word, label in (("great", 1), ("odd", 0), ("good", 1), ("bad", 0))
]
PROMPT = Prompt("{text} It was {mask}.", {1: "great", 0: "terrible"})


@pytest.fixture(scope="module")
def base(parts: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a saved tiny model with its tokenizer."""
    path = tmp_path_factory.mktemp("base")
    parts("bert").model.save_pretrained(path)
    parts("bert").tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def make(base: str, tmp_path: Path) -> Callable[..., MeZOTrainer]:
    """A trainer of a few steps; keywords are MeZOTrainer's."""

    def trainer(folder: str = "out", **options: Any) -> MeZOTrainer:
        config = MeZOConfig(
            output_dir=str(tmp_path / folder), max_steps=12, per_device_train_batch_size=4, logging_steps=2, save_steps=3,
            calibration="none", disable_tqdm=True,
        )  # fmt: skip
        goal = {} if "reward_funcs" in options else {"loss": "cross_entropy"}
        return MeZOTrainer(base, args=config, train_dataset=ROWS, prompt=PROMPT, **goal, **options)

    return trainer


def end_of(trainer: MeZOTrainer, *, resume: bool = False) -> str:
    """The hash of the weights after training."""
    trainer.train(resume_from_checkpoint=resume)
    return trainer.tuned.sha256()


# --- disks ------------------------------------------------------------------------------------------------------------

# In a name space of its own, where a file system of 64 kB can be mounted, filled, and made read-only.
DISK = """
import contextlib, json, subprocess, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from zorl import MeZOConfig, MeZOTrainer, Prompt
from zorl.trajectory import read
from transformers import TrainerCallback

base, disk, elsewhere, rows = sys.argv[1], Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
full = disk / "full"

def fill():
    with contextlib.suppress(OSError), full.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))

class Filling(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (10, 30):
            fill()

def trainer(folder, callbacks=None, **settings):
    config = MeZOConfig(output_dir=str(folder), max_steps=40, per_device_train_batch_size=4, n_spsa="32", calibration="none",
                        logging_steps=20, disable_tqdm=True, **{"save_strategy": "no", **settings})
    prompt = Prompt("{text} It was {mask}.", {1: "great", 0: "terrible"})
    return MeZOTrainer(base, loss="cross_entropy", args=config, train_dataset=rows, prompt=prompt, callbacks=callbacks)

def failure(action):
    try:
        action()
    except OSError as error:
        return str(error)

found = {}
straight = trainer(elsewhere)
straight.train()
found["expected"] = straight.tuned.sha256()
found["full"] = failure(trainer(disk / "run", [Filling()]).train)
found["steps"] = len(read(disk / "run/trajectory.zorl")[1])
full.unlink()
saving = {"save_strategy": "steps", "save_steps": 12}
found["full again"] = failure(lambda: trainer(disk / "run", [Filling()], **saving).train(resume_from_checkpoint=True))
fill()
found["resumed on a full disk"] = failure(lambda: trainer(disk / "run", **saving).train(resume_from_checkpoint=True))
found["started on a full disk"] = failure(lambda: trainer(disk / "new").train())
full.unlink()
continued = trainer(disk / "run", **saving)
continued.train(resume_from_checkpoint=True)
found["continued"] = continued.tuned.sha256()
found["saved"] = failure(continued.save_model)
subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
found["read-only"] = failure(lambda: trainer(disk / "run").train(resume_from_checkpoint=True))
found["new on read-only"] = failure(lambda: trainer(disk / "another").train())
found["still there"] = len(read(disk / "run/trajectory.zorl")[1])
print("found", json.dumps(found))
"""


@pytest.fixture(scope="module")
def disk(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What happens to runs on a small disk."""
    mount = tmp_path_factory.mktemp("disk")
    unshare = ["unshare", "--mount"] + ([] if os.geteuid() == 0 else ["--map-root-user"])
    size = f"mount -t tmpfs -o size=64k tmpfs {mount}"
    if not shutil.which("unshare") or subprocess.run([*unshare, "sh", "-c", size], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    arguments = [
        sys.executable,
        "-c",
        DISK,
        base,
        str(mount),
        str(tmp_path_factory.mktemp("elsewhere") / "run"),
        json.dumps(ROWS),
    ]
    command = [*unshare, "sh", "-c", f'{size} && exec "$@"', "sh", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    assert lines, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(lines[0].removeprefix("found "))
    return found


def test_a_disk_that_fills_up_ends_the_run_before_the_step_that_it_could_not_hold(disk: dict[str, Any]):
    assert f"step {disk['steps'] + 1} is not committed, free space and resume" in disk["full"]
    assert 10 <= disk["steps"] < 40


@pytest.mark.parametrize("when", ["full again", "resumed on a full disk", "started on a full disk", "saved"])
def test_whatever_is_written_to_a_full_disk_the_file_and_the_way_on_are_named(disk: dict[str, Any], when: str):
    assert "No space left on device" in disk[when]
    assert "disk0" in disk[when]
    assert "free space and resume" in disk[when] or "make sure that there is room" in disk[when]


def test_once_there_is_room_the_run_ends_in_the_bits_of_an_undisturbed_one(disk: dict[str, Any]):
    assert disk["continued"] == disk["expected"]


@pytest.mark.parametrize("when", ["read-only", "new on read-only"])
def test_a_read_only_folder_is_named_and_left_as_it_is(disk: dict[str, Any], when: str):
    assert "Read-only file system" in disk[when]
    assert "permission to write" in disk[when]
    assert disk["still there"] == 40


def test_a_folder_below_a_file_is_named(make: Callable[..., MeZOTrainer], tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(
        OSError, match="Not a directory; make sure that there is room and permission to write.*file/out"
    ):
        make("file/out").train()


def test_a_kill_while_the_log_was_written_leaves_the_one_before(make: Callable[..., MeZOTrainer], tmp_path: Path):
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 7

    expected = end_of(make("straight"))
    make(callbacks=[Stop()]).train()
    state = tmp_path / "out" / "trainer_state.json"
    state.with_name("trainer_state.json.new").write_text(state.read_text()[:50])
    assert end_of(make(), resume=True) == expected
    state.write_text(state.read_text()[:50])
    with pytest.raises(ValueError, match=r"trainer_state\.json is damaged .*restore it from a copy, or remove it"):
        make().train(resume_from_checkpoint=True)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_reward_that_runs_out_of_memory_is_named_and_the_run_continues(
    make: Callable[..., MeZOTrainer], tmp_path: Path
):
    calls = itertools.count()
    right = accuracy()

    def greedy(completions: list[str], **columns: Any) -> list[float]:
        if next(calls) == 11:
            limits = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (1 << 20, limits[1]))  # of what is there already not a byte is lost
            try:
                np.ones(1 << 28)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, limits)
        return right(completions=completions, **columns)

    greedy.__name__ = right.__name__
    expected = end_of(make("straight", reward_funcs=right))
    with pytest.raises(
        RewardError, match="reward function 'accuracy' raised .*MemoryError at step .*Unable to allocate"
    ):
        make(reward_funcs=greedy).train()
    assert 0 < len(read(tmp_path / "out" / "trajectory.zorl")[1]) < 12
    with pytest.warns(UserWarning, match="accuracy or a metric has changed since the run began"):
        assert end_of(make(reward_funcs=right), resume=True) == expected


def test_a_forward_that_runs_out_of_memory_in_mid_step_says_what_to_do_and_the_run_continues(
    make: Callable[..., MeZOTrainer], tmp_path: Path
):
    expected = end_of(make("straight"))
    trainer, calls = make(), itertools.count()

    def exhaust(module: Any, args: Any, kwargs: Any) -> None:
        if next(calls) >= 5:
            torch.empty(1 << 50)  # more than any machine has

    trainer.evaluator.module.register_forward_pre_hook(exhaust, with_kwargs=True)
    before = trainer.tuned.sha256()
    with pytest.raises(torch.OutOfMemoryError, match="shorten the inputs with max_length"):
        trainer.train()
    steps = len(read(tmp_path / "out" / "trajectory.zorl")[1])
    assert 0 < steps < 12
    assert trainer.mezo is not None
    assert trainer.mezo.steps == steps
    assert trainer.tuned.sha256() != before, "the steps before it are applied"
    assert end_of(make(), resume=True) == expected


def test_an_update_that_runs_out_of_memory_halfway_loses_nothing(
    make: Callable[..., MeZOTrainer], monkeypatch: pytest.MonkeyPatch
):
    expected, calls, write = end_of(make("straight")), itertools.count(), ParameterSet.add

    def exhaust(self: ParameterSet, *args: Any) -> None:
        write(self, *args)
        if next(calls) == 5:
            torch.empty(1 << 50)

    with monkeypatch.context() as patched:
        patched.setattr(ParameterSet, "add", exhaust)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            make().train()
    assert end_of(make(), resume=True) == expected


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("out of memory in a forward pass"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_the_command_line_says_that_memory_ran_out(monkeypatch: pytest.MonkeyPatch, capsys: Any, error: Exception):
    def fail(words: list[str]) -> str:
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err.startswith("zorl: error: out of memory")


# --- time -------------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_changes_nothing(make: Callable[..., MeZOTrainer], monkeypatch: pytest.MonkeyPatch):
    """The clock of the machine cannot be set for one process, so it is Python's that jumps: by up to ten years at every look."""
    expected = end_of(make("straight"))
    generator, real = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: real() + generator.uniform(-3e8, 3e8))
    trainer = make()
    assert end_of(trainer) == expected
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4, 6, 8, 10, 12]


# --- kills ------------------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_five_times_ends_in_the_bits_of_an_undisturbed_one(tmp_path: Path):
    result = tmp_path / "soak.json"
    command = [sys.executable, "benchmarks/soak.py", "--steps", "120", "--kills", "5", "--output", str(result)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(result.read_text())
    assert found["kills"] == 5
    assert found["weights_equal"]
    assert found["trajectories_equal"]
