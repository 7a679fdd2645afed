"""What the tests of MeZOTrainer have in common: rows, an adapter, and what they ask of a trainer. `make` is in conftest.py."""

from __future__ import annotations

import random
from typing import Any

import pytest
from transformers import TrainerCallback

from zorl import MeZOTrainer, Prompt

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
peft_warning = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks transformers


def weights(trainer: MeZOTrainer) -> str:
    return trainer.tuned.sha256()


def tuned(trainer: MeZOTrainer) -> str:
    """The hash of the weights after training."""
    before = weights(trainer)
    trainer.train()
    assert weights(trainer) != before
    return weights(trainer)


def logged(trainer: MeZOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class StopAt(TrainerCallback):
    """Ends a run after a step, as a user's own callback may."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
