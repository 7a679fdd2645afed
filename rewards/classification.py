"""Classification metrics as rewards. scikit-learn computes them; higher is better.

Completions and the data set's truth are compared as text, `str(value)` without surrounding white space. A completion
that is not one of the labels is a wrong answer. F1, balanced accuracy and Matthews' coefficient are properties of a set of
answers, so they return one number for the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from sklearn.metrics import f1_score, matthews_corrcoef, recall_score

from zorl.reward_functions import RewardFunction
from zorl.reward_models import Messages, text_of
from zorl.rewards.columns import truth_of

Average = Literal["macro", "micro", "weighted", "binary"]
Completions = Sequence[str | Messages]


def accuracy(column: str = "label") -> RewardFunction:
    """1 for a right answer and 0 for a wrong one, per sample; the mean is the accuracy.

    Args:
        column: the data set's column with the truth.
    """
    return _Accuracy(column)


def f1(
    average: Average | None = None, column: str = "label", *, pos_label: str | int | bool | None = None
) -> RewardFunction:
    """F1 of the batch: macro by default, or of one chosen label.

    The macro and weighted means are over the labels that occur in the truth of the batch. A label that does not occur
    has F1 = 0 whatever is answered; leaving it out makes a perfect answer score 1, and scales all answers to one batch
    alike, so comparisons between them are those of the full label set.

    Args:
        average: macro, micro (for answers of one label this is the accuracy), weighted by the labels' frequency, or
            binary (of `pos_label`).
        column: the data set's column with the truth.
        pos_label: the label whose F1 is the reward; with `average="binary"` it is 1 by default, as in scikit-learn.
            Where it occurs neither in the truth nor in the answers of a batch, F1 is 0.

    Raises:
        ValueError: an unknown average, or one over labels together with `pos_label`.
    """
    if average is not None and average not in get_args(Average):
        raise ValueError(f"average must be one of {', '.join(get_args(Average))}, got {average!r}")
    if pos_label is not None and average not in (None, "binary"):
        raise ValueError(f"average={average!r} is over all labels and pos_label={pos_label!r} chooses one; give either")
    if pos_label is None and average == "binary":
        pos_label = 1
    return _F1("macro" if average is None else average, None if pos_label is None else _text(pos_label), column)


def balanced_accuracy(column: str = "label") -> RewardFunction:
    """The mean recall over the labels that occur in the truth of the batch.

    Args:
        column: the data set's column with the truth.
    """
    return _BalancedAccuracy(column)


def matthews(column: str = "label") -> RewardFunction:
    """Matthews' correlation coefficient of the batch, −1 to 1; 0 where all truths or all answers are the same.

    Args:
        column: the data set's column with the truth.
    """
    return _Matthews(column)


# Classes rather than closures, so that rewards can be pickled (to a worker process, or with a Trainer's arguments).
@dataclass(frozen=True)
class _Accuracy:
    column: str
    __name__ = "accuracy"

    def __call__(
        self, completions: Completions, label_names: Sequence[str] | None = None, **columns: Any
    ) -> list[float]:
        truth, answers, _ = _encoded(completions, columns, self.column, label_names)
        return [float(right) for right in truth == answers]


@dataclass(frozen=True)
class _F1:
    average: Average
    pos_label: str | None
    column: str

    @property
    def __name__(self) -> str:
        return f"{self.average}_f1" if self.pos_label is None else f"f1_{self.pos_label}"

    def __call__(self, completions: Completions, label_names: Sequence[str] | None = None, **columns: Any) -> float:
        truth, answers, codes = _encoded(completions, columns, self.column, label_names)
        if self.pos_label is not None:
            if label_names is not None and self.pos_label not in codes:
                raise ValueError(f"pos_label {self.pos_label!r} is not one of the labels {', '.join(map(repr, codes))}")
            if self.pos_label not in codes:
                return 0.0  # no true positive is possible
            return float(f1_score(truth, answers, labels=[codes[self.pos_label]], average="macro", zero_division=0.0))
        scored = None if self.average == "micro" else np.unique(truth)
        return float(f1_score(truth, answers, labels=scored, average=self.average, zero_division=0.0))


@dataclass(frozen=True)
class _BalancedAccuracy:
    column: str
    __name__ = "balanced_accuracy"

    def __call__(self, completions: Completions, label_names: Sequence[str] | None = None, **columns: Any) -> float:
        truth, answers, _ = _encoded(completions, columns, self.column, label_names)
        # Its definition. sklearn's balanced_accuracy_score warns of answers that do not occur in the truth.
        return float(recall_score(truth, answers, labels=np.unique(truth), average="macro", zero_division=0.0))


@dataclass(frozen=True)
class _Matthews:
    column: str
    __name__ = "matthews"

    def __call__(self, completions: Completions, label_names: Sequence[str] | None = None, **columns: Any) -> float:
        truth, answers, _ = _encoded(completions, columns, self.column, label_names)
        if len(np.unique(truth)) == 1 or len(np.unique(answers)) == 1:
            return 0.0  # 0/0, which is 0 by convention; sklearn agrees, with warnings
        return float(matthews_corrcoef(truth, answers))


def _encoded(
    completions: Completions, columns: Mapping[str, Any], column: str, label_names: Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Truth and answers as label numbers, each of shape `(completions,)`, and the number of each label.

    The labels are the task's or, without such a list, those that occur in the truth; any other answer has the number −1.
    """
    truth = [_text(value) for value in truth_of(columns, column, len(completions))]
    labels = sorted(set(truth)) if label_names is None else [_text(name) for name in label_names]
    codes = {label: number for number, label in enumerate(labels)}
    for row, value in enumerate(truth):
        if value not in codes:
            raise ValueError(
                f"column {column!r} holds {value!r} in row {row} of the batch, which is not one of the labels "
                f"{', '.join(map(repr, labels))}"
            )
    answers = [codes.get(_text(text_of(completion)), -1) for completion in completions]
    return np.array([codes[value] for value in truth]), np.array(answers), codes


def _text(value: Any) -> str:
    return str(value).strip()
