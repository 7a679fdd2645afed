"""What tuning has to beat. A prompt's scores are badly calibrated; putting that right alone needs no tuning at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Metric = Callable[[np.ndarray, np.ndarray], float]  # (truth, predictions), both label indices, to a score: higher is better


def fit_label_bias(scores: Tensor, truth: Sequence[int] | Tensor, metric: Metric, rounds: int = 3) -> Tensor:
    """One fitted threshold per label: the bias on each label's score that does best on the training data.

    Coordinate ascent: each label in turn takes the best of the biases at which a prediction changes, the others fixed.
    For two labels that is the best threshold on the difference of their scores, exactly.

    Args:
        scores: log-probabilities of the labels, shape `(rows, labels)`.
        truth: label indices, shape `(rows,)`.
        metric: what to maximise.
        rounds: passes over the labels.

    Returns:
        A bias to add to the scores, shape `(labels,)`, float64, the first zero.

    Raises:
        ValueError: there are no rows, or as many truths as rows are not given.
    """
    values = scores.double().numpy()
    target = np.asarray(truth)
    if not len(values) or len(values) != len(target):
        raise ValueError(f"a bias is fitted to rows with their labels: got {len(values)} rows and {len(target)} labels")
    bias = np.zeros(values.shape[1])
    best = metric(target, values.argmax(1))
    for _ in range(rounds):
        before = best
        for label in range(1, values.shape[1]):
            others = np.delete(values + bias, label, axis=1).max(1)
            crossings = np.unique(others - values[:, label])  # a prediction changes where the bias passes one of these
            if len(crossings) > 400:
                crossings = np.quantile(crossings, np.linspace(0, 1, 400))
            edges = np.concatenate([[crossings[0] - 1], (crossings[1:] + crossings[:-1]) / 2, [crossings[-1] + 1]])
            for candidate in edges:
                trial = bias.copy()
                trial[label] = candidate
                score = metric(target, (values + trial).argmax(1))
                if score > best:
                    best, bias = score, trial
        if best == before:
            break
    return torch.from_numpy(bias)
