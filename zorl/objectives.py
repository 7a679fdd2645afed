"""What is asked at a probe's points: rewards, a loss, or a judge. Each answers in the estimator's terms."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from zorl import processes
from zorl.choosing import Choosing
from zorl.directions import derive_seed
from zorl.expected_reward import DRAWS, LabelReward, expected_reward, rectangle, sample_labels
from zorl.generation import Generation
from zorl.head_tuning import LabelGoal
from zorl.label_loss import LabelLoss
from zorl.perturbation import Evaluator
from zorl.policies import Policy, Row
from zorl.probe import CENTRE, Answers, Choice, Point, Scores, Verdict, Verdicts
from zorl.prompts import Answer, Prompt
from zorl.reward_functions import RewardFunctions, RewardValues, stack_totals
from zorl.scoring import LabelWords
from zorl.teacher_forcing import TeacherForcing

LossFunction = Callable[[Any, Sequence[Row]], Any]


class Judge(Protocol):
    """Compares completions without knowing where they come from.

    It is called with keywords: prompts, the two completions of each, `request_id` (a text that names the run and step, so
    that a judge that is asked again after a restart knows the question), and the data set's columns.
    """

    def __call__(
        self,
        prompts: Sequence[Any],
        first: Sequence[Any],
        second: Sequence[Any],
        *,
        request_id: str,
        **columns: Any,
    ) -> Sequence[Choice | str]: ...


@dataclass(frozen=True, slots=True)
class Asked:
    """Answers to a probe, and figures for the log (name → number)."""

    answers: Answers
    figures: dict[str, float] = field(default_factory=dict)


class Objective(Protocol):
    @property
    def name(self) -> str: ...

    def ask(self, rows: Sequence[Row], points: Sequence[Point], noise_seed: int) -> Asked:
        """Evaluates the points on a batch of rows."""

    def evaluate(self, rows: Sequence[Row]) -> dict[str, float]:
        """Figures of θ itself on a whole split; `reward` is among them wherever there is one."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """What reward functions are told of rows, besides the answers."""

    prompts: list[Any]
    columns: dict[str, list[Any]]

    def of(self, rows: Sequence[int]) -> _Batch:
        """Those of the rows with these indices."""
        columns = {name: [column[i] for i in rows] for name, column in self.columns.items()}
        return _Batch([self.prompts[i] for i in rows], columns)


@dataclass(slots=True)
class RewardObjective:
    """Completions at each point, scored by reward functions on the whole batch at once.

    Args:
        metrics: functions that are recorded at evaluations and never optimised.
        label_reward: of a prompt with label words or options: "expected" under their probabilities (see
            `zorl.expected_reward`), or of the "best" one.
        trainer_state: transformers' `TrainerState`, handed on to the functions as TRL does.
    """

    policy: Policy
    rewards: RewardFunctions
    metrics: RewardFunctions | None = None
    label_reward: LabelReward = "expected"
    trainer_state: Any = None
    _scores_sets: bool = False  # known from the first batch on

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
        """Of each label as the answer to each row, row by row."""
        pairs = [(row, answer) for row, answers in zip(rows, every, strict=True) for answer in answers]
        return self._score(self.rewards, self._batch([row for row, _ in pairs]), [answer for _, answer in pairs])

    def _of_draws(
        self, rows: Sequence[Row], every: Sequence[Sequence[Answer]], scores: Tensor, noise_seed: int, draws: int
    ) -> Asked:
        """Of answers drawn by the labels' probabilities `(points, rows, labels)`."""
        batch = self._batch(rows)
        values = [
            [self._score(self.rewards, batch, [of[i] for of, i in zip(every, at, strict=True)]) for at in draw]
            for draw in sample_labels(scores, noise_seed, draws).tolist()  # [draw][point][row]
        ]
        every_value = [value for of_points in values for value in of_points]
        totals = stack_totals(every_value).view(len(values), len(scores), -1)  # (draws, points, 1 or rows)
        return Asked(Scores(totals.nanmean(dim=0)), self._means(every_value) | _logged(every_value))

    def _means(self, values: Sequence[RewardValues]) -> dict[str, float]:
        means = [value.means() for value in values]
        return {f"rewards/{n}/mean": torch.tensor([m[n] for m in means]).nanmean().item() for n in self.rewards.names}

    def label_goal(self, rows: Sequence[Row]) -> LabelGoal:
        """The rewards as a function of the label scores of these rows."""
        assert isinstance(self.policy, LabelWords)
        return _RewardGoal(self, self.policy, rows)

    def _score(self, functions: RewardFunctions, batch: _Batch, answers: Sequence[Answer]) -> RewardValues:
        return functions(
            prompts=batch.prompts,
            completions=[answer.completion for answer in answers],
            completion_ids=[answer.completion_ids for answer in answers],
            columns=batch.columns,
            label_names=list(self.policy.prompt.labels) or None,
            trainer_state=self.trainer_state,
        )

    def _batch(self, rows: Sequence[Row]) -> _Batch:
        return _Batch([self.policy.prompt.render(row).prompt for row in rows], columns_of(rows))


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


