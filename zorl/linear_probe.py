"""The head first: a logistic regression on what a classifier's last layer reads, written into that layer.

Linear probing, then tuning (LP-FT): a head that fits the features keeps the first steps from distorting them (Kumar et al. 2022).
With MeZO after it, it is "LP-MeZO" (Malladi et al. 2023, Appendix F). It costs one evaluation of the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zorl.classifier_head import ClassifierHead
from zorl.offload import can_be_written, stored

STRENGTHS = tuple(10.0**i for i in range(-4, 3))  # C, for states of unit variance
FOLDS = 5


@torch.no_grad()
def probe(policy: ClassifierHead, rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> float:
    """Fits the model's last linear layer to labelled rows, all else frozen, and writes it.

    If the head is one linear layer, that is the whole head; if a dense layer comes before it (BERT, RoBERTa), the states are that
    layer's output.

    Args:
        labels: the rows' labels, each one of the policy's.

    Raises:
        ValueError: the head is offloaded to disk; or a class has no row.
        TypeError: the model's logits do not come out of a linear layer.
        FloatingPointError: a state is NaN or infinite.

    Returns:
        C, the inverse strength of the penalty that cross-validation chose.
    """
    names = policy.label_names
    if missing := [name for name in names if name not in set(labels)]:
        raise ValueError(
            f"a linear probe needs rows of every class, and none of its {len(rows)} has the label {missing[0]!r}; "
            "add some, or set calibration='none'"
        )
    head = policy.head
    scores, states = policy.words_and_states(rows)
    if head is None or states is None or not _makes(scores, states, head):
        raise TypeError(
            f"the logits of {type(policy.evaluator.module).__name__} do not come straight out of a linear layer, so a linear "
            "probe cannot write it; set calibration='none'"
        )
    if not states.isfinite().all():
        raise FloatingPointError("the model's last states are NaN or infinite: its weights are out of range")
    truth = np.array([names.index(label) for label in labels])
    if not can_be_written(head, "weight"):
        raise ValueError("the classifier's head is offloaded to disk, where it is only read; set calibration='none'")
    weight, bias, strength = fit(states.double().numpy(), truth, intercept=head.bias is not None)
    stored(head, "weight").copy_(torch.from_numpy(weight))  # a head that is offloaded is a shell
    if head.bias is not None:
        stored(head, "bias").copy_(torch.from_numpy(bias))
    return strength


def fit(
    states: NDArray[np.float64], truth: NDArray[np.int64], *, intercept: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Multinomial logistic regression with an L2 penalty on standardised states, its strength by cross-validation.

    Args:
        states: shape `(rows, width)`.
        truth: shape `(rows,)`, classes 0 … L−1, each at least once.
        intercept: fit one per class; without, states are scaled and not centred, and the intercepts are 0.

    Returns:
        Weights `(L, width)` and intercepts `(L,)` for the raw states, and C.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler(with_mean=intercept).fit(states)
    scaled = scaler.transform(states)
    model = LogisticRegression(fit_intercept=intercept, max_iter=2000)
    folds = min(FOLDS, *Counter(truth.tolist()).values())
    if folds > 1:  # a class of a single row cannot be held out
        splits = StratifiedKFold(folds, shuffle=True, random_state=0)
        model = (
            GridSearchCV(model, {"C": STRENGTHS}, scoring="neg_log_loss", cv=splits).fit(scaled, truth).best_estimator_
        )
    else:
        model.fit(scaled, truth)
    weight, bias = model.coef_ / scaler.scale_, model.intercept_
    if intercept:
        bias = bias - weight @ scaler.mean_
    if len(weight) == 1:  # for two classes scikit-learn keeps the difference
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias if intercept else np.zeros(len(weight)), float(model.C)


def _makes(scores: Tensor, states: Tensor, head: torch.nn.Linear) -> bool:
    """Whether the layer gives these scores for these states, up to rounding."""
    logits = states @ stored(head, "weight").float().cpu().T
    if head.bias is not None:
        logits = logits + stored(head, "bias").float().cpu()
    return torch.allclose(logits.log_softmax(dim=1), scores, rtol=0.0, atol=0.02 * max(1.0, float(logits.abs().max())))
