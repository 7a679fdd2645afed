"""A head tuned by MeZO on states that are computed once: it learns what a bias cannot, and nothing from noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor

from zorl.expected_reward import expected_reward, sample_labels
from zorl.head_tuning import fit_bias, fit_head
from zorl.label_head import LabelHead
from zorl.probe import Scores


@dataclass
class Goal:
    """Rows with labels whose states may say something of them."""

    scores: Tensor
    states: Tensor | None
    truth: Tensor
    kind: Literal["accuracy", "macro_f1"] = "accuracy"

    def best(self, scores: Tensor) -> float:
        predicted = scores.argmax(dim=1)
        if self.kind == "accuracy":
            return (predicted == self.truth).double().mean().item()
        return float(f1_score(self.truth, predicted, average="macro", zero_division=0))

    def expected(self, scores: Tensor, rows: Tensor, noise_seed: int) -> Scores:
        if self.kind == "accuracy":
            right = torch.nn.functional.one_hot(self.truth, scores.shape[2]).double()
            return Scores(expected_reward(scores, right[rows]))
        drawn = sample_labels(scores, noise_seed, 1)[0]
        values = [f1_score(self.truth[rows], labels, average="macro", zero_division=0) for labels in drawn]
        return Scores(torch.tensor(values, dtype=torch.float64)[:, None])

    def with_head(self, head: LabelHead) -> float:
        scores = self.scores + torch.tensor(head.bias)
        if head.weight is not None:
            assert self.states is not None
            scores = scores + self.states @ torch.tensor(head.weight).T
        return self.best(scores)


def task(
    rows: int, seed: int, *, signal: float, labels: int = 2, kind: Literal["accuracy", "macro_f1"] = "accuracy"
) -> Goal:
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
def test_a_head_learns_what_a_bias_cannot(kind: Literal["accuracy", "macro_f1"], labels: int) -> None:
    n = 300 if kind == "accuracy" else 100  # a reward of a set is called for every point
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
