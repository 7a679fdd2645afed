"""GRPO (Shao et al. 2024): the policy gradient of sampled text, by TRL's trainer."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback

from zorl.baselines.problem import Fitted, NotApplicable, Problem, Report, answers_of, progress
from zorl.baselines.selection import Selection, look_at
from zorl.encoding import ContextTokenizer, longest_input
from zorl.generation import Generation, cut_at
from zorl.prompts import Answer

GENERATIONS = 8  # texts per prompt, TRL's default; fewer where they do not divide a batch
FORWARDS_A_STEP = 4  # generating a batch, reading it, and two for the backward pass
LEARNING_RATES = (1e-6, 1e-5, 1e-4)


def fit(problem: Problem, report: Report | None = None, *, learning_rates: Sequence[float] = LEARNING_RATES) -> Fitted:
    """Trains all weights in float32 with TRL's GRPOTrainer and its defaults, on the reward of single texts.

    A batch holds `batch_size` texts, in groups of `GENERATIONS` per prompt. Each learning rate gets the whole budget, of which
    a step costs `FORWARDS_A_STEP`. The weights are scored on the development rows before the first step and ten times per run,
    and the best of all runs are kept. `chosen` says what the whole search cost.

    Raises:
        NotApplicable: the model is not a causal language model, the prompt has label words or options, the reward scores a
            batch as a whole, no prompt leaves room for an answer, or the budget or the batch is too small.
    """
    if problem.prompt.labels:
        raise NotApplicable(
            f"GRPO samples text, and the prompt {problem.prompt.template!r} is answered with one of its label words"
        )
    group = next((size for size in range(GENERATIONS, 1, -1) if problem.batch_size % size == 0), None)
    steps = problem.budget // FORWARDS_A_STEP
    if group is None or not steps:
        raise NotApplicable(
            f"a step of GRPO costs {FORWARDS_A_STEP} forwards of a batch that holds groups of 2 to {GENERATIONS} texts:"
            f" the budget is {problem.budget} and batch_size is {problem.batch_size}"
        )
    model, tokenizer = problem.load("float32")
    policy = _text_policy(problem, model, tokenizer)
    rows = _rows_that_fit(problem, model, tokenizer)
    selection = Selection(problem, policy, model.state_dict())
    selection.look(learning_rate=None, step=0)
    spent = 0
    with progress("GRPO", len(learning_rates) * steps * FORWARDS_A_STEP, report) as spend, _random_state_kept():
        for rate in learning_rates:
            selection.to_start()
            spent += _train(problem, model, tokenizer, rows, group, rate, steps, selection, spend)
    selection.to_best()
    model.requires_grad_(False)
    return Fitted(
        partial(answers_of, policy),
        steps * FORWARDS_A_STEP,
        {"generations": group, "rows": len(rows), **selection.chosen, "search_forwards": spent},
    )


def _text_policy(problem: Problem, model: Any, tokenizer: Any) -> Generation:
    if not model.can_generate():
        raise NotApplicable(f"GRPO needs a causal language model to sample from, and {type(model).__name__} is not one")
    policy = problem.policy(model, tokenizer)
    if not isinstance(policy, Generation):
        raise NotApplicable(
            f"GRPO samples text, and the prompt {problem.prompt.template!r} is answered with one of a row's options"
        )
    return policy


def _rows_that_fit(problem: Problem, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """The training rows whose prompts fit: TRL does not truncate them."""
    contexts = ContextTokenizer(tokenizer, problem.prompt)
    rendered = [problem.prompt.render(row) for row in problem.train]
    lengths = map(len, contexts.ids(rendered, [contexts.text(one) for one in rendered]))
    limit = longest_input(model, tokenizer) - problem.max_completion_length
    rows = [row for row, length in zip(problem.train, lengths, strict=True) if length <= limit]
    if not rows:
        raise NotApplicable(
            f"no prompt of the training rows leaves room for an answer of {problem.max_completion_length} tokens; lower"
            " max_completion_length"
        )
    return rows


def _train(
    problem: Problem,
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    group: int,
    rate: float,
    steps: int,
    selection: Selection,
    spend: Report,
) -> int:
    """Trains with one learning rate, and stops if it diverges. Returns the forwards spent."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    asked = [problem.prompt.render(row) for row in rows]
    conversations = [[{"role": role, "content": text} for role, text in one.messages] for one in asked]
    prompts = [chat or one.before for chat, one in zip(conversations, asked, strict=True)]
    fields = GRPOConfig.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    checkpointing: dict[str, Any] = {name: False}  # transformers 5.18 renamed it
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            max_steps=steps,
            learning_rate=rate,
            per_device_train_batch_size=problem.batch_size,
            num_generations=group,
            max_completion_length=problem.max_completion_length,
            chat_template_kwargs=dict(problem.prompt.chat_template_kwargs or {}) or None,
            seed=problem.seed,
            bf16=False,
            **checkpointing,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=_reward(problem, rows),
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": prompts, "index": list(range(len(rows)))}),
            processing_class=tokenizer,
            callbacks=[_Looks(selection, rate, spend)],
        )
        trainer.pop_callback(PrinterCallback)
        trainer.train()
    return int(trainer.state.global_step) * FORWARDS_A_STEP


class _Looks(TrainerCallback):
    """Counts steps, and scores the development rows along the way."""

    def __init__(self, selection: Selection, rate: float, spend: Report) -> None:
        self._selection, self._rate, self._spend = selection, rate, spend

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._spend(FORWARDS_A_STEP)
        if look_at(state.global_step, state.max_steps):
            finite = self._selection.look(learning_rate=self._rate, step=state.global_step)
            control.should_training_stop |= not finite


def _reward(problem: Problem, rows: list[dict[str, Any]]) -> Callable[..., list[float | None]]:
    """The reward with TRL's signature. It sees the same prompts and columns as with every other method."""
    conversational = [problem.prompt.render(row).conversational for row in rows]

    def reward(completions: list[Any], completion_ids: list[Any], index: list[int], **_: Any) -> list[float | None]:
        answers = []
        for completion, ids, i in zip(completions, completion_ids, index, strict=True):
            text = completion[-1]["content"] if isinstance(completion, list) else completion
            text = cut_at(text, problem.stop)  # TRL itself samples on
            answers.append(Answer([{"role": "assistant", "content": text}] if conversational[i] else text, list(ids)))
        values = problem.values([rows[i] for i in index], answers)
        if values.set_level:
            raise NotApplicable(
                f"GRPO needs a reward for each text, and {' and '.join(map(repr, values.names))} scores a batch as a whole"
            )
        return [None if value != value else value for value in values.total.tolist()]

    return reward


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restores the global generators, which Trainer seeds and TRL samples from."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
