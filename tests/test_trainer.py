"""MeZOTrainer end to end on tiny models: every objective, killed and resumed runs, and bad input."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, TrainerCallback

from zorl import MeZOConfig, MeZOTrainer, Prompt
from zorl.parameters import ParameterSet
from zorl.reward_functions import RewardError
from zorl.rewards import accuracy, f1
from zorl.run_folder import RunFolder
from zorl.trajectory import TrajectoryError, read, replay

PROMPT = Prompt("{text} It was {mask}.", {"bad": "terrible", "good": "great"})
SUBJECTS = ("film", "story", "plot", "ending", "book", "answer")
WORDS = {"good": ("great", "good", "like"), "bad": ("terrible", "bad", "odd")}


def rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """Reviews whose label is in one of their words."""
    generator = random.Random(seed)
    labels = [("good", "bad")[i % 3 == 2] for i in range(n)]
    return [
        {"text": f"the {generator.choice(SUBJECTS)} was {generator.choice(WORDS[label])}", "label": label}
        for label in labels
    ]


TRAIN, EVAL = rows(24), rows(12, seed=1)


@pytest.fixture
def base(parts: Callable[[str], Any], tmp_path: Path) -> Callable[[str], str]:
    """The path of a saved tiny model with its tokenizer."""

    def save(kind: str) -> str:
        path = tmp_path / f"base-{kind}"
        if not path.exists():
            parts(kind).model.save_pretrained(path)
            parts(kind).tokenizer.save_pretrained(path)
        return str(path)

    return save


@pytest.fixture
def make(base: Callable[[str], str], tmp_path: Path) -> Callable[..., MeZOTrainer]:
    """A trainer with short settings; keywords are MeZOTrainer's, `settings` MeZOConfig's."""

    def trainer(
        folder: str = "out", *, kind: str = "gpt2", settings: dict[str, Any] | None = None, **options: Any
    ) -> MeZOTrainer:
        config = MeZOConfig(
            output_dir=str(tmp_path / folder),
            **{
                "max_steps": 6,
                "per_device_train_batch_size": 8,
                "logging_steps": 2,
                "save_strategy": "no",
                "disable_tqdm": True,
                "calibrate": False,
                **(settings or {}),
            },
        )
        objective = {} if options.keys() & {"reward_funcs", "loss", "judge"} else {"loss": "cross_entropy"}
        defaults = {"model": base(kind), "args": config, "train_dataset": TRAIN, "prompt": PROMPT}
        return MeZOTrainer(**{**defaults, **objective, **options})

    return trainer


def weights(trainer: MeZOTrainer) -> str:
    return trainer.tuned.sha256()


def tuned(trainer: MeZOTrainer) -> str:
    """The hash of the weights after training."""
    before = weights(trainer)
    trainer.train()
    assert weights(trainer) != before
    return weights(trainer)
