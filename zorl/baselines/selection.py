"""Model selection: the weights that did best on the development rows, over all steps and settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zorl.baselines.problem import Problem, answers_of
from zorl.policies import Policy

LOOKS = 10  # per run, at most


class Selection:
    """Scores weights on the development rows, and keeps the best in main memory.

    Args:
        policy: answers with the model that `tensors` belong to.
        tensors: everything that the method changes, by name. They are written in place.
    """

    def __init__(self, problem: Problem, policy: Policy, tensors: Mapping[str, Tensor]) -> None:
        self._problem, self._policy, self._tensors = problem, policy, tensors
        self._start = self._best = self._copy()
        self._looks = 0
        self._score = -math.inf
        self._setting: dict[str, Any] = {}

    @property
    def chosen(self) -> dict[str, Any]:
        """The best setting, its score, and the forwards that all looks cost."""
        dev = self._problem.forwards(self._problem.dev)
        return {**self._setting, "dev_score": self._score, "dev_forwards": self._looks * dev}

    def look(self, **setting: Any) -> bool:
        """Scores the current weights; among equals the first are kept. False if the scores are NaN."""
        self._looks += 1
        try:
            score = self._problem.score(self._problem.dev, answers_of(self._policy, self._problem.dev))
        except FloatingPointError:  # the run has diverged
            return False
        if score > self._score:
            self._score, self._setting, self._best = score, setting, self._copy()
        return True

    def to_start(self) -> None:
        """Restores the initial weights."""
        self._write(self._start)

    def to_best(self) -> None:
        """Restores the best weights."""
        self._write(self._best)

    def _copy(self) -> dict[str, Tensor]:
        # Not on a GPU, whose memory the model itself may need.
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._tensors.items()}

    def _write(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(values[name])


def look_at(step: int, steps: int) -> bool:
    """Whether to look after this step: at most `LOOKS` times in all, and always after the last."""
    return step == steps or step % max(1, -(-steps // LOOKS)) == 0
