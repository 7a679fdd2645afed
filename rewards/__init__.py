"""Rewards: what a model is tuned for. Functions with TRL's signature; higher is better.

Each name here is a factory: `f1(average="macro", column="label")` returns the reward function. A function of your own
needs no more than the signature: `def short(completions, **columns): return [-len(c) for c in completions]`.
"""

from zorl.rewards.classification import accuracy, balanced_accuracy, f1, matthews
from zorl.rewards.classifier import classifier
from zorl.rewards.loading import load_reward
from zorl.rewards.text import exact_match, squad_f1

__all__ = [
    "accuracy",
    "balanced_accuracy",
    "classifier",
    "exact_match",
    "f1",
    "load_reward",
    "matthews",
    "squad_f1",
]
