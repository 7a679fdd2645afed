"""Fine-tuning by backpropagation, with Adam or SGD."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch

from zorl.baselines.problem import Fitted, NotApplicable, Problem, Report, answers_of, progress
from zorl.baselines.selection import Selection, look_at
from zorl.goal import Goal
from zorl.loss_objectives import CrossEntropy
from zorl.probe import CENTRE

FORWARDS_A_STEP = 3  # the backward pass counts as two
MAX_GRAD_NORM = 1.0  # transformers' default
LEARNING_RATES = {"adam": (1e-5, 1e-4, 1e-3), "sgd": (1e-3, 1e-2, 1e-1)}
_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def fit(
    problem: Problem,
    report: Report | None = None,
    *,
    optimizer: Literal["adam", "sgd"] = "adam",
    learning_rates: Sequence[float] | None = None,
) -> Fitted:
    """Trains all weights in float32 on cross entropy, the same loss as MeZO's (see `zorl.loss_objectives.CrossEntropy`).

    The loss of a batch is the mean over its rows: of −log p of the true label among the label words or the row's options, or
    of the mean −log p of the tokens of the true text, so that a long text weighs as much as a short one.

    Each learning rate (by default `LEARNING_RATES`) gets the whole budget, of which a step costs `FORWARDS_A_STEP`, and decays
    linearly to 0. The weights are scored on the development rows before the first step and ten times per run, and the best of
    all runs are kept. `chosen` says what the whole search cost.

    Raises:
        NotApplicable: the training rows have no labels, or an optimizer step costs more than the budget.
        ValueError: without label words, a label is not a text (see `zorl.teacher_forcing.taught_text`).
    """
    rates = LEARNING_RATES[optimizer] if learning_rates is None else tuple(learning_rates)
    steps = problem.budget // FORWARDS_A_STEP
    if not steps:
        raise NotApplicable(
            f"a step of fine-tuning costs {FORWARDS_A_STEP} forwards, and the budget is {problem.budget}; raise it"
        )
    if problem.label_column not in problem.train[0]:
        raise NotApplicable(f"the training rows have no column {problem.label_column!r} with the text to learn")
    model, tokenizer = problem.load("float32")
    model.requires_grad_(True)
    policy = problem.policy(model, tokenizer)
    objective = Goal(loss="cross_entropy").objective(policy, label_column=problem.label_column)
    assert isinstance(objective, CrossEntropy)
    selection = Selection(problem, policy, model.state_dict())
    selection.look(learning_rate=None, step=0)
    spent = 0
    with progress(f"fine-tuning, {optimizer}", len(rates) * steps * FORWARDS_A_STEP, report) as spend:
        for rate in rates:
            selection.to_start()
            # Dropout draws from the global generator, which is given back as it was.
            with torch.random.fork_rng(), torch.enable_grad():
                torch.manual_seed(problem.seed)
                spent += _train(problem, model, objective, _OPTIMIZERS[optimizer], rate, steps, selection, spend)
    selection.to_best()
    model.requires_grad_(False)
    return Fitted(
        partial(answers_of, policy),
        steps * FORWARDS_A_STEP,
        {"optimizer": optimizer, **selection.chosen, "search_forwards": spent},
    )


def _train(
    problem: Problem,
    model: Any,
    objective: CrossEntropy,
    optimizer_class: Callable[..., torch.optim.Optimizer],
    rate: float,
    steps: int,
    selection: Selection,
    spend: Report,
) -> int:
    """Trains with one learning rate, and stops if it diverges. Returns the forwards spent."""
    optimizer = optimizer_class(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, max(1, steps - 1))
    for step, rows in zip(range(1, steps + 1), problem.batches(), strict=False):
        model.train()
        optimizer.zero_grad()
        loss = objective.losses(rows, [CENTRE]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        spend(FORWARDS_A_STEP)
        diverged = not loss.isfinite()
        if diverged or (look_at(step, steps) and not selection.look(learning_rate=rate, step=step)):
            break
    return step * FORWARDS_A_STEP