@dataclass(slots=True)
class CrossEntropy:
    """The negative log-likelihood of what is right, one number a row (MeZO's objective): of the true label among the answers to
    choose from, or of the text that is to be generated.
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
        loss = self.losses(rows, [CENTRE]).mean().item()
        figures = {"reward": -loss, "loss": loss}
        if self.metrics is not None:
            figures |= RewardObjective(self.policy, self.metrics).evaluate(rows) | {"reward": -loss}
        return figures

    def label_goal(self, rows: Sequence[Row]) -> LabelGoal:
        """The mean log-likelihood of the true label word as a function of the label scores of these rows."""
        assert isinstance(self.losses, LabelLoss)
        return self.losses.goal(rows)


@dataclass(slots=True)
class CallableLoss:
    """Any `loss(model, rows)` → a float, or one per row: lower is better."""

    evaluator: Evaluator
    loss: LossFunction

    @property
    def name(self) -> str:
        return f"loss:{getattr(self.loss, '__name__', type(self.loss).__name__)}"

    def ask(self, rows: Sequence[Row], points: Sequence[Point], noise_seed: int) -> Asked:
        losses = self.losses(rows, points)
        return Asked(Scores.of_losses(losses), {"objective": losses.nanmean().item()})

    def evaluate(self, rows: Sequence[Row]) -> dict[str, float]:
        loss = self.losses(rows, [CENTRE]).nanmean().item()
        return {"reward": -loss, "loss": loss}

    def losses(self, rows: Sequence[Row], points: Sequence[Point]) -> Tensor:
        """Of each row at each point, `(points, rows)`, or `(points, 1)` where the loss is one number; float64."""
        # A loss may be one number for all rows, so processes share the points.
        parts = processes.share(points, lambda mine: {str(i): self._evaluate(rows, p) for i, p in enumerate(mine)})
        return torch.stack([part[str(i)] for part in parts for i in range(len(part))])

    def _evaluate(self, rows: Sequence[Row], point: Point) -> Tensor:
        value = self.evaluator.evaluate(point, lambda: self.loss(self.evaluator.module, rows))
        # On the CPU, where a plain number lies: a loss may be NaN at one point and a GPU's tensor at the next.
        losses = torch.as_tensor(value, dtype=torch.float64).reshape(-1).cpu()
        if len(losses) not in (1, len(rows)):
            raise ValueError(f"the loss returned {len(losses)} numbers for {len(rows)} rows; return one, or one a row")
        return losses


@dataclass(slots=True)
class JudgeObjective:
    """A judge's opinion on the two sides of each direction. It never learns which side is which.

    Identical answers tie without being shown. The order of each pair is drawn from (seed, direction, row).
    """

    policy: Policy
    judge: Judge
    metrics: RewardFunctions | None = None

    @property
    def name(self) -> str:
        return f"judge:{getattr(self.judge, '__name__', type(self.judge).__name__)}"

    def ask(self, rows: Sequence[Row], points: Sequence[Point], noise_seed: int) -> Asked:
        answers = self.policy.answers(rows, points, noise_seed=noise_seed)
        verdicts: list[Verdict] = []
        shown: list[tuple[int, int, bool]] = []  # (index of the plus side, row, flipped)
        for plus in range(0, len(points), 2):
            for i in range(len(rows)):
                if answers[plus][i].completion == answers[plus + 1][i].completion:
                    verdicts.append(Verdict(plus, plus + 1, i, Choice.TIE))
                else:
                    shown.append((plus, i, bool(derive_seed(noise_seed, "order", plus, i) & 1)))
        if shown:
            pairs = [(answers[p][i].completion, answers[p + 1][i].completion) for p, i, _ in shown]
            ordered = [pair[::-1] if flipped else pair for pair, (_, _, flipped) in zip(pairs, shown, strict=True)]
            asked = partial(
                self.judge,
                prompts=[self.policy.prompt.render(rows[i]).prompt for _, i, _ in shown],
                first=[first for first, _ in ordered],
                second=[second for _, second in ordered],
                request_id=f"{noise_seed:016x}",
                **_columns_for_judge([rows[i] for _, i, _ in shown]),
            )
            choices = processes.first(lambda: list(asked()))
            if len(choices) != len(shown):
                raise ValueError(f"the judge gave {len(choices)} verdicts on {len(shown)} pairs")
            for (plus, i, flipped), choice in zip(shown, choices, strict=True):
                opinion = Choice(choice)
                verdicts.append(Verdict(plus, plus + 1, i, opinion.flipped if flipped else opinion))
        preferences = [verdict.choice.preference for verdict in verdicts]
        informative = sum(p in (1.0, -1.0) for p in preferences) / len(preferences)
        return Asked(Verdicts(tuple(verdicts)), {"decided_share": informative})

    def evaluate(self, rows: Sequence[Row]) -> dict[str, float]:
        return RewardObjective(self.policy, self.metrics).evaluate(rows) if self.metrics is not None else {}


def make_objective(
    policy: Policy,
    *,
    rewards: RewardFunctions | None = None,
    judge: Judge | None = None,
    loss: str | LossFunction | None = None,
    metrics: RewardFunctions | None = None,
    label_column: str = "label",
    label_reward: LabelReward = "expected",
) -> Objective:
    """The objective of exactly one of `rewards`, `judge` and `loss`.

    Raises:
        ValueError: `loss` is neither a function nor `"cross_entropy"`, or the policy cannot tell how likely an answer is.
    """
    if rewards is not None:
        return RewardObjective(policy, rewards, metrics, label_reward)
    if judge is not None:
        return JudgeObjective(policy, judge, metrics)
    if callable(loss):
        return CallableLoss(policy.evaluator, loss)
    if loss != "cross_entropy":
        raise ValueError(f"loss must be 'cross_entropy' or a function of (model, rows), got {loss!r}")
    if isinstance(policy, Generation):
        return CrossEntropy(policy, TeacherForcing(policy, label_column), metrics)
    if not isinstance(policy, Choosing):
        raise ValueError(
            f"loss='cross_entropy' needs a policy that scores what is right, and {type(policy).__name__} does not"
        )
    return CrossEntropy(policy, LabelLoss(policy, label_column), metrics)


def _logged(values: Sequence[RewardValues]) -> dict[str, float]:
    """Means of the numbers that the functions logged with `log_metric`."""
    names = {name for value in values for name in value.metrics}
    return {name: statistics.fmean(n for value in values for n in value.metrics.get(name, [])) for name in names}


def _columns_for_judge(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """The columns that a judge gets; the column `prompt` is in its prompts.

    Raises:
        ValueError: a column bears the name of one of its other arguments.
    """
    columns = {name: column for name, column in columns_of(rows).items() if name != "prompt"}
    if clash := sorted(columns.keys() & {"prompts", "first", "second", "request_id"}):
        raise ValueError(f"data set column '{clash[0]}' has the name of an argument of judges; rename it")
    return columns


def score_answers(
    functions: RewardFunctions, prompt: Prompt, rows: Sequence[Row], answers: Sequence[Answer]
) -> RewardValues:
    """What reward functions make of an answer to each row."""
    return functions(
        prompts=[prompt.render(row).prompt for row in rows],
        completions=[answer.completion for answer in answers],
        completion_ids=[answer.completion_ids for answer in answers],
        columns=columns_of(rows),
        label_names=list(prompt.labels) or None,
    )


def columns_of(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """The rows' columns as lists, as TRL passes them."""
    return {name: [row.get(name) for row in rows] for name in rows[0]}
