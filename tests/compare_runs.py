"""What the tests of `zorl compare` have in common: rewards, the command, its cells. The files are made in compare/conftest.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cli_runs import QUESTION

REWARDS = '''
import os
import signal
import time
from pathlib import Path

def right(completions, label, **columns):
    """The share that is right; it stops the process once, when the file that `stop` names is there."""
    stop = Path(__file__).with_name("stop")
    if stop.exists() and Path(stop.read_text()).exists():
        stop.unlink()
        raise KeyboardInterrupt
    return [float(c == str(t)) for c, t in zip(completions, label)]

def failing(completions, label, **columns):
    """Fails outside of the 30 test rows, as long as the file `fail` is there."""
    if len(completions) != 30 and Path(__file__).with_name("fail").exists():
        raise ZeroDivisionError("nothing to divide by")
    return right(completions, label)

def gpu(completions, **columns):
    return [float(os.environ["CUDA_VISIBLE_DEVICES"][:1]) for _ in completions]

def slow(completions, label, **columns):
    time.sleep(0.5)
    return right(completions, label)

def killed(completions, label, **columns):
    """Kills its process outside of the 30 test rows, as long as the file `fail` is there."""
    if len(completions) != 30 and Path(__file__).with_name("fail").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return right(completions, label)

def inapplicable(completions, **columns):
    return [None] * len(completions)
'''


def words(files: Path, out: Path, *more: str, model: str = "bert") -> list[str]:
    data = ["--dataset", str(files / "train.tsv"), "--test_dataset", str(files / "test.tsv"), "--k_shot", "8"]
    size = ["--budget", "24", "--batch_size", "8"]
    return ["compare", "--model", str(files / model), *data, *QUESTION, *size, "--output_dir", str(out), *more]


def cells(out: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (out / "cells").glob("*.json")}
