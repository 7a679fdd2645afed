"""Objectives: what each answers at a probe's points, and that judges are blind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from zorl.goal import Goal
from zorl.judge_objective import JudgeObjective
from zorl.label_head import LabelHead
from zorl.probe import CENTRE, Choice, Point, Scores, Verdicts
from zorl.prompts import Answer, Prompt
from zorl.reward_functions import RewardFunctions
from zorl.reward_objective import RewardObjective
from zorl.rewards import accuracy, f1
from zorl.scoring import LabelWords

PROMPT = Prompt("{text} it was {mask}", {"bad": "terrible", "good": "great"})
ROWS = [
    {"text": text, "label": label} for text, label in [("the film", "good"), ("the plot", "bad"), ("an ending", "good")]
]
POINTS = [Point(3, 0.3), Point(3, -0.3)]


@pytest.fixture
def policy(parts: Callable[[str], Any]) -> LabelWords:
    some = parts("gpt2")
    return LabelWords(some.evaluator, some.tokenizer, PROMPT)


@dataclass
class Recited:
    """A policy whose answers are written down: [point][row]."""

    said: list[list[str]]
    prompt: Prompt = PROMPT
    evaluator: Any = None

    def answers(self, rows: Sequence[Any], points: Sequence[Point], *, noise_seed: int = 0) -> list[list[Answer]]:
        return [[Answer(text, []) for text in self.said[i]] for i in range(len(points))]


def test_cross_entropy_is_the_negative_log_likelihood_of_the_true_label(policy: LabelWords) -> None:
    objective = Goal(loss="cross_entropy").objective(policy)
    answers = objective.ask(ROWS, POINTS, 0).answers
    assert isinstance(answers, Scores)
    scores = policy.scores(ROWS, POINTS)
    expected = torch.stack([scores[:, i, int(row["label"] == "good")] for i, row in enumerate(ROWS)], dim=1)
    assert torch.allclose(answers.values, expected.double())
    assert objective.evaluate(ROWS)["loss"] == pytest.approx(-objective.evaluate(ROWS)["reward"])


def test_a_callable_loss_sees_the_model_at_each_point(policy: LabelWords) -> None:
    weight = policy.evaluator.module.get_input_embeddings()

    def loss(model: Any, rows: Sequence[Any]) -> float:
        return float(model.get_input_embeddings()(torch.tensor([5])).detach().sum())

    objective = Goal(loss=loss).objective(policy)
    plus, minus = objective.ask(ROWS, POINTS, 0).answers.values[:, 0].tolist()  # type: ignore[union-attr]
    centre = float(weight(torch.tensor([5])).detach().sum())
    assert objective.evaluate(ROWS)["loss"] == pytest.approx(centre)
    assert plus != minus
    assert -(plus + minus) / 2 == pytest.approx(centre, abs=1e-5)  # symmetric around θ
    with pytest.raises(ValueError, match="returned 2 numbers for 3 rows"):
        Goal(loss=lambda model, rows: [1.0, 2.0]).objective(policy).evaluate(ROWS)


def test_a_set_level_reward_gives_one_score_a_point_and_metrics_are_not_optimised() -> None:
    policy = Recited([["good", "bad", "good"], ["good", "good", "bad"]])
    share = lambda completions, label, **_: sum(c == t for c, t in zip(completions, label, strict=True)) / 3  # noqa: E731
    objective = RewardObjective(policy, RewardFunctions(share), RewardFunctions(lambda completions, **_: [7.0] * 3))
    assert objective.ask(ROWS, POINTS, 0).answers.values.tolist() == [[1.0], [pytest.approx(1 / 3)]]  # type: ignore[union-attr]
    figures = objective.evaluate(ROWS)
    assert figures["reward"] == 1.0
    assert 7.0 in figures.values()


def test_the_expected_reward_weighs_each_labels_reward_by_its_probability(policy: LabelWords) -> None:
    asked: list[int] = []

    def reward(completions: list[str], label: list[str], **_: Any) -> list[float | None]:
        asked.append(len(completions))
        return [None if t == "bad" else 2.0 * (c == t) for c, t in zip(completions, label, strict=True)]

    values = RewardObjective(policy, RewardFunctions(reward)).ask(ROWS, POINTS, 0).answers.values  # type: ignore[union-attr]
    p = policy.scores(ROWS, POINTS).exp().double()
    assert asked == [len(ROWS) * 2], "each label is scored once, for both points"
    assert torch.allclose(values[:, [0, 2]], 2.0 * p[:, [0, 2], 1])
    assert values[:, 1].isnan().all(), "no label of this row has a reward"


def test_a_collapsed_classifier_still_finds_a_difference(parts: Callable[[str], Any]) -> None:
    """Where all answers are one label accuracy is flat, and its expectation is not."""
    some = parts("gpt2")
    collapsed = LabelWords(some.evaluator, some.tokenizer, replace(PROMPT, label_head=LabelHead((30.0, 0.0))))
    flat = RewardObjective(collapsed, RewardFunctions(accuracy()), label_reward="best").ask(ROWS, POINTS, 0).answers
    assert flat.values[0].tolist() == flat.values[1].tolist()  # type: ignore[union-attr]
    steep = RewardObjective(collapsed, RewardFunctions(accuracy())).ask(ROWS, POINTS, 0).answers
    assert steep.values[0].mean() != steep.values[1].mean()  # type: ignore[union-attr]


@pytest.mark.parametrize("reward", [accuracy(), f1()], ids=["of each answer", "of the set"])
def test_a_point_whose_scores_are_nan_abstains(policy: LabelWords, reward: Any) -> None:
    sound, broken = POINTS[0], Point(3, 1e30)
    assert policy.scores(ROWS, [broken]).isnan().all()
    objective = RewardObjective(policy, RewardFunctions(reward))
    alone, both, neither = (objective.ask(ROWS, points, 0) for points in ([sound], [sound, broken], [broken, broken]))
    values = both.answers.values  # type: ignore[union-attr]
    assert torch.equal(values[0], alone.answers.values[0])  # type: ignore[union-attr]
    assert values[0].isfinite().all()
    assert values[1].isnan().all()
    assert neither.answers.values.isnan().all()  # type: ignore[union-attr]
    assert len(neither.answers.values) == 2  # type: ignore[union-attr]
    assert both.figures == alone.figures, "what is logged is of the points that answered"


def test_a_set_with_one_row_of_nan_scores_has_no_reward(policy: LabelWords, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = policy.scores(ROWS, POINTS)
    scores[1, 2] = math.nan
    monkeypatch.setattr(policy, "scores", lambda rows, points: scores)
    values = RewardObjective(policy, RewardFunctions(f1())).ask(ROWS, POINTS, 0).answers.values  # type: ignore[union-attr]
    assert values.isnan().flatten().tolist() == [False, True]


def test_a_goal_of_labels_is_the_reward_as_a_function_of_answers(policy: LabelWords) -> None:
    asked: list[int] = []

    def right(completions: list[str], label: list[str], **_: Any) -> list[float]:
        asked.append(len(completions))
        return [float(c == t) for c, t in zip(completions, label, strict=True)]

    goal = RewardObjective(policy, RewardFunctions(right)).label_goal(ROWS)
    every = torch.arange(len(ROWS))
    assert torch.equal(goal.scores, policy.scores(ROWS, [CENTRE])[0])
    assert goal.best(goal.scores + torch.tensor([0.0, 100.0]), every) == pytest.approx(2 / 3)
    assert goal.best(goal.scores + torch.tensor([100.0, 0.0]), every) == pytest.approx(1 / 3)
    assert goal.best((goal.scores + torch.tensor([100.0, 0.0]))[1:2], every[1:2]) == 1.0, "row 1 is the bad one"
    asked.clear()
    assert goal.of_each_label(goal.scores.argmax(1)).tolist() == [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    assert asked == [len(ROWS) * 2], "each label is scored once"


def test_a_goal_of_a_set_changes_one_answer_at_a_time(policy: LabelWords) -> None:
    share = lambda completions, label, **_: sum(c == t for c, t in zip(completions, label, strict=True)) / len(label)  # noqa: E731
    goal = RewardObjective(policy, RewardFunctions(share)).label_goal(ROWS)
    every = goal.of_each_label(torch.tensor([0, 0, 0]))  # of which row 1 alone is right
    assert torch.allclose(every, torch.tensor([[1, 2], [1, 0], [1, 2]]).double() / 3)


def test_a_set_reward_may_abstain_in_some_draws(policy: LabelWords) -> None:
    """A metric that is undefined without a positive answer returns None for every row, and one number otherwise."""

    def precision(completions: list[str], label: list[str], **_: Any) -> Any:
        positive = [t == "good" for c, t in zip(completions, label, strict=True) if c == "good"]
        return sum(positive) / len(positive) if positive else [None] * len(completions)

    objective = RewardObjective(policy, RewardFunctions(precision))
    for seed in range(8):  # of one row, so that about half of the draws abstain
        values = objective.ask(ROWS[:1], POINTS, seed).answers.values  # type: ignore[union-attr]
        assert values.shape == (2, 1)


def test_the_goal_of_cross_entropy_is_the_likelihood_of_the_truth(policy: LabelWords) -> None:
    goal = Goal(loss="cross_entropy").objective(policy).label_goal(ROWS)  # type: ignore[attr-defined]
    expected = goal.scores[[0, 1, 2], [1, 0, 1]].double()
    assert goal.best(goal.scores, torch.arange(3)) == pytest.approx(expected.mean().item())
    assert goal.best(goal.scores[1:], torch.arange(1, 3)) == pytest.approx(expected[1:].mean().item())
    assert goal.of_each_label(torch.zeros(3, dtype=torch.int64)).tolist() == [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]


def test_a_judge_never_learns_the_side_and_identical_answers_tie_unseen() -> None:
    rows = [{"text": str(i)} for i in range(200)]
    policy = Recited([["left"] * 199 + ["same"], ["right"] * 199 + ["same"]])
    seen: list[tuple[str, str]] = []

    def prefers_left(prompts: Any, first: Sequence[str], second: Sequence[str], **columns: Any) -> list[str]:
        seen.extend(zip(first, second, strict=True))
        return ["first" if one == "left" else "second" for one in first]

    answers = JudgeObjective(policy, prefers_left).ask(rows, POINTS, 11).answers
    assert isinstance(answers, Verdicts)
    assert len(seen) == 199
    assert 60 < sum(first == "left" for first, _ in seen) < 140  # shown in both orders, about as often
    assert [verdict.choice for verdict in answers.items if verdict.prompt == 199] == [Choice.TIE]
    assert all(v.choice is Choice.FIRST and v.point_a == 0 for v in answers.items if v.prompt < 199)


def test_abstaining_survives_the_flip() -> None:
    rows = [{"text": str(i)} for i in range(20)]
    policy = Recited([["left"] * 20, ["right"] * 20])
    judge = lambda prompts, first, second, **_: ["abstain"] * len(first)  # noqa: E731
    answers = JudgeObjective(policy, judge).ask(rows, POINTS, 1).answers
    assert isinstance(answers, Verdicts)
    assert all(verdict.choice is Choice.ABSTAIN and math.isnan(verdict.choice.preference) for verdict in answers.items)


def test_a_judge_that_skips_pairs_or_invents_words_is_an_error() -> None:
    policy = Recited([["a"], ["b"]])
    with pytest.raises(ValueError, match="gave 0 verdicts on 1 pairs"):
        JudgeObjective(policy, lambda **_: []).ask(ROWS[:1], POINTS, 0)
    with pytest.raises(ValueError, match="'maybe' is not a valid Choice"):
        JudgeObjective(policy, lambda **_: ["maybe"]).ask(ROWS[:1], POINTS, 0)


def test_a_loss_that_is_no_loss_is_refused(policy: LabelWords) -> None:
    with pytest.raises(ValueError, match="'cross_entropy' or a function"):
        Goal(loss="crossentropy").objective(policy)
    with pytest.raises(ValueError, match="needs a policy that scores what is right, and Recited"):
        Goal(loss="cross_entropy").objective(Recited([]))
