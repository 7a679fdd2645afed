"""Policies that answer with one of a few given texts, by how likely the model finds each: labels, classes, a row's options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from zorl.prompts import Answer, Prompt

if TYPE_CHECKING:
    from zorl.fitting_forwards import FittingForwards
    from zorl.perturbation import Evaluator
    from zorl.probe import Point


class Choosing(ABC):
    """Scores every answer to choose from, and answers with the likeliest.

    Attributes:
        evaluator: runs the model at points.
        prompt: what the rows are put into.
        forwards: runs as many inputs at a time as fit into memory.
    """

    evaluator: Evaluator
    prompt: Prompt
    forwards: FittingForwards

    @abstractmethod
    def scores(self, rows: Sequence[Mapping[str, Any]], points: Sequence[Point]) -> Tensor:
        """Log-probabilities of the answers, normalised over the row's own.

        Returns:
            float32 of shape `(len(points), len(rows), most answers of a row)`: −inf where a row has fewer. NaN where the
            logits are.
        """

    @abstractmethod
    def every_answer(self, rows: Sequence[Mapping[str, Any]]) -> list[list[Answer]]:
        """The answers to choose from, as `[row][answer]`, in the order of the scores' last dimension."""

    def answers(
        self, rows: Sequence[Mapping[str, Any]], points: Sequence[Point], *, noise_seed: int = 0
    ) -> list[list[Answer]]:
        """The likeliest answer to each row at each point, as `[point][row]`; of equals the first.

        Args:
            noise_seed: unused, since nothing is sampled.

        Raises:
            FloatingPointError: the model's scores are NaN.
        """
        return self.likeliest(rows, points, self.scores(rows, points))

    def likeliest(
        self, rows: Sequence[Mapping[str, Any]], points: Sequence[Point], scores: Tensor
    ) -> list[list[Answer]]:
        """`answers`, from their `scores`.

        Raises:
            FloatingPointError: as for `answers`.
        """
        every = self.every_answer(rows)
        for point, broken in zip(points, scores.isnan().flatten(1).any(1).tolist(), strict=True):
            if broken:
                raise FloatingPointError(
                    f"the model's label scores are NaN at the point with offset {point.offset} along seed {point.seed}:"
                    " its weights, or what it makes of them, are out of range"
                )
        best = scores.argmax(dim=-1).tolist() if every else [[]] * len(points)
        return [[row[i] for i, row in zip(chosen, every, strict=True)] for chosen in best]
