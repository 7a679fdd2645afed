"""Cross entropy of the right one among the answers to choose from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zorl.choosing import Choosing
from zorl.head_tuning import LabelGoal
from zorl.policies import Row
from zorl.probe import Point
from zorl.scoring import LabelWords


class LabelLoss:
    """The negative log-likelihood of the true label among the label words, or of the right one of a row's options.

    Args:
        policy: scores the answers to choose from.
        column: the data set's column with the truth: a label's name, or the text of an option.
    """

    def __init__(self, policy: Choosing, column: str) -> None:
        self.policy = policy
        self.column = column

    def __call__(self, rows: Sequence[Row], points: Sequence[Point]) -> Tensor:
        """float64, shape `(points, rows)`.

        Raises:
            ValueError: the truth of a row is not one of the answers to choose from.
        """
        return self.of_scores(rows, self.policy.scores(rows, points))

    def of_scores(self, rows: Sequence[Row], scores: Tensor) -> Tensor:
        """The same, from the policy's scores of shape `(points, rows, answers)`."""
        truth = self.truth(rows).expand(len(scores), -1).unsqueeze(2)
        return -scores.cpu().gather(2, truth).squeeze(2).double()

    def truth(self, rows: Sequence[Row]) -> Tensor:
        """The index of each row's right answer, int64, shape `(rows,)`."""
        indices = []
        for row, answers in zip(rows, self.policy.every_answer(rows), strict=True):
            names = [answer.completion for answer in answers]
            if (found := str(row.get(self.column))) not in names:
                raise ValueError(f"the column {self.column!r} holds {found!r}, which is not one of the answers {names}")
            indices.append(names.index(found))
        return torch.tensor(indices)

    def goal(self, rows: Sequence[Row]) -> LabelGoal:
        """The mean log-likelihood of the truth as a function of the label words' scores of these rows."""
        assert isinstance(self.policy, LabelWords)
        return _LikelihoodGoal(self.policy, self.truth(rows), rows)


class _LikelihoodGoal:
    """See `zorl.head_tuning.LabelGoal`."""

    def __init__(self, policy: LabelWords, truth: Tensor, rows: Sequence[Row]) -> None:
        self._truth = truth
        self.scores, self.states = policy.words_and_states(rows)

    def best(self, scores: Tensor, rows: Tensor) -> float:
        """The mean log-likelihood: its best label is the likely one."""
        return scores.log_softmax(dim=1).gather(1, self._truth[rows].unsqueeze(1)).mean().item()

    def of_each_label(self, answers: Tensor) -> Tensor:
        """1 for the truth, 0 for the others: the likelihood that a head is tuned on is then the objective."""
        return torch.nn.functional.one_hot(self._truth, self.scores.shape[1]).double()
