"""One fitted bias per label, on a model that is not tuned."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from zorl.baselines.problem import Fitted, Problem, Report, answers_of
from zorl.head_tuning import fit_bias
from zorl.reward_objective import RewardObjective


def fit(problem: Problem, report: Report | None = None) -> Fitted:
    """Fits biases to the reward of training rows, as many as the budget can read once (see `zorl.calibration`).

    Raises:
        NotApplicable: the prompt has no label words.
    """
    model, tokenizer = problem.load()
    policy = problem.label_policy(model, tokenizer, "a fitted threshold")
    rows = problem.sample(problem.budget * problem.batch_size)
    with torch.no_grad():
        head = fit_bias(RewardObjective(policy, problem.rewards).label_goal(rows))
    forwards = problem.forwards(rows)
    if report is not None:
        report(forwards)
    fitted = problem.policy(model, tokenizer, replace(problem.prompt, label_head=head))
    bias = dict(zip(problem.prompt.labels, head.bias, strict=True))
    return Fitted(partial(answers_of, fitted), forwards, {"bias": bias, "rows": len(rows)})
