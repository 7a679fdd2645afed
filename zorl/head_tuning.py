"""Where tuning starts: biases and a head for the labels, fitted without one more forward of the model.

Tuning a head W h + b needs no forward at all, because h does not depend on W: every point around W is a matrix product away.
So MeZO can be given thousands of directions, on all rows at once, for the price of one evaluation of the rows. It is the
last layer first, as in linear probing followed by MeZO (Malladi et al. 2023, Appendix), but for labels that the reward
favours, whatever it is, in place of true ones.
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
_NAME = "label_head"  # of W and b as a parameter: it names their noise


class LabelGoal(Protocol):
    """What an objective makes of label scores of rows that stay the same, however they come about."""

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

    How many steps do good is found on rows that were held out: each half of the rows judges, by the objective itself, a head
    that is fitted to the other, until that has not helped for a while. Where it never did better than biases that were fitted
    likewise, the biases stay alone. Then a head is fitted to all rows in as many steps.

    A reward of single answers is asked once for each label of each row. A reward of a set of answers is called as often, each
    time with one answer of the set changed.

    Args:
        seed: of directions.
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
    targets = favoured(goal.of_each_label(scores.argmax(dim=1)))
    halves = rows[0::2], rows[1::2]
    biased = goal.scores.clone()  # by biases that were fitted to the other half
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
    """What a likelihood has to weigh for its maximum to be the objective's: classification with costs, as one of weights.

    A row's weight is what choosing badly costs it, and lies on its best label; several that are as good share it. With accuracy
    all weights are one, and the likelihood is that of the truth. A likelihood is concave in a head's weights and the expected
    reward is not: tuned on it, heads know more of rows that they have not seen (docs/label_heads.md).

    Args:
        objective: of each label, shape `(rows, labels)`; NaN where it cannot be judged.

    Returns:
        float64, the same shape; the mean weight of a row is one, or all are zero where no label makes a difference.
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
    """Fitted to these rows, float64, shape `(labels,)`."""
    bias, _ = fit_label_bias(goal.scores[rows], lambda scores: goal.best(scores, rows))
    return bias


def _tuned(scores: Tensor, targets: Tensor, states: Tensor, seed: int) -> Iterator[Tensor]:
    """[W b] before the first step and after each, shape `(labels, width + 1)`; the same tensor, moved in place."""
    weight = torch.zeros(scores.shape[1], states.shape[1])
    mezo = MeZO([(_NAME, weight)], lr=LEARNING_RATE, epsilon=EPSILON, n_spsa=DIRECTIONS, update="normalized", seed=seed)
    at_points = torch.empty(2 * DIRECTIONS, *weight.shape)
    yield weight
    for step in range(STEPS):
        # A rate without a horizon: the run may be stopped anywhere.
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
        # What varies by no more than rounding says nothing, and scaled to variance one it would speak the loudest.
        varies = deviation > 1e-4 * (self.mean.abs() + deviation.max())
        self.deviation = torch.where(varies, deviation, torch.inf)  # divided by it, the rest is 0
        self.states = torch.cat([(states - self.mean) / self.deviation, torch.ones(len(states), 1)], dim=1)

    def head(self, weight: Tensor, start: LabelHead) -> LabelHead:
        """The same function of states as they come: `weight` is `(labels, width + 1)`, on top of the biases of `start`."""
        scaled = (weight[:, :-1] / self.deviation).bfloat16().float()
        bias = torch.tensor(start.bias) + weight[:, -1] - scaled @ self.mean
        return LabelHead(tuple(bias.tolist()), tuple(map(tuple, scaled.tolist())))
