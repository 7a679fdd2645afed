"""Where tuning starts: a head or biases for label words, or a classifier's last layer, fitted to some training rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from zorl import processes
from zorl.classifier_head import ClassifierHead
from zorl.config import MeZOConfig
from zorl.directions import derive_seed
from zorl.head_tuning import LabelGoal, fit_bias, fit_head
from zorl.linear_probe import probe
from zorl.loss_objectives import CrossEntropy
from zorl.objectives import Objective
from zorl.prompts import Prompt
from zorl.reward_objective import RewardObjective
from zorl.scoring import LabelWords


class StartingPoint:
    """Fits where tuning starts. The rows are evaluated once, whatever is fitted to them.

    Args:
        rows: the training rows to fit to; none of a data set that is read as a stream.
        rows_per_step: the rows of a batch, in which forwards are counted.
        args: the settings of the run.

    Attributes:
        forwards: evaluations of a batch that this has taken.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], rows_per_step: int, args: MeZOConfig) -> None:
        self.forwards = 0
        self._rows, self._args = rows, args
        self._cost = math.ceil(len(rows) / rows_per_step)
        self._goal: LabelGoal | None = None

    def prompt(self, prompt: Prompt, objective: Objective, kind: str) -> Prompt:
        """The prompt with a head or biases for its label words; the same prompt where there is nothing to fit.

        Args:
            prompt: a head that it came with is kept.
            objective: what the labels are fitted to.
            kind: "auto", "head", "bias" or "none".

        Raises:
            ValueError: the kind is that of a classifier.
        """
        if kind == "probe":
            raise ValueError(
                "calibration='probe' fits the head of a sequence-classification model: use 'head' or 'bias'"
            )
        if kind == "none" or (prompt.label_head is not None and self._goal is None):
            return prompt
        goal = self._label_goal(objective)
        if goal is None:
            return prompt

        def fitted() -> dict[str, Any]:
            if kind == "bias":
                return replace(prompt, label_head=fit_bias(goal)).to_dict()
            quiet = self._args.disable_tqdm
            # With a delay, a reward that fails at once leaves no empty bar in front of its error.
            with tqdm(desc="label head", unit="step", leave=False, delay=0.1, disable=quiet) as bar:
                head = fit_head(goal, derive_seed(self._args.seed, "label head"), bar.update)
            return replace(prompt, label_head=head).to_dict()

        return Prompt.from_dict(processes.first(fitted))

    def probe(self, policy: ClassifierHead, kind: str, *, new_head: bool, tuned: bool) -> None:
        """Writes the last layer of a classifier, by logistic regression on the true labels.

        Args:
            policy: the classifier.
            kind: "auto", which fits a new head where there are labels, "probe" or "none".
            new_head: whether the head is one that no checkpoint holds.
            tuned: whether a run has begun to tune the weights.

        Raises:
            ValueError: the kind is that of label words, there are no true labels, or the weights are being tuned.
        """
        if kind in ("head", "bias"):
            raise ValueError(f"calibration={kind!r} is for label words: use 'probe' for a classifier, or 'none'")
        column = self._args.label_column
        labelled = bool(self._rows) and column in self._rows[0]
        if kind == "none" or (kind == "auto" and not (new_head and labelled)):
            return
        if not labelled:
            raise ValueError(f"calibration='probe' needs rows with true labels, and there is no column {column!r}")
        if tuned:
            raise ValueError(
                "calibration='probe' writes weights, which a run has begun to tune: call it before train()"
            )
        probe(policy, self._rows, [str(row[column]) for row in self._rows])
        self.forwards = self._cost

    def forget(self) -> None:
        """Forgets how the rows were evaluated, before the weights change."""
        self._goal = None

    def _label_goal(self, objective: Objective) -> LabelGoal | None:
        """The objective on the rows, evaluated once; None where there is nothing to fit."""
        if not isinstance(objective, RewardObjective | CrossEntropy) or not isinstance(objective.policy, LabelWords):
            return None
        if self._goal is None and self._rows:
            self._goal = objective.label_goal(self._rows)
            self.forwards = self._cost
        return self._goal
