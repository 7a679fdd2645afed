"""Where tuning starts: biases and a head for the labels, fitted without one more forward of the model.

Tuning a head W h + b needs no forward at all, because h does not depend on W: every point around W is a matrix product away.
So MeZO can be given thousands of directions, on the reward itself and on all rows at once, for the price of one evaluation
of the rows. It is the last layer first, as in linear probing followed by MeZO (Malladi et al. 2023, Appendix), but with the
objective that is tuned afterwards, whatever it is, in place of a logistic regression.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, Protocol

import torch
from torch import Tensor

from zorl.calibration import fit_label_bias
from zorl.directions import derive_seed, key
from zorl.kernels import kernel_for
from zorl.label_head import LabelHead
from zorl.mezo import MeZO
from zorl.probe import Scores

Calibration = Literal["auto", "head", "bias", "probe", "none"]
DIRECTIONS = 8  # a step
LEARNING_RATE, EPSILON = 2e-2, 2e-2  # of weights on states that have variance one
STEPS, LOOK, PATIENCE = 400, 25, 100  # at most; between looks at held-out rows; without a better look before stopping
_NAME = "label_head"  # of W and b as a parameter: it names their noise


class LabelGoal(Protocol):
    """What an objective makes of label scores of rows that stay the same, however they come about."""

    @property
    def scores(self) -> Tensor:
        """The label words' log-probabilities at θ, shape `(rows, labels)`."""

    @property
    def states(self) -> Tensor | None:
        """The state that the output embedding reads, shape `(rows, width)`; None where words have several tokens."""

    def best(self, scores: Tensor) -> float:
        """The objective of the likeliest labels, for scores `(rows, labels)`; higher is better."""

    def expected(self, scores: Tensor, rows: Tensor, noise_seed: int) -> Scores:
        """The objective under the labels' probabilities, for scores `(points, n, labels)` of the n rows with these indices."""


def fit_bias(goal: LabelGoal) -> LabelHead:
    """One bias a label: the fitted threshold."""
    bias, _ = fit_label_bias(goal.scores, goal.best)
    return LabelHead(tuple(bias.tolist()))


def fit_head(goal: LabelGoal, seed: int, progress: Callable[[int], object] = lambda steps: None) -> LabelHead:
    """W and b by MeZO on the objective itself, from the fitted biases on.

    How many steps do good is found on rows that were held out: each half of the rows judges a head that is fitted to the
    other, until that has not helped for a while. Where it never did, the biases stay alone. Then a head is fitted to all rows in
    as many steps. A reward of single answers is asked once for each label of each row; a reward of a set of answers is
    called 16 times a step, so some thousand times.

    Args:
        seed: of directions and draws.
        progress: called with 1 after every step.

    Raises:
        FloatingPointError: a state is NaN or infinite.

    Returns:
        The head; its weights are bfloat16 values, so that what is written down is what is used.
    """
    start = fit_bias(goal)
    rows = torch.arange(len(goal.scores))
    if goal.states is None or len(rows) < 4:
        return start
    standard = _Standardised(goal.states)
    scores = goal.scores + torch.tensor(start.bias, dtype=goal.scores.dtype)
    halves = rows[0::2], rows[1::2]
    best, best_step = goal.best(scores), 0
    fits = (_tuned(goal, scores, standard.states, half, seed) for half in halves)
    for step, weights in enumerate(zip(*fits, strict=True)):
        progress(min(step, 1))
        if step % LOOK or not step:
            continue
        held_out = scores.clone()
        for half, weight in zip(halves[::-1], weights, strict=True):
            held_out[half] += standard.states[half] @ weight.T
        value = goal.best(held_out)
        if value > best:
            best, best_step = value, step
        elif step - best_step >= PATIENCE:
            break
    for step, weight in enumerate(_tuned(goal, scores, standard.states, rows, seed)):
        progress(min(step, 1))
        if step == best_step:
            return standard.head(weight, start) if step else start
    raise AssertionError("the best step is one that was made")


def _tuned(goal: LabelGoal, scores: Tensor, states: Tensor, rows: Tensor, seed: int) -> Iterator[Tensor]:
    """[W b] before the first step and after each, shape `(labels, width + 1)`; the same tensor, moved in place."""
    weight = torch.zeros(scores.shape[1], states.shape[1])
    mezo = MeZO([(_NAME, weight)], lr=LEARNING_RATE, epsilon=EPSILON, n_spsa=DIRECTIONS, update="normalized", seed=seed)
    scores, states = scores[rows], states[rows]
    at_points = torch.empty(2 * DIRECTIONS, *weight.shape)
    yield weight
    for step in range(STEPS):
        # A rate without a horizon: the run may be stopped anywhere.
        mezo.param_groups[0]["lr"] = LEARNING_RATE / math.sqrt(1.0 + step / LOOK)
        probe = mezo.ask()
        for point, out in zip(probe.points, at_points, strict=True):
            kernel_for(weight).perturb(weight, key(point.seed, _NAME), point.offset, mezo.distribution, out)
        added = (states @ at_points.flatten(0, 1).T).view(len(rows), *at_points.shape[:2]).transpose(0, 1)
        mezo.tell(probe.id, goal.expected((scores + added).log_softmax(dim=2), rows, derive_seed(seed, _NAME, step)))
        mezo.step()
        yield weight


class _Standardised:
    """States with mean 0 and variance 1 over the rows, and a column of ones for b.

    Args:
        states: shape `(rows, width)`.
    """

    def __init__(self, states: Tensor) -> None:
        if not states.isfinite().all():
            raise FloatingPointError("the model's last states are NaN or infinite: its weights are out of range")
        self.mean, deviation = states.mean(dim=0), states.std(dim=0)
        # What varies by no more than rounding says nothing, and scaled to variance one it would speak the loudest.
        varies = deviation > 1e-4 * (self.mean.abs() + deviation.max())
        self.deviation = torch.where(varies, deviation, torch.inf)  # divided by it, the rest is 0
        self.states = torch.cat([(states - self.mean) / self.deviation, torch.ones(len(states), 1)], dim=1)

    def head(self, weight: Tensor, start: LabelHead) -> LabelHead:
        """The same function of states as they come: `weight` is `(labels, width + 1)`, on top of the biases of `start`."""
        scaled = (weight[:, :-1] / self.deviation).bfloat16().float()
        bias = torch.tensor(start.bias) + weight[:, -1] - scaled @ self.mean
        return LabelHead(tuple(bias.tolist()), tuple(map(tuple, scaled.tolist())))
