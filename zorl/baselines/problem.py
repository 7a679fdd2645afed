"""The problem that every method is given, and what a method returns.

The unit of cost is one forward of a batch, as for MeZO: a step of SPSA takes two. A backward pass counts as two forwards,
because it computes two matrix products where a forward computes one. Generating a batch counts as one forward, whatever the
length of its texts. Scoring the development rows is not part of learning: its cost is reported separately.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from tqdm import tqdm

from zorl.baselines.centre import Centre
from zorl.config import MeZOConfig
from zorl.data import checked_rows
from zorl.models import load_model, load_processing_class
from zorl.policies import Policy, make_policy
from zorl.probe import CENTRE
from zorl.prompts import MASK, Answer, Prompt
from zorl.reward_functions import RewardFunction, RewardFunctions, RewardValues
from zorl.reward_models import text_of
from zorl.reward_objective import score_answers
from zorl.sampling import StratifiedSampler
from zorl.scoring import LabelWords
from zorl.teacher_forcing import taught_text

Rows = Sequence[dict[str, Any]]
Report = Callable[[int], object]  # called with the forwards spent since the last call


class NotApplicable(ValueError):  # noqa: N818
    """The method does not apply to this model, prompt or reward. The message says why."""


@dataclass(frozen=True)
class Problem:
    """A problem to learn. Text is generated greedily, so that answers are a function of the weights.

    Args:
        model: a name or path. Each method loads a copy of its own.
        prompt: with label words or without.
        train: the training rows, with `label_column`.
        dev: held-out rows on which a method may choose its hyperparameters and the step to stop at.
        label_column: the column with the true label or, without label words, with the text to be generated.
        reward: a function with TRL's signature. Methods that can do so maximise it, and all of them choose by it on `dev`. By
            default it is the share of answers that equal the label.
        batch_size: rows per batch, the unit in which forwards are counted.
        budget: forwards of a batch that a method may spend on learning. A method that tries several settings may spend it on
            each.
        seed: seeds everything that is drawn; not negative.
        dtype: the weights' dtype, as in `zorl.models.load_model`. Methods that use backpropagation train in float32.
        max_length: the longest prompt, in tokens; by default what the model takes.
        max_completion_length: the longest generated text, in tokens.
        stop: the text before which generated answers end.
        forward_batch_size: rows that go through the model at once; results do not depend on it.

    Raises:
        ValueError: the rows do not fit the prompt, there is neither a reward nor a label, or a number is out of range.
    """

    model: str
    prompt: Prompt
    train: list[dict[str, Any]]
    dev: list[dict[str, Any]]
    label_column: str = "label"
    reward: RewardFunction | None = None
    batch_size: int = 32
    budget: int = 500
    seed: int = 0
    dtype: str = "float32"
    max_length: int | None = None
    max_completion_length: int = 64
    stop: str | None = None
    forward_batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("batch_size", "budget"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, rows in (("train", self.train), ("dev", self.dev)):
            checked_rows(rows, name, self.prompt, self.label_column, training=name == "train")
            if self.label_column not in rows[0] and (self.prompt.labels or self.reward is None):
                raise ValueError(
                    f"the rows of {name} have no column {self.label_column!r} to learn from; name the column with the"
                    " answers with label_column"
                )

    @cached_property
    def rewards(self) -> RewardFunctions:
        """The reward; by default 1 for an answer that equals the label and 0 for any other."""
        return RewardFunctions(_is_the_label(self.label_column) if self.reward is None else self.reward)

    @cached_property
    def _settings(self) -> MeZOConfig:
        return MeZOConfig(
            output_dir="zorl_output",  # nothing is written there
            forward_batch_size=self.forward_batch_size,
            max_length=self.max_length,
            max_completion_length=self.max_completion_length,
            stop=self.stop,
            temperature=0.0,
        )

    @property
    def device(self) -> torch.device:
        """The device of the models: the one that Trainer would choose."""
        return self._settings.device

    def load(self, dtype: str | None = None) -> tuple[Any, Any]:
        """A copy of the model, on `device` and in eval mode, and its tokenizer."""
        model: Any = load_model(self.model, self.dtype if dtype is None else dtype)
        return model.to(self.device).eval(), load_processing_class(self.model)

    def policy(self, model: Any, tokenizer: Any, prompt: Prompt | None = None) -> Policy:
        """A policy that answers with the model's current weights."""
        return make_policy(Centre(model), tokenizer, self.prompt if prompt is None else prompt, self._settings)

    def label_policy(self, model: Any, tokenizer: Any, method: str) -> LabelWords:
        """`policy`, for methods that need the same labels for all rows.

        Raises:
            NotApplicable: the prompt has no label words.
        """
        if self.prompt.label_words is None:
            raise NotApplicable(f"{method} needs a prompt with label words, and {self.prompt.template!r} has none")
        policy = self.policy(model, tokenizer)
        assert isinstance(policy, LabelWords)
        return policy

    def values(self, rows: Rows, answers: Sequence[Answer]) -> RewardValues:
        """What the rewards make of an answer to each row."""
        return score_answers(self.rewards, self.prompt, rows, answers)

    def score(self, rows: Rows, answers: Sequence[Answer]) -> float:
        """The mean reward, higher is better; −∞ where the reward applies to no row."""
        return self.values(rows, answers).total.nanmean().nan_to_num(nan=-math.inf).item()

    def sample(self, size: int) -> list[dict[str, Any]]:
        """Training rows in the proportions of the labels, drawn by the seed; all of them if there are at most `size`."""
        size = min(size, len(self.train))
        sampler = StratifiedSampler(len(self.train), size, self._labels, self.seed)
        return [self.train[i] for i in itertools.islice(sampler, size)]

    def batches(self) -> Iterator[list[dict[str, Any]]]:
        """Batches of training rows in the proportions of the labels, epoch after epoch, without end."""
        sampler = StratifiedSampler(len(self.train), self.batch_size, self._labels, self.seed)
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            order = list(sampler)
            for start in range(0, len(order), self.batch_size):
                yield [self.train[i] for i in order[start : start + self.batch_size]]

    def forwards(self, rows: Rows) -> int:
        """What one evaluation of these rows costs, in forwards of a batch."""
        return math.ceil(len(rows) / self.batch_size)

    @property
    def _labels(self) -> list[str] | None:
        return [str(row[self.label_column]) for row in self.train] if self.prompt.labels else None


