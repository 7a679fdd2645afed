"""Probes and the answers to them.

A probe names points around θ; whoever evaluates them returns scores (a number for every point and prompt) or verdicts
(which of two points did better on a prompt). Neither needs a gradient, or even a model, but only an opinion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Point:
    """The parameters θ + offset · z(seed). Offset 0 is θ itself, whatever the seed.

    Attributes:
        scales: a multiple of the offset for each parameter, by canonical name (0 if it is missing); None for the same in all.
    """

    seed: int
    offset: float
    scales: Mapping[str, float] | None = None

    def offset_of(self, name: str) -> float:
        """The offset in the parameter with this canonical name."""
        return self.offset if self.scales is None else self.offset * self.scales.get(name, 0.0)


CENTRE = Point(seed=0, offset=0.0)


@dataclass(frozen=True, slots=True)
class Probe:
    """A question: how do these points compare?

    Attributes:
        id: increases by one with every probe of a run.
        step: the number of the step that its answers lead to, from 0.
        epsilon: the size of the offsets.
        seeds: one per direction, `n_spsa` of them.
        points: what to evaluate, in the estimator's order.
        made_at: the number of steps that θ had seen when the question was asked.
    """

    id: int
    step: int
    epsilon: float
    seeds: tuple[int, ...]
    points: tuple[Point, ...]
    made_at: int


@dataclass(frozen=True, slots=True)
class Scores:
    """Rewards of a probe's points; higher is better.

    Attributes:
        values: float tensor of shape `(points, prompts)`, or `(points, 1)` if one number scores the whole batch.
            NaN is an abstention: that point was not scored on that prompt.

    Raises:
        ValueError: `values` is not two-dimensional, or holds an infinity.
    """

    values: Tensor

    def __post_init__(self) -> None:
        if self.values.ndim != 2:
            raise ValueError(f"scores need shape (points, prompts), got {tuple(self.values.shape)}")
        if self.values.isinf().any():
            raise ValueError("scores hold an infinity; return NaN (or None) for a point that could not be scored")

    @classmethod
    def of_losses(cls, losses: Sequence[float] | Tensor) -> Scores:
        """Scores of a loss per point (lower is better), shape `(points,)` or `(points, prompts)`."""
        values = torch.as_tensor(losses, dtype=torch.float64)
        return cls(-(values[:, None] if values.ndim == 1 else values))

    @property
    def losses(self) -> Tensor:
        """The mean loss of each point, float64 of shape `(points,)`: abstentions are left out."""
        return -self.values.double().nanmean(dim=1).cpu()


class Choice(StrEnum):
    """A judge's answer on two completions that it saw in some order."""

    FIRST = "first"
    SECOND = "second"
    TIE = "tie"
    BOTH_BAD = "both bad"
    ABSTAIN = "abstain"

    @property
    def flipped(self) -> Choice:
        """The same opinion about the pair in the other order. Ties and abstentions stay the same."""
        return {Choice.FIRST: Choice.SECOND, Choice.SECOND: Choice.FIRST}.get(self, self)

    @property
    def preference(self) -> float:
        """+1 for the first, −1 for the second, 0 for neither, NaN for no opinion."""
        return {Choice.FIRST: 1.0, Choice.SECOND: -1.0, Choice.ABSTAIN: math.nan}.get(self, 0.0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's opinion on two points of a probe, given one prompt: in `choice`, point_a is the first."""

    point_a: int
    point_b: int
    prompt: int
    choice: Choice


@dataclass(frozen=True, slots=True)
class Verdicts:
    """All opinions on a probe; points are indices into `Probe.points`."""

    items: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class Slopes:
    """z·∇L of the loss at a probe's points, one number each (see `zorl.forward_gradient`). NaN abstains."""

    values: tuple[float, ...]


Answers = Scores | Verdicts | Slopes
