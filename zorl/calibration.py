"""A bias for each label, fitted to the training rows without tuning the model.

Label words are badly calibrated: one of them is likelier whatever the text says (Zhao et al. 2021), and much of what tuning
gains at first is a correction of that. Fitting a bias costs one evaluation of the training rows and some arithmetic. So
tuning starts from it, and it is the baseline that tuning has to beat.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def fit_label_bias(
    scores: Tensor, objective: Callable[[Tensor], float], *, candidates: int = 48, rounds: int = 3
) -> tuple[Tensor, float]:
    """Biases that maximise `objective`, by coordinate ascent: each label in turn, the others fixed.

    A label's candidates are the biases at which a prediction changes, or `candidates` quantiles of these; a second pass
    looks between the neighbours of the best.

    Args:
        scores: the labels' scores, shape `(rows, labels)`.
        objective: from scores with the biases added, shape `(rows, labels)`, to a number; higher is better.
        candidates: values to try for each label in each pass.
        rounds: the most passes over the labels; it stops when nothing improves.

    Returns:
        The biases, shape `(labels,)`, float64, the first zero, and the objective with them.

    Raises:
        ValueError: there are no rows.
    """
    values = scores.double()
    if not len(values):
        raise ValueError("label biases are fitted to rows: there are none")
    bias = torch.zeros(values.shape[1], dtype=torch.float64)
    best = objective(values)
    for _ in range(rounds):
        before = best
        for label in range(1, values.shape[1]):
            biased = values + bias
            biased[:, label] = -torch.inf
            crossings = (biased.amax(1) - values[:, label]).unique()  # where the label starts to win a row
            low, high = 0.0, 1.0
            for _ in range(2):
                grid = torch.linspace(low, high, candidates, dtype=torch.float64)
                found = None
                for position in grid.tolist():
                    trial = bias.clone()
                    trial[label] = _between(crossings, position)
                    score = objective(values + trial)
                    if score > best:
                        best, bias, found = score, trial, position
                if found is None:
                    break
                low, high = max(0.0, found - 1.0 / candidates), min(1.0, found + 1.0 / candidates)
        if best == before:
            break
    return bias, best


def _between(crossings: Tensor, position: float) -> float:
    """The middle of the gap at a relative position among sorted crossings, so that no prediction is on the edge."""
    i = round(position * len(crossings))
    if i == 0:
        return float(crossings[0]) - 1.0
    if i == len(crossings):
        return float(crossings[-1]) + 1.0
    return float(crossings[i - 1] + crossings[i]) / 2.0