@dataclass(frozen=True)
class Fitted:
    """What a method has learnt.

    Attributes:
        answers: a function from rows to their answers, one each.
        forwards: forwards of a batch spent on learning with the chosen setting. A backward pass counts as two.
        chosen: the settings chosen on the development rows, and whatever else a reader should know.
    """

    answers: Callable[[Rows], list[Answer]]
    forwards: int
    chosen: dict[str, Any] = field(default_factory=dict)


@contextmanager
def progress(method: str, forwards: int, report: Report | None) -> Iterator[Report]:
    """The function to call with forwards spent: the caller's `report`, or a progress bar's."""
    if report is not None:
        yield report
        return
    with tqdm(desc=method, total=forwards, unit="forward", leave=False) as bar:
        yield bar.update


def answers_of(policy: Policy, rows: Rows) -> list[Answer]:
    """The model's answers, in eval mode."""
    policy.evaluator.module.eval()
    with torch.no_grad():
        (answers,) = policy.answers(rows, [CENTRE])
    return answers


def target_text(prompt: Prompt, row: dict[str, Any], label_column: str) -> str:
    """The right answer as a continuation of the prompt: the label's word, or the label itself (the first, if several are right).

    It begins with a space if the prompt does not end with white space, unless the template says where the word goes.
    """
    label = row[label_column]
    if prompt.label_words is not None:
        word = prompt.label_words[str(label)]
    else:
        word = taught_text(row, label_column) if isinstance(label, Mapping | list | tuple) else str(label)
    before = prompt.render(row).before
    placed = f"{{{MASK}}}" in prompt.template and not prompt.chat
    return word if placed or before == "" or before[-1].isspace() else f" {word}"


def _is_the_label(column: str) -> RewardFunction:
    def is_the_label(completions: Sequence[Any], **columns: Any) -> list[float]:
        labels = [str(label).strip() for label in columns[column]]
        return [float(text_of(one).strip() == label) for one, label in zip(completions, labels, strict=True)]

    return is_the_label
