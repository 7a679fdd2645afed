"""The start of tuning: biases and a head for the labels, fitted without further forwards of the model.

Tuning a head W h + b needs no forward at all, because h does not depend on W: a point around W costs one matrix product. So
MeZO can have thousands of directions, on all rows at once, for one evaluation of the rows. The last layer comes first, as in
linear probing followed by MeZO (Malladi et al. 2023, Appendix), but with the labels that the reward favours in place of the
true ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, Protocol

import torch
from torch import Tensor

from zorl.calibration import fit_label_bias
from zorl.directions import key
from zorl.kernels import kernel_for
from zorl.label_head import LabelHead
from zorl.mezo import MeZO
from zorl.probe import Scores

Calibration = Literal["auto", "head", "bias", "probe", "none"]
DIRECTIONS = 8  # a step
LEARNING_RATE, EPSILON = 2e-2, 2e-2  # of weights on states that have variance one
STEPS, LOOK, PATIENCE = 400, 25, 100  # at most; between looks at held-out rows; without a better look before stopping
_NAME = "label_head"  # the parameter name of W and b, which selects their noise


class LabelGoal(Protocol):
    """An objective as a function of the label scores of fixed rows, however the scores come about."""

    @property
    def scores(self) -> Tensor:
        """The label words' log-probabilities at θ, shape `(rows, labels)`."""

    @property
    def states(self) -> Tensor | None:
        """The state that the output embedding reads, shape `(rows, width)`; None where words have several tokens."""

    def best(self, scores: Tensor, rows: Tensor) -> float:
        """The objective of the likeliest labels, for scores `(n, labels)` of the n rows with these indices; higher is better."""

    def of_each_label(self, answers: Tensor) -> Tensor:
        """The objective if a row's answer were that label and the other rows' `answers` (indices of labels, one per row).

        Returns:
            float64, shape `(rows, labels)`; NaN where a label cannot be judged.
        """


def fit_bias(goal: LabelGoal) -> LabelHead:
    """One bias per label: the fitted threshold."""
    return LabelHead(tuple(_bias(goal, torch.arange(len(goal.scores))).tolist()))


def fit_head(goal: LabelGoal, seed: int, progress: Callable[[int], object] = lambda steps: None) -> LabelHead:
    """W and b by MeZO on the likelihood of the labels that the objective favours, from the fitted biases on.

    The number of steps is found on held-out rows: each half of the rows judges, by the objective itself, a head that is fitted to
    the other half, until it has not improved for a while. If it never beats biases fitted in the same way, only the biases are
    kept. Otherwise a head is fitted to all rows in that number of steps.

    A reward of single answers is called once for each label of each row. A reward of a set of answers is called as often, each
    time with one answer of the set changed.

    Args:
        seed: seeds the directions.
        progress: called with 1 after every step.

    Raises:
        FloatingPointError: a state is NaN or infinite.

    Returns:
        The head; its weights are bfloat16 values, so that what is saved is what is used.
    """
    start = fit_bias(goal)
    rows = torch.arange(len(goal.scores))
    if goal.states is None or len(rows) < 4:
        return start
    standard = _Standardised(goal.states)
    scores = goal.scores + torch.tensor(start.bias, dtype=goal.scores.dtype)
    targets = favoured(goal.of_each_label(scores.argmax(dim=1)))
    halves = rows[0::2], rows[1::2]
    biased = goal.scores.clone()  # with biases fitted to the other half
    fits = []
    for half, other in (halves, halves[::-1]):
        bias = _bias(goal, half).to(biased.dtype)
        biased[other] += bias
        fits.append(_tuned(goal.scores[half] + bias, targets[half], standard.states[half], seed))
    best, best_step = goal.best(biased, rows), 0
    for step, weights in enumerate(zip(*fits, strict=True)):
        progress(min(step, 1))
        if not step or step % LOOK:
            continue
        held_out = biased.clone()
        for other, weight in zip(halves[::-1], weights, strict=True):
            held_out[other] += standard.states[other] @ weight.T
        value = goal.best(held_out, rows)
        if value > best:
            best, best_step = value, step
        elif step - best_step >= PATIENCE:
            break
    if not best_step:
        return start
    for step, weight in enumerate(_tuned(scores, targets, standard.states, seed)):
        progress(min(step, 1))
        if step == best_step:
            return standard.head(weight, start)
    raise AssertionError("the best step is one that was made")


