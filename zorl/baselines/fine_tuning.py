"""Fine-tuning by backpropagation, with Adam or SGD: what MeZO does without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from zorl.answer_logits import AnswerLogits, TokenAnswer, chosen
from zorl.baselines.problem import (
    Fitted,
    NotApplicable,
    Problem,
    Report,
    Rows,
    answers_of,
    progress,
    target_text,
)
from zorl.baselines.selection import Selection, look_at
from zorl.choosing import Choosing
from zorl.encoding import ContextTokenizer, pad_token_id
from zorl.generation import Generation, cut_at
from zorl.parameters import ParameterSet
from zorl.policies import Policy
from zorl.probe import CENTRE

FORWARDS_A_STEP = 3  # one, and two for the backward pass
MAX_GRAD_NORM = 1.0  # transformers' default
LEARNING_RATES = {"adam": (1e-5, 1e-4, 1e-3), "sgd": (1e-3, 1e-2, 1e-1)}
_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}

Loss = Callable[[Rows], Tensor]


def fit(
    problem: Problem,
    report: Report | None = None,
    *,
    optimizer: Literal["adam", "sgd"] = "adam",
    learning_rates: Sequence[float] | None = None,
) -> Fitted:
    """Trains all weights in float32 on cross entropy: over the label words, or over the tokens of the true text.

    Each learning rate (by default `LEARNING_RATES`) is given the whole budget, a step costing `FORWARDS_A_STEP` of it, and
    decays linearly to 0. Of all of them the weights that did best on the development rows are kept, looked at ten times a
    run; those before the first step are among them. `chosen` says what the whole search has cost.

    Raises:
        NotApplicable: the training rows have no labels, or an optimizer step costs more than the budget.
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
    loss = _of_text(problem, policy, tokenizer) if isinstance(policy, Generation) else _of_labels(problem, policy)
    selection = Selection(problem, policy, model.state_dict())
    selection.look(learning_rate=None, step=0)
    spent = 0
    with progress(f"fine-tuning, {optimizer}", len(rates) * steps * FORWARDS_A_STEP, report) as spend:
        for rate in rates:
            selection.to_start()
            # Dropout draws from the global generator, which is given back as it was.
            with torch.random.fork_rng(), torch.enable_grad():
                torch.manual_seed(problem.seed)
                spent += _train(problem, model, loss, _OPTIMIZERS[optimizer], rate, steps, selection, spend)
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
    loss: Loss,
    optimizer_class: Callable[..., torch.optim.Optimizer],
    rate: float,
    steps: int,
    selection: Selection,
    spend: Report,
) -> int:
    """One run; stops where it diverges. Returns the forwards that it took."""
    optimizer = optimizer_class(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, max(1, steps - 1))
    for step, rows in zip(range(1, steps + 1), problem.batches(), strict=False):
        model.train()
        optimizer.zero_grad()
        value = loss(rows)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        spend(FORWARDS_A_STEP)
        diverged = not value.isfinite()
        if diverged or (look_at(step, steps) and not selection.look(learning_rate=rate, step=step)):
            break
    return step * FORWARDS_A_STEP


def _of_labels(problem: Problem, policy: Policy) -> Loss:
    """Cross entropy among the label words, classes or a row's options."""
    assert isinstance(policy, Choosing)

    def loss(rows: Rows) -> Tensor:
        every = [[answer.completion for answer in answers] for answers in policy.every_answer(rows)]
        truth = [of.index(str(row[problem.label_column])) for of, row in zip(every, rows, strict=True)]
        scores = policy.scores(rows, [CENTRE])[0]  # (rows, labels)
        return F.nll_loss(scores, torch.tensor(truth, device=scores.device))

    return loss


def _of_text(problem: Problem, policy: Generation, tokenizer: Any) -> Loss:
    """Cross entropy over the tokens of the true text and its end, given those before (teacher forcing)."""
    contexts = ContextTokenizer(tokenizer, problem.prompt)
    model = policy.evaluator.module
    logits = AnswerLogits(
        policy.evaluator,
        ParameterSet(model.named_parameters()),
        pad_id=pad_token_id(tokenizer),
        batch_size=problem.batch_size,
    )
    stop = problem.stop or ""
    end = [] if tokenizer.eos_token_id is None or stop else [tokenizer.eos_token_id]

    def answer(row: dict[str, Any], prompt_ids: list[int]) -> TokenAnswer:
        rendered = problem.prompt.render(row)
        text = cut_at(target_text(problem.prompt, row, problem.label_column), problem.stop)
        if rendered.messages:  # a reply begins anew
            (ids,) = contexts.plain([text.strip() + stop])
        else:
            (ids,) = contexts.continuations([rendered.before], [text + stop])
        return TokenAnswer(tuple(prompt_ids), tuple([*ids, *end][: problem.max_completion_length]))

    def loss(rows: Rows) -> Tensor:
        answers = [answer(row, ids) for row, ids in zip(rows, policy.prompt_ids(rows), strict=True)]
        return -chosen(logits.log_probabilities(answers), answers).mean()

    return loss
