"""The methods that `zorl compare` runs side by side: MeZO in its forms, and the baselines."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from zorl import MeZOConfig, MeZOTrainer
from zorl.apps.elapsed import Elapsed
from zorl.baselines import bbt, fine_tuning, grpo, in_context, linear_probing, threshold, zero_shot
from zorl.baselines.problem import Fitted, NotApplicable, Problem
from zorl.config import DIRECTIONS
from zorl.probe import CENTRE
from zorl.prompts import Prompt
from zorl.rewards import load_reward

CROSS_ENTROPY = "cross_entropy"
EVALUATIONS = 10  # evaluations per run, on the held-out rows; the best step counts
TWO_SIDED: dict[str, Any] = {"estimator": "spsa", "n_spsa": "1"}
# The recipe of the paper's own code. Its learning rate comes from a grid: each rate is tried with a quarter of the budget, and
# the one that does best on the held-out rows then gets the full budget. The paper's grids, 1e-7 … 1e-5 for RoBERTa-large and
# 1e-7 and 1e-6 for OPT, suit its large models; this one is for small ones (see benchmarks/efficiency.py).
PUBLISHED_RATES = (1e-5, 1e-4, 1e-3)
PUBLISHED: dict[str, Any] = {
    "distribution": "gaussian", "epsilon": "1e-3", "update": "sgd", "calibration": "none", "label_reward": "best",
    "lr_scheduler_type": "constant", **TWO_SIDED,
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        title: the method's name in the table.
        fit: learns from a problem. The folder is for files from which an interrupted run continues.
        takes_rates: whether `fit` takes a grid of learning rates as `rates`.
    """

    title: str
    fit: Callable[..., Fitted]
    takes_rates: bool = False


def mezo(problem: Problem, folder: Path, *, objective: str | None = None, **settings: Any) -> Fitted:
    """MeZO within the budget, which includes the forward passes of its calibration; the best of ten evaluations is kept.

    Args:
        objective: name of a reward, or "cross_entropy"; the problem's own reward by default.
        settings: further fields of `MeZOConfig`.

    Raises:
        NotApplicable: the budget does not pay for a step.
    """
    before = 0
    if settings.get("calibration") != "none" and problem.prompt.labels:
        rows = _calibration_rows(problem)
        before = math.ceil(rows / problem.batch_size)
        settings["calibration_rows"] = rows
    left = problem.budget - before
    sides = 2 if settings.get("estimator") == "spsa" else 1
    # The fewest directions that a step can have: one-sided ones are compared with each other.
    fewest = int(settings.get("n_spsa", 2)) * sides
    if left < fewest:
        after = f" after the {before} of the calibration" if before else ""
        raise NotApplicable(
            f"a step takes {fewest} forwards, and a budget of {problem.budget} leaves {max(0, left)}{after}; raise it"
        )
    settings.setdefault("n_spsa", str(min(DIRECTIONS, left)))
    steps = left // (int(settings["n_spsa"]) * sides)
    every = math.ceil(steps / EVALUATIONS)
    trainer = _trainer(
        problem, folder, objective, max_steps=steps, eval_strategy="steps", eval_steps=every, save_steps=every,
        load_best_model_at_end=True, **settings,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=trainer.folder.trajectory.exists())
    return _fitted(trainer, step=trainer.step, learning_rate=trainer.args.learning_rate)


def label_head(problem: Problem, folder: Path) -> Fitted:
    """Where MeZO starts: a linear head on the last hidden state, tuned by MeZO on the reward. The model is not changed."""
    if problem.prompt.label_words is None:
        raise NotApplicable(f"a label head needs a prompt with label words, and {problem.prompt.template!r} has none")
    rows = min(MeZOConfig.calibration_rows, problem.budget * problem.batch_size)
    trainer = _trainer(problem, folder, None, calibration_rows=rows)
    trainer.calibrate("head")
    return _fitted(trainer)


def lp_mezo(problem: Problem, folder: Path) -> Fitted:
    """A linear probe as the head of a sequence-classification model, then MeZO on all of it (Kumar et al. 2022, with MeZO).

    Raises:
        NotApplicable: the prompt has no labels, some label has no row to fit the probe to, or the budget does not pay for a step.
    """
    if not problem.prompt.labels:
        raise NotApplicable(f"a linear probe needs labels, and {problem.prompt.template!r} has none")
    fields = problem.prompt.fields
    joint = "{sep}" if len(fields) == 2 else " "
    prompt = Prompt(joint.join(f"{{{field}}}" for field in fields), classes=problem.prompt.labels)
    read = problem.sample(_calibration_rows(problem))  # the rows that the probe is fitted to
    known = {str(row[problem.label_column]) for row in read}
    missing = next((label for label in problem.prompt.labels if label not in known), None)
    if missing is not None:
        raise NotApplicable(
            f"a linear probe needs training rows of every label, and none of the {len(read)} that it reads has the label "
            f"{missing!r}: raise the budget, or learn from more rows"
        )
    return mezo(replace(problem, prompt=prompt), folder, objective=CROSS_ENTROPY)


