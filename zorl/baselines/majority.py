"""One answer to everything: the commonest label of the training rows. Whatever beats it has learnt something about the texts."""

from __future__ import annotations

from collections import Counter

from zorl.baselines.problem import Fitted, Problem, Report, Rows
from zorl.prompts import Answer


def fit(problem: Problem, report: Report | None = None) -> Fitted:
    """Counts the labels, without a forward pass; the first of the prompt's labels wins among equals.

    Raises:
        NotApplicable: the prompt has no label words.
    """
    policy = problem.label_policy(*problem.load(), "the commonest label")
    counts = Counter(str(row[problem.label_column]) for row in problem.train)
    commonest = max(policy.label_names, key=lambda label: counts[label])
    place = policy.label_names.index(commonest)

    def answers(rows: Rows) -> list[Answer]:
        return [every[place] for every in policy.every_answer(rows)]

    return Fitted(answers, forwards=0, chosen={"label": commonest})
