"""One fitted bias a label: against an exhaustive search, and where nothing can be gained."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from zorl.calibration import fit_label_bias


def macro_f1(truth: list[int], labels: int):  # type: ignore[no-untyped-def]
    return lambda scores: f1_score(
        truth, scores.argmax(1).numpy(), average="macro", labels=range(labels), zero_division=0
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 30))
def test_two_labels_get_the_best_of_all_thresholds(seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    scores = torch.tensor(rng.normal(size=(rows, 2)))
    truth = rng.integers(0, 2, rows).tolist()
    objective = macro_f1(truth, 2)
    bias, reached = fit_label_bias(scores, objective, candidates=2 * rows)
    crossings = sorted((scores[:, 0] - scores[:, 1]).tolist())
    middles = [(a + b) / 2 for a, b in pairwise(crossings)]
    edges = [crossings[0] - 1, *middles, crossings[-1] + 1]
    best = max(objective(scores + torch.tensor([0.0, edge])) for edge in edges)
    assert reached == pytest.approx(best)
    assert objective(scores + bias) == reached
    assert bias[0] == 0.0


def test_a_shift_that_spoils_every_prediction_is_found_for_six_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(120) % 6
    clean = torch.nn.functional.one_hot(truth, 6) * 2.0 + 0.3 * torch.randn(120, 6, generator=generator)
    shifted = clean + torch.tensor([0.0, 5.0, -3.0, 1.0, -6.0, 2.0])
    accuracy = lambda scores: accuracy_score(truth, scores.argmax(1))  # noqa: E731
    assert accuracy(shifted) < 0.4
    bias, reached = fit_label_bias(shifted, accuracy)
    assert reached == accuracy(shifted + bias) >= 0.95


def test_the_bias_stays_zero_where_nothing_is_better() -> None:
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.5]])
    bias, reached = fit_label_bias(scores, lambda s: accuracy_score([0, 1, 0], s.argmax(1)))
    assert bias.tolist() == [0.0, 0.0]
    assert reached == 1.0


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="fitted to rows: there are none"):
        fit_label_bias(torch.empty(0, 2), lambda scores: 0.0)