def _calibration_rows(problem: Problem) -> int:
    """The rows to calibrate on: as many as half of the budget reads, so that the rest is left for steps."""
    affordable = max(1, problem.budget // 2) * problem.batch_size
    return min(MeZOConfig.calibration_rows, affordable, len(problem.train))


def _trainer(problem: Problem, folder: Path, objective: str | None, **settings: Any) -> MeZOTrainer:
    start = time.perf_counter()
    if objective == CROSS_ENTROPY:
        goal: dict[str, Any] = {"loss": CROSS_ENTROPY}
    else:
        reward = problem.reward if objective is None else load_reward(objective, column=problem.label_column)
        goal = {"reward_funcs": reward}
    config = MeZOConfig(
        output_dir=str(folder), seed=problem.seed, per_device_train_batch_size=problem.batch_size,
        forward_batch_size=problem.forward_batch_size, label_column=problem.label_column, max_length=problem.max_length,
        max_completion_length=problem.max_completion_length, temperature=0.0, disable_tqdm=True, report_to="none", **settings,
    )  # fmt: skip
    trainer = MeZOTrainer(
        problem.model, **goal, args=config, train_dataset=problem.train, eval_dataset=problem.dev, prompt=problem.prompt
    )
    trainer.add_callback(Elapsed(folder, start))
    trainer.pop_callback(PrinterCallback)  # ten lines per cell that nobody reads
    return trainer


def _fitted(trainer: MeZOTrainer, **chosen: Any) -> Fitted:
    return Fitted(lambda rows: trainer.policy.answers(rows, [CENTRE])[0], trainer.forwards, chosen)


def published(
    problem: Problem, folder: Path, *, objective: str | None = None, rates: Sequence[float] = PUBLISHED_RATES
) -> Fitted:
    """The paper's recipe, with the best of several learning rates. The forward passes of all runs count.

    Args:
        objective: as for `mezo`.
        rates: the learning rates to try.

    Raises:
        NotApplicable: a quarter of the budget does not pay for a step.
    """
    if problem.budget < 8:
        raise NotApplicable(
            "each learning rate is tried with a quarter of the budget, a step takes 2 forwards, and the budget is "
            f"{problem.budget}; raise it to 8 or more"
        )
    quarter = replace(problem, budget=problem.budget // 4)
    found: dict[float, tuple[float, int]] = {}
    for rate in rates:
        fitted = mezo(quarter, folder / f"{rate:g}", objective=objective, learning_rate=rate, **PUBLISHED)
        found[rate] = problem.score(problem.dev, fitted.answers(problem.dev)), fitted.forwards
    best = max(found, key=lambda rate: found[rate][0])
    fitted = mezo(problem, folder / "best", objective=objective, learning_rate=best, **PUBLISHED)
    return replace(fitted, forwards=fitted.forwards + sum(forwards for _, forwards in found.values()))


def _silent(forwards: int) -> None:
    """Reports nothing: the progress bar counts cells."""


def baseline(fit: Callable[..., Fitted], **settings: Any) -> Callable[[Problem, Path], Fitted]:
    """A baseline. If it is interrupted it starts afresh, so it needs no folder."""
    return lambda problem, _: fit(problem, _silent, **settings)


METHODS: dict[str, Method] = {
    "zero_shot": Method("zero-shot", baseline(zero_shot.fit)),
    "threshold": Method("one fitted threshold per label", baseline(threshold.fit)),
    "in_context": Method(f"in-context, up to {in_context.DEMONSTRATIONS} demonstrations", baseline(in_context.fit)),
    "label_head": Method("zorl's label head alone", label_head),
    "linear_probing": Method("linear probing", baseline(linear_probing.fit)),
    "bbt": Method("BBT (CMA-ES on a soft prompt)", baseline(bbt.fit)),
    "mezo_published": Method(
        "published MeZO, cross entropy", partial(published, objective=CROSS_ENTROPY), takes_rates=True
    ),
    "mezo_published_metric": Method("published MeZO, the metric", published, takes_rates=True),
    "mezo_cross_entropy": Method("zorl, cross entropy", partial(mezo, objective=CROSS_ENTROPY)),
    "mezo": Method("zorl, the metric", mezo),
    "mezo_f1": Method("zorl, macro-F1", partial(mezo, objective="f1")),
    "mezo_lora": Method("zorl, LoRA, the metric", partial(mezo, tune="lora")),
    "mezo_prefix": Method("zorl, prefix, the metric", partial(mezo, tune="prefix")),
    "mezo_head": Method("zorl, output embedding, the metric", partial(mezo, tune="head")),
    "mezo_momentum": Method(
        "zorl, momentum, the metric", partial(mezo, update="momentum", learning_rate=1e-4, **TWO_SIDED)
    ),
    "mezo_adam": Method("zorl, Adam, the metric", partial(mezo, update="adam", **TWO_SIDED)),
    "mezo_one_point": Method("zorl, one point, the metric", partial(mezo, estimator="one_point", n_spsa="1")),
    "mezo_two_sided": Method("zorl, two-sided, the metric", partial(mezo, **TWO_SIDED)),
    "lp_mezo": Method("linear probe, then MeZO, cross entropy", lp_mezo),
    "fine_tuning": Method("fine-tuning, Adam", baseline(fine_tuning.fit, optimizer="adam")),
    "fine_tuning_sgd": Method("fine-tuning, SGD", baseline(fine_tuning.fit, optimizer="sgd")),
    "grpo": Method("GRPO (TRL)", baseline(grpo.fit)),
}
# The default of --methods: baselines that cost no more than MeZO, and MeZO on cross entropy and on the metric.
STANDARD = ("zero_shot", "threshold", "in_context", "linear_probing", "mezo_cross_entropy", "mezo")
