"""Rewards as an objective: what reward functions give for the answers at each point, or in expectation over the labels."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zorl.choosing import Choosing
from zorl.expected_reward import DRAWS, LabelReward, expected_reward, rectangle, sample_labels
from zorl.head_tuning import LabelGoal
from zorl.objectives import Asked, columns_of
from zorl.policies import Policy, Row
from zorl.probe import CENTRE, Point, Scores
from zorl.prompts import Answer, Prompt
from zorl.reward_functions import RewardFunctions, RewardValues, stack_totals
from zorl.scoring import LabelWords


@dataclass(frozen=True, slots=True)
class _Batch:
    """What reward functions get besides the answers."""

    prompts: list[Any]
    columns: dict[str, list[Any]]
    label_names: list[str] | None

    @classmethod
    def from_rows(cls, prompt: Prompt, rows: Sequence[Row]) -> _Batch:
        return cls([prompt.render(row).prompt for row in rows], columns_of(rows), list(prompt.labels) or None)

    def of(self, rows: Sequence[int]) -> _Batch:
        """The part for the rows with these indices."""
        columns = {name: [column[i] for i in rows] for name, column in self.columns.items()}
        return _Batch([self.prompts[i] for i in rows], columns, self.label_names)

    def score(self, functions: RewardFunctions, answers: Sequence[Answer], trainer_state: Any = None) -> RewardValues:
        """What the functions make of an answer to each row."""
        return functions(
            prompts=self.prompts,
            completions=[answer.completion for answer in answers],
            completion_ids=[answer.completion_ids for answer in answers],
            columns=self.columns,
            label_names=self.label_names,
            trainer_state=trainer_state,
        )


@dataclass(slots=True)
class RewardObjective:
    """Completions at each point, scored by reward functions on the whole batch at once.

    Args:
        metrics: functions that are recorded at evaluations and never optimised.
        label_reward: the reward for a prompt with label words or options: "expected" under their probabilities (see
            `zorl.expected_reward`), or that of the "best" one.
        trainer_state: transformers' `TrainerState`, handed on to the functions as TRL does.
    """

    policy: Policy
    rewards: RewardFunctions
    metrics: RewardFunctions | None = None
    label_reward: LabelReward = "expected"
    trainer_state: Any = None
    _scores_sets: bool = False  # known after the first batch

    @property
    def name(self) -> str:
        return "+".join(self.rewards.names)

    def ask(self, rows: Sequence[Row], points: Sequence[Point], noise_seed: int) -> Asked:
        if self.label_reward == "expected" and isinstance(self.policy, Choosing):
            return self._ask_expected(rows, points, noise_seed, self.policy)
        answers = self.policy.answers(rows, points, noise_seed=noise_seed)
        batch = self._batch(rows)
        values = [self._score(self.rewards, batch, completions) for completions in answers]
        return Asked(Scores(stack_totals(values)), self._means(values) | _logged(values))

    def evaluate(self, rows: Sequence[Row]) -> dict[str, float]:
        (answers,) = self.policy.answers(rows, [CENTRE])
        return self.judged(rows, answers)

    def judged(self, rows: Sequence[Row], answers: Sequence[Answer]) -> dict[str, float]:
        """What `evaluate` makes of an answer to each row."""
        batch = self._batch(rows)
        scored = self._score(self.rewards, batch, answers)
        figures = {"reward": scored.total.nanmean().item()}
        for functions in (self.rewards, *([self.metrics] if self.metrics is not None else [])):
            result = scored if functions is self.rewards else self._score(functions, batch, answers)
            figures |= result.means()
        return figures

    def _ask_expected(self, rows: Sequence[Row], points: Sequence[Point], noise_seed: int, policy: Choosing) -> Asked:
        every = policy.every_answer(rows)
        counts = [len(of_row) for of_row in every]
        scores = policy.scores(rows, points).cpu()  # (points, rows, labels)
        if not self._scores_sets:
            values = self._of_every_label(rows, every)
            self._scores_sets = values.set_level
            if not values.set_level:
                means = {
                    f"rewards/{name}/mean": expected_reward(scores, rectangle(of_one, counts)).nanmean().item()
                    for name, of_one in zip(values.names, values.values, strict=True)
                }
                total = expected_reward(scores, rectangle(values.total, counts))
                return Asked(Scores(total), means | _logged([values]))
        return self._of_draws(rows, every, scores, noise_seed, DRAWS)

    def _of_every_label(self, rows: Sequence[Row], every: Sequence[Sequence[Answer]]) -> RewardValues:
        """The rewards of each label as the answer to each row, row by row."""
        pairs = [(row, answer) for row, answers in zip(rows, every, strict=True) for answer in answers]
        return self._score(self.rewards, self._batch([row for row, _ in pairs]), [answer for _, answer in pairs])

    def _of_draws(
        self, rows: Sequence[Row], every: Sequence[Sequence[Answer]], scores: Tensor, noise_seed: int, draws: int
    ) -> Asked:
        """The mean rewards of answers drawn from the labels' probabilities `(points, rows, labels)`.

        A point with NaN among its scores answers nothing, so no function sees it, and it abstains.
        """
        batch = self._batch(rows)
        sound = ~scores.isnan().flatten(1).any(dim=1)  # (points,)
        values = [
            [self._score(self.rewards, batch, [of[i] for of, i in zip(every, at, strict=True)]) for at in draw]
            for draw in sample_labels(scores[sound], noise_seed, draws).tolist()  # [draw][sound point][row]
        ]
        every_value = [value for of_points in values for value in of_points]
        means = self._means(every_value) | _logged(every_value)
        if not every_value:
            return Asked(Scores(torch.full((len(scores), 1), math.nan)), means)
        totals = stack_totals(every_value)  # (draws · sound points, 1 or rows)
        rewards = totals.new_full((len(scores), totals.shape[1]), math.nan)
        rewards[sound] = totals.view(draws, -1, totals.shape[1]).nanmean(dim=0)
        return Asked(Scores(rewards), means)

    def _means(self, values: Sequence[RewardValues]) -> dict[str, float]:
        means = [value.means() for value in values]
        return {f"rewards/{n}/mean": torch.tensor([m[n] for m in means]).nanmean().item() for n in self.rewards.names}

    def label_goal(self, rows: Sequence[Row]) -> LabelGoal:
        """The rewards as a function of the label scores of these rows."""
        assert isinstance(self.policy, LabelWords)
        return _RewardGoal(self, self.policy, rows)

    def _score(self, functions: RewardFunctions, batch: _Batch, answers: Sequence[Answer]) -> RewardValues:
        return batch.score(functions, answers, self.trainer_state)

    def _batch(self, rows: Sequence[Row]) -> _Batch:
        return _Batch.from_rows(self.policy.prompt, rows)


class _RewardGoal:
    """See `zorl.head_tuning.LabelGoal`."""

    def __init__(self, objective: RewardObjective, policy: LabelWords, rows: Sequence[Row]) -> None:
        self._objective, self._rows = objective, rows
        self._every = policy.every_answer(rows)
        self._batch = objective._batch(rows)
        self.scores, self.states = policy.words_and_states(rows)

    def best(self, scores: Tensor, rows: Tensor) -> float:
        return self._total(scores.argmax(dim=1), rows)

    def of_each_label(self, answers: Tensor) -> Tensor:
        values = self._objective._of_every_label(self._rows, self._every)
        if not values.set_level:
            return values.total.view(len(self._rows), -1)
        rows = torch.arange(len(self._rows))
        every = torch.full(self.scores.shape, self._total(answers, rows), dtype=torch.float64)
        for row, label in itertools.product(range(every.shape[0]), range(every.shape[1])):
            if label != answers[row]:
                every[row, label] = self._total(answers.index_fill(0, rows[row], label), rows)
        return every.masked_fill(every.isinf(), math.nan)

    def _total(self, answers: Tensor, rows: Tensor) -> float:
        """The mean reward of labels, by index, as the answers to these rows; −inf where none applies."""
        among = rows.tolist()
        chosen = [self._every[i][label] for i, label in zip(among, answers.tolist(), strict=True)]
        values = self._objective._score(self._objective.rewards, self._batch.of(among), chosen).total
        return values.nanmean().nan_to_num(nan=-math.inf).item()


def _logged(values: Sequence[RewardValues]) -> dict[str, float]:
    """Means of the numbers that the functions logged with `log_metric`."""
    names = {name for value in values for name in value.metrics}
    return {name: statistics.fmean(n for value in values for n in value.metrics.get(name, [])) for name in names}


def score_answers(
    functions: RewardFunctions, prompt: Prompt, rows: Sequence[Row], answers: Sequence[Answer]
) -> RewardValues:
    """What reward functions make of an answer to each row, outside of training."""
    return _Batch.from_rows(prompt, rows).score(functions, answers)
