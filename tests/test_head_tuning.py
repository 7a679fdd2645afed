"""A head tuned by MeZO on states that are computed once: it learns what a bias cannot, and nothing from noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor

from zorl.head_tuning import favoured, fit_bias, fit_head
from zorl.label_head import LabelHead

Kind = Literal["accuracy", "macro_f1", "share"]


@dataclass
class Goal:
    """Rows with labels whose states may say something of them."""

    scores: Tensor
    states: Tensor | None
    truth: Tensor
    kind: Kind = "accuracy"

    def best(self, scores: Tensor, rows: Tensor) -> float:
        return self._value(scores.argmax(dim=1), rows)

    def of_each_label(self, answers: Tensor) -> Tensor:
        rows, labels = torch.arange(len(self.truth)), self.scores.shape[1]
        if self.kind == "accuracy":
            return torch.nn.functional.one_hot(self.truth, labels).double()
        values = [[self._value(answers.index_fill(0, i, k), rows) for k in range(labels)] for i in rows]
        return torch.tensor(values, dtype=torch.float64)

    def _value(self, predicted: Tensor, rows: Tensor) -> float:
        truth = self.truth[rows]
        if self.kind == "accuracy":
            return (predicted == truth).double().mean().item()
        if self.kind == "share":  # of the first label, which ought to be 3 in 10
            return -abs((predicted == 0).double().mean().item() - 0.3)
        return float(f1_score(truth, predicted, average="macro", zero_division=0))

    def with_head(self, head: LabelHead) -> float:
        scores = self.scores + torch.tensor(head.bias)
        if head.weight is not None:
            assert self.states is not None
            scores = scores + self.states @ torch.tensor(head.weight).T
        return self.best(scores, torch.arange(len(scores)))


def task(rows: int, seed: int, *, signal: float, labels: int = 2, kind: Kind = "accuracy") -> Goal:
    """States on another scale in each of 16 directions, of which a known combination says the label; scores say nothing."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(rows, 16, generator=generator)
    true_weight = torch.randn(labels, 16, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(rows, labels, generator=generator)
    truth = (signal * plain @ true_weight.T + noise).argmax(dim=1)
    scales = torch.logspace(-2, 2, 16)
    scores = 0.1 * torch.randn(rows, labels, generator=generator) + torch.tensor([2.0] + [0.0] * (labels - 1))
    return Goal(scores.log_softmax(1), plain * scales + 3.0 * scales, truth, kind)


@pytest.mark.parametrize(("kind", "labels"), [("accuracy", 2), ("accuracy", 4), ("macro_f1", 2)])
def test_a_head_learns_what_a_bias_cannot(kind: Kind, labels: int) -> None:
    n = 300 if kind == "accuracy" else 100  # a reward of a set is called for every answer
    goal, fresh = (task(rows, seed, signal=3.0, labels=labels, kind=kind) for rows, seed in ((n, 0), (400, 7)))
    bias, head = fit_bias(goal), fit_head(goal, seed=3)
    assert bias.weight is None
    assert fresh.with_head(bias) < 1.3 / labels
    assert fresh.with_head(head) > fresh.with_head(bias) + 0.25
    assert torch.tensor(head.weight).bfloat16().float().tolist() == [list(row) for row in head.weight or ()]


def test_a_head_is_a_function_of_its_seed() -> None:
    goal = task(64, 0, signal=3.0)
    assert fit_head(goal, seed=3) == fit_head(goal, seed=3)
    assert fit_head(goal, seed=3) != fit_head(goal, seed=4)


def test_states_that_say_nothing_give_no_better_answers_by_more_than_luck() -> None:
    noise, fresh = task(64, 0, signal=0.0), task(2000, 1, signal=0.0)
    assert fresh.with_head(fit_head(noise, seed=0)) == pytest.approx(0.5, abs=0.05)


def test_a_constant_state_has_no_say_and_changes_nothing_else() -> None:
    goal = task(100, 0, signal=3.0)
    assert goal.states is not None
    wider = Goal(goal.scores, torch.cat([goal.states, torch.full((100, 1), 5.0)], dim=1), goal.truth)
    head = fit_head(wider, seed=0)
    assert all(torch.tensor(head.bias).isfinite())
    assert wider.with_head(head) > 0.8


@pytest.mark.parametrize(
    "goal", [task(3, 0, signal=3.0), Goal(task(8, 0, signal=3.0).scores, None, torch.arange(8) % 2)]
)
def test_without_states_or_with_hardly_a_row_the_biases_stay_alone(goal: Goal) -> None:
    assert fit_head(goal, seed=0) == fit_bias(goal)


def test_every_step_is_reported() -> None:
    steps: list[int] = []
    fit_head(task(40, 0, signal=3.0), seed=0, progress=steps.append)
    assert sum(steps) >= 100
    assert set(steps) == {0, 1}


def test_a_goal_of_a_whole_set_that_a_likelihood_cannot_serve_keeps_its_biases() -> None:
    """Each answer of its own, more of the first label would be better or worse: all of them together would overshoot."""
    goal = task(200, 0, signal=3.0, kind="share")
    head = fit_head(goal, seed=0)
    assert goal.with_head(head) == pytest.approx(0.0, abs=0.03)


def test_the_best_label_weighs_what_choosing_badly_costs() -> None:
    nan = float("nan")
    objective = torch.tensor([[0.0, 1.0, 0.5], [3.0, 3.0, 0.0], [2.0, 2.0, 2.0], [nan, 1.0, -1.0], [nan, nan, nan]])
    weights = favoured(objective.double())
    expected = torch.tensor([[0, 1, 0], [1.5, 1.5, 0], [0, 0, 0], [0, 2, 0], [0, 0, 0]]) / (6 / 5)
    assert torch.allclose(weights, expected.double())
    assert not favoured(torch.full((3, 2), nan)).any()
    assert not favoured(torch.ones(3, 2)).any()
