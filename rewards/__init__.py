"""Rewards: what a model is tuned for. They are functions with TRL's signature; higher is better.

Each name here is a factory: `f1(average="macro", column="label")` returns the reward function. A function of your own
only needs the signature: `def short(completions, **columns): return [-len(c) for c in completions]`.

Judges compare two answers instead of scoring one: people (`HumanJudge`, by way of a `JudgmentStore`), a reward function, a
classifier or a language model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from zorl.rewards.classification import accuracy, balanced_accuracy, f1, matthews
from zorl.rewards.classifier import classifier
from zorl.rewards.loading import load_judge, load_reward
from zorl.rewards.text import exact_match, squad_f1

if TYPE_CHECKING:
    from zorl.rewards.human import HumanJudge as HumanJudge
    from zorl.rewards.judges import ClassifierJudge as ClassifierJudge
    from zorl.rewards.judges import LanguageModelJudge as LanguageModelJudge
    from zorl.rewards.judges import RewardJudge as RewardJudge
    from zorl.rewards.judgment_store import JudgmentStore as JudgmentStore

__all__ = [
    "ClassifierJudge",
    "HumanJudge",
    "JudgmentStore",
    "LanguageModelJudge",
    "RewardJudge",
    "accuracy",
    "balanced_accuracy",
    "classifier",
    "exact_match",
    "f1",
    "load_judge",
    "load_reward",
    "matthews",
    "squad_f1",
]

# Loaded on first use (PEP 562): rewards need no database.
_HOME = {
    "ClassifierJudge": "zorl.rewards.judges",
    "HumanJudge": "zorl.rewards.human",
    "JudgmentStore": "zorl.rewards.judgment_store",
    "LanguageModelJudge": "zorl.rewards.judges",
    "RewardJudge": "zorl.rewards.judges",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'zorl.rewards' has no attribute {name!r}")
