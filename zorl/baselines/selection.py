"""Which of the weights along the way, and of several settings, did best on the development rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zorl.baselines.problem import Problem, answers_of
from zorl.policies import Policy

LOOKS = 10  # a run, at most


class Selection:
    """Looks at the development rows, and keeps the best weights in memory.

    Args:
        policy: answers with the model that holds `tensors`.
        tensors: all that the method moves, by name. They are written in place.
    """

    def __init__(self, problem: Problem, policy: Policy, tensors: Mapping[str, Tensor]) -> None:
        self._problem, self._policy, self._tensors = problem, policy, tensors
        self._start = self._best = self._copy()
        self._looks = 0
        self._score = -math.inf
        self._setting: dict[str, Any] = {}

    @property
    def chosen(self) -> dict[str, Any]:
        """The setting of the best look, its score, and what all looks have cost."""
        dev = self._problem.forwards(self._problem.dev)
        return {**self._setting, "dev_score": self._score, "dev_forwards": self._looks * dev}

    def look(self, **setting: Any) -> bool:
        """Scores the weights as they are; of equals the first is kept. False where they answer with NaN."""
        self._looks += 1
        try:
            score = self._problem.score(self._problem.dev, answers_of(self._policy, self._problem.dev))
        except FloatingPointError:  # a run that has diverged
            return False
        if score > self._score:
            self._score, self._setting, self._best = score, setting, self._copy()
        return True

    def to_start(self) -> None:
        """Puts the weights back to what they were at first."""
        self._write(self._start)

    def to_best(self) -> None:
        """Puts the weights to the best that were looked at."""
        self._write(self._best)

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._tensors.items()}

    def _write(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(values[name])


def look_at(step: int, steps: int) -> bool:
    """Whether to look after this step of so many: at most `LOOKS` times, and after the last."""
    return step == steps or step % max(1, -(-steps // LOOKS)) == 0
