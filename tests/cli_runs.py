"""What the tests of the `zorl` command have in common: files, rewards, and short runs. The fixtures are in cli/conftest.py."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest

WORDS = {"0": ("bad", "terrible"), "1": ("good", "great")}
QUESTION = ["--prompt", "{text} it was {mask} .", "--label_words", "0=terrible", "1=great"]
SHORT = ["--max_steps", "6", "--per_device_train_batch_size", "16", "--logging_steps", "2"]

REWARDS = '''
import os, signal
from pathlib import Path

HERE = Path(__file__).parent
calls = {"train": 0}

def nan(completions, **columns): return [float("nan")] * len(completions)
def infinite(completions, **columns): return [float("inf")] * len(completions)
def none(completions, **columns): return [None] * len(completions)
def long(completions, **columns): return [1.0] * (len(completions) + 1)
def text(completions, **columns): return "good"
def raising(completions, **columns): raise KeyError("no such thing")
def needs(completions, gold, **columns): return [0.0] * len(completions)
def right(completions, label, **columns):
    return [float(c == str(t)) for c, t in zip(completions, label)]
def short(completions, **columns): return [-float(len(c)) for c in completions]

def stopping(completions, label, **columns):
    """Stops the process as the file `stop` says: `train 9 int` is SIGINT's exception at the 9th minibatch."""
    file = HERE / "stop"
    if file.exists():
        where, when, how = file.read_text().split()
        size = len(completions)
        if (where == "train") == (size == 16):
            calls[where] = calls.get(where, 0) + 1
            if calls[where] == int(when):
                calls.clear()
                file.unlink()
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt
    return right(completions, label)

def judge(prompts, first, second, **columns):
    return ["first" if len(a) < len(b) else "second" for a, b in zip(first, second)]
'''


class Files(NamedTuple):
    """Data, models and rewards on disk."""

    folder: Path
    bert: str
    gpt2: str
    rewards: str

    def write(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text, encoding="utf-8")
        return str(self.folder / name)

    def path(self, name: str) -> str:
        return str(self.folder / name)


def evaluations(run: Path) -> list[tuple[int, float]]:
    """(step, reward) of each evaluation of a run."""
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["eval_reward"]) for entry in log if "eval_reward" in entry]


def sentences(size: int, seed: int) -> Any:
    rng = random.Random(seed)
    for i in range(size):
        label = str(i % 2)
        yield f"the {rng.choice(['film', 'plot', 'story'])} was {rng.choice(WORDS[label])} {rng.choice('!?.')}", label


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        (line,) = self.out.splitlines()
        result: dict[str, Any] = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
        return result


def train(files: Files, out: str | Path, *more: str) -> list[str]:
    """The arguments of a small run that maximises macro-F1, from a fitted threshold unless told otherwise."""
    data = ["--dataset", files.path("train.tsv"), "--eval_dataset", files.path("dev.tsv")]
    reward = [] if {"--reward", "--loss", "--judge"} & set(more) else ["--reward", "f1"]
    prompt = [] if "--prompt" in more else QUESTION
    start = [] if "--calibration" in more else ["--calibration", "bias"]
    return ["train", "--model", files.bert, *data, *prompt, *SHORT, *start, *reward, "--output_dir", str(out), *more]
