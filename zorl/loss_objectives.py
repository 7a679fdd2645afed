"""Losses as objectives: cross entropy, or a function of the model and the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zorl import processes
from zorl.head_tuning import LabelGoal
from zorl.label_loss import LabelLoss
from zorl.objectives import Asked
from zorl.policies import Policy, Row
from zorl.probe import CENTRE, Point, Scores
from zorl.reward_functions import RewardFunctions
from zorl.reward_objective import RewardObjective
from zorl.teacher_forcing import TeacherForcing

LossFunction = Callable[[Any, Sequence[Row]], Any]


@dataclass(slots=True)
class CrossEntropy:
    """The negative log-likelihood of the right answer, one number per row (MeZO's objective): of the true label among the
    answers to choose from, or of the text that is to be generated.
    """

    policy: Policy
    losses: LabelLoss | TeacherForcing
    metrics: RewardFunctions | None = None

    @property
    def name(self) -> str:
        return "cross_entropy"

    def ask(self, rows: Sequence[Row], points: Sequence[Point], noise_seed: int) -> Asked:
        losses = self.losses(rows, points)
        return Asked(Scores.of_losses(losses), {"cross_entropy": losses.mean().item()})

    def evaluate(self, rows: Sequence[Row]) -> dict[str, float]:
        if isinstance(self.losses, LabelLoss):  # losses and answers are made of the same scores
            scores = self.losses.policy.scores(rows, [CENTRE])
            losses = self.losses.of_scores(rows, scores)
        else:
            losses = self.losses(rows, [CENTRE])
        loss = losses.mean().item()
        figures = {"reward": -loss, "loss": loss}
        if self.metrics is None:
            return figures
        if isinstance(self.losses, LabelLoss):
            (answers,) = self.losses.policy.likeliest(rows, [CENTRE], scores)
        else:
            (answers,) = self.policy.answers(rows, [CENTRE])
        return figures | RewardObjective(self.policy, self.metrics).judged(rows, answers) | {"reward": -loss}

    def label_goal(self, rows: Sequence[Row]) -> LabelGoal:
        """The mean log-likelihood of the true label word as a function of the label scores of these rows."""
        assert isinstance(self.losses, LabelLoss)
        return self.losses.goal(rows)


@dataclass(slots=True)
class CallableLoss:
    """Any `loss(model, rows)` → a float, or one per row: lower is better."""

    policy: Policy
    loss: LossFunction
    metrics: RewardFunctions | None = None

    @property
    def name(self) -> str:
        return f"loss:{getattr(self.loss, '__name__', type(self.loss).__name__)}"

    def ask(self, rows: Sequence[Row], points: Sequence[Point], noise_seed: int) -> Asked:
        losses = self.losses(rows, points)
        return Asked(Scores.of_losses(losses), {"objective": losses.nanmean().item()})

    def evaluate(self, rows: Sequence[Row]) -> dict[str, float]:
        loss = self.losses(rows, [CENTRE]).nanmean().item()
        figures = {"reward": -loss, "loss": loss}
        if self.metrics is None:
            return figures
        return figures | RewardObjective(self.policy, self.metrics).evaluate(rows) | {"reward": -loss}

    def losses(self, rows: Sequence[Row], points: Sequence[Point]) -> Tensor:
        """The losses of each row at each point, `(points, rows)`, or `(points, 1)` where the loss is one number; float64."""
        # A loss may be one number for all rows, so processes share the points.
        parts = processes.share(points, lambda mine: {str(i): self._evaluate(rows, p) for i, p in enumerate(mine)})
        return torch.stack([part[str(i)] for part in parts for i in range(len(part))])

    def _evaluate(self, rows: Sequence[Row], point: Point) -> Tensor:
        evaluator = self.policy.evaluator
        value = evaluator.evaluate(point, lambda: self.loss(evaluator.module, rows))
        # On the CPU, like a plain number: a loss may be NaN at one point and a GPU's tensor at the next.
        losses = torch.as_tensor(value, dtype=torch.float64).reshape(-1).cpu()
        if len(losses) not in (1, len(rows)):
            raise ValueError(
                f"the loss returned {len(losses)} numbers for {len(rows)} rows; return one, or one per row"
            )
        return losses
