"""Linear probing: a logistic regression on the state that the label words are read from (Malladi et al. 2023, Appendix)."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from zorl.baselines.problem import Fitted, NotApplicable, Problem, Report, Rows
from zorl.prompts import Answer
from zorl.scoring import LabelWords

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # C: the inverse of the penalty


def fit(problem: Problem, report: Report | None = None) -> Fitted:
    """Fits scikit-learn's LogisticRegression to standardised states of training rows, as many as the budget can read once.

    The strength in `STRENGTHS` that does best on the development rows is kept; among equals, the strongest penalty.

    Raises:
        NotApplicable: the prompt has no label words, the words have several tokens, or the model's last state cannot be read.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    policy = problem.label_policy(*problem.load(), "linear probing")
    rows = problem.sample(problem.budget * problem.batch_size)
    states = _states(policy, rows)
    truth = [str(row[problem.label_column]) for row in rows]
    forwards = problem.forwards(rows)
    if report is not None:
        report(forwards)
    if len(set(truth)) < 2:
        raise NotApplicable(
            f"linear probing needs two labels, and the {len(rows)} rows that the budget pays for all have {truth[0]!r}"
        )
    on_dev = _states(policy, problem.dev)

    def answers(rows: Rows, predicted: Any) -> list[Answer]:
        every = policy.every_answer(rows)
        return [of[policy.label_names.index(label)] for of, label in zip(every, predicted, strict=True)]

    def scored(strength: float) -> tuple[float, Any]:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=10_000)).fit(states, truth)
        return problem.score(problem.dev, answers(problem.dev, probe.predict(on_dev))), probe

    found = {strength: scored(strength) for strength in STRENGTHS}
    best = max(found, key=lambda strength: found[strength][0])
    score, probe = found[best]
    return Fitted(
        lambda rows: answers(rows, probe.predict(_states(policy, rows))) if len(rows) else [],
        forwards,
        {"C": best, "rows": len(rows), "dev_score": score, "dev_forwards": problem.forwards(problem.dev)},
    )


def _states(policy: LabelWords, rows: Rows) -> NDArray[Any]:
    """The states that the label words are read from, shape `(rows, width)`."""
    with torch.no_grad():
        _, states = policy.words_and_states(rows)
    if states is None:
        raise NotApplicable(
            "linear probing reads the state before the output embedding at one position: it needs label words of one"
            " token, and a model that calls its output embedding"
        )
    return states.numpy()