def favoured(objective: Tensor) -> Tensor:
    """The weights that make the maximum of a likelihood the objective's: cost-sensitive classification as a weighted one.

    A row's weight is the cost of choosing badly, and goes to its best label; labels that are equally good share it. With accuracy
    all weights are one, and the likelihood is that of the truth. The likelihood is concave in a head's weights and the expected
    reward is not: heads tuned on it do better on unseen rows (docs/label_heads.md).

    Args:
        objective: each label's objective, shape `(rows, labels)`; NaN where it cannot be judged.

    Returns:
        float64, the same shape; the mean weight of a row is one, or all are zero if no label makes a difference.
    """
    objective = objective.double()
    known = ~objective.isnan()
    highest = objective.masked_fill(~known, -math.inf).amax(dim=1, keepdim=True)
    lowest = objective.masked_fill(~known, math.inf).amin(dim=1, keepdim=True)
    among = ((objective == highest) & known).double()
    weights = torch.where(known.any(dim=1, keepdim=True), highest - lowest, 0.0)
    weights = weights / weights.mean().clamp_min(torch.finfo(torch.float64).tiny)
    return among / among.sum(dim=1, keepdim=True).clamp_min(1.0) * weights


def _bias(goal: LabelGoal, rows: Tensor) -> Tensor:
    """The biases fitted to these rows, float64, shape `(labels,)`."""
    bias, _ = fit_label_bias(goal.scores[rows], lambda scores: goal.best(scores, rows))
    return bias


def _tuned(scores: Tensor, targets: Tensor, states: Tensor, seed: int) -> Iterator[Tensor]:
    """[W b] before the first step and after each, shape `(labels, width + 1)`; the same tensor, moved in place."""
    weight = torch.zeros(scores.shape[1], states.shape[1])
    mezo = MeZO([(_NAME, weight)], lr=LEARNING_RATE, epsilon=EPSILON, n_spsa=DIRECTIONS, update="normalized", seed=seed)
    at_points = torch.empty(2 * DIRECTIONS, *weight.shape)
    yield weight
    for step in range(STEPS):
        # The rate has no horizon, because the run may stop anywhere.
        mezo.param_groups[0]["lr"] = LEARNING_RATE / math.sqrt(1.0 + step / LOOK)
        probe = mezo.ask()
        for point, out in zip(probe.points, at_points, strict=True):
            kernel_for(weight).perturb(weight, key(point.seed, _NAME), point.offset, mezo.distribution, out)
        added = (states @ at_points.flatten(0, 1).T).view(len(scores), *at_points.shape[:2]).transpose(0, 1)
        mezo.tell(probe.id, Scores(((scores + added).log_softmax(dim=2).double() * targets).sum(dim=2)))
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
        # A state that varies only by rounding says nothing, but scaled to unit variance it would dominate.
        varies = deviation > 1e-4 * (self.mean.abs() + deviation.max())
        self.deviation = torch.where(varies, deviation, torch.inf)  # divided by it, the rest is 0
        self.states = torch.cat([(states - self.mean) / self.deviation, torch.ones(len(states), 1)], dim=1)

    def head(self, weight: Tensor, start: LabelHead) -> LabelHead:
        """The same function of raw states: `weight` is `(labels, width + 1)`, and is added to the biases of `start`."""
        scaled = (weight[:, :-1] / self.deviation).bfloat16().float()
        bias = torch.tensor(start.bias) + weight[:, -1] - scaled @ self.mean
        return LabelHead(tuple(bias.tolist()), tuple(map(tuple, scaled.tolist())))
