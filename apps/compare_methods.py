"""The methods that `zorl compare` runs side by side: MeZO in its forms, and the baselines."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from zorl import MeZOConfig, MeZOTrainer
from zorl.apps.elapsed import Elapsed
from zorl.apps.inputs import number
from zorl.baselines import bbt, fine_tuning, grpo, in_context, linear_probing, majority, threshold, zero_shot
from zorl.baselines.problem import Fitted, NotApplicable, Problem, Report, progress
from zorl.config import DIRECTIONS
from zorl.probe import CENTRE
from zorl.prompts import Prompt
from zorl.rewards import load_reward
from zorl.schedules import Directions

CROSS_ENTROPY = "cross_entropy"
EVALUATIONS = 10  # evaluations per run after the start's, on the held-out rows; the best step counts
# What a direction costs. A forward gradient computes a slope beside each matrix product, which takes two more of them.
FORWARDS_PER_DIRECTION = {
    "one_sided": 1, "one_point": 1, "spsa": 2, "variance_spsa": 2, "expectation_spsa": 2, "forward_gradient": 3,
}  # fmt: skip
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
    """MeZO within the budget, which includes the forward passes of its calibration.

    The best of the start and of ten evaluations is kept, by the reward that is learned; on cross entropy, by the problem's own.

    Args:
        objective: name of a reward, or "cross_entropy"; the problem's own reward by default.
        settings: further fields of `MeZOConfig`.

    Raises:
        NotApplicable: the budget does not pay for a step.
    """
    calibrating = 0
    if settings.get("calibration") != "none":
        calibrating = _calibration_forwards(problem)
        settings["calibration_rows"] = _calibration_rows(problem)
    before = calibrating
    estimator = settings.get("estimator", "one_sided")
    if settings.get("block_scales") == "gradient_norms":
        before += FORWARDS_PER_DIRECTION[estimator] * len(list(problem.load()[0].parameters()))
        settings["block_scales_every"] = problem.budget + 1  # they are measured once
    left = problem.budget - before
    if "n_spsa" not in settings:
        # At least two: one-sided directions are compared with each other.
        settings["n_spsa"] = str(max(2, min(DIRECTIONS, left)))
    directions = Directions.parse(settings["n_spsa"])

    def cost(steps: int) -> int:
        return FORWARDS_PER_DIRECTION[estimator] * sum(map(directions.at, range(steps)))

    steps = bisect.bisect_right(range(1, left + 1), left, key=cost)
    if steps == 0:
        after = f" after the {before} that come before it" if before else ""
        raise NotApplicable(
            f"the first step takes {cost(1)} forwards, and a budget of {problem.budget} leaves {max(0, left)}{after}; raise it"
        )
    total = before + cost(steps)
    steps += before > calibrating  # measuring the blocks is a step that moves nothing
    every = math.ceil(steps / EVALUATIONS)
    settings.setdefault("eval_on_start", True)
    trainer = _trainer(
        problem, folder, objective, max_steps=steps, eval_strategy="steps", eval_steps=every, save_steps=every,
        load_best_model_at_end=True, **settings,
    )  # fmt: skip
    # Of a forward gradient the trainer counts one forward.
    each = FORWARDS_PER_DIRECTION[estimator] if estimator == "forward_gradient" else 1

    def spent() -> int:
        calibrated = trainer.calibration_forwards
        return calibrated + each * (trainer.forwards - calibrated)

    with progress("MeZO", total, None) as spend:
        trainer.add_callback(_Spent(spent, spend))
        trainer.train(resume_from_checkpoint=trainer.folder.trajectory.exists())
    best = trainer.state.best_metric
    assert best is not None  # the start has been evaluated, at least
    chosen = {"step": trainer.step, "learning_rate": trainer.args.learning_rate, "dev_score": number(best)}
    return replace(_fitted(trainer, **chosen), forwards=spent())


def n_spsa(problem: Problem, folder: Path) -> Fitted:
    """SPSA whose directions per step grow linearly from one to eight (MeZO, Appendix A)."""
    left = problem.budget - _calibration_forwards(problem)

    def cost(steps: int) -> int:
        return FORWARDS_PER_DIRECTION["spsa"] * sum(map(Directions(1, DIRECTIONS, steps).at, range(steps)))

    steps = max(1, bisect.bisect_right(range(1, left + 1), left, key=cost))
    return mezo(problem, folder, estimator="spsa", n_spsa=str(Directions(1, DIRECTIONS, steps)))


def macro_f1(problem: Problem, folder: Path) -> Fitted:
    """MeZO on macro-F1.

    Raises:
        NotApplicable: the prompt has no labels, so that every text would be a class of its own.
    """
    if not problem.prompt.labels:
        raise NotApplicable(f"macro-F1 needs a prompt with labels, and {problem.prompt.template!r} has none")
    return mezo(problem, folder, objective="f1")


def label_head(problem: Problem, folder: Path) -> Fitted:
    """Where MeZO starts: a linear head on the last hidden state, tuned by MeZO on the likelihood of the labels that the
    reward favours. The model is not changed."""
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


def _calibration_forwards(problem: Problem) -> int:
    """What the calibration costs; nothing where there are no labels to calibrate."""
    return math.ceil(_calibration_rows(problem) / problem.batch_size) if problem.prompt.labels else 0


def _trainer(problem: Problem, folder: Path, objective: str | None, **settings: Any) -> MeZOTrainer:
    start = time.perf_counter()
    if objective == CROSS_ENTROPY:
        goal: dict[str, Any] = {"loss": CROSS_ENTROPY, "metrics": [problem.reward]}
        settings["metric_for_best_model"] = problem.rewards.names[0]
    else:
        reward = problem.reward if objective is None else load_reward(objective, column=problem.label_column)
        goal = {"reward_funcs": reward}
    config = MeZOConfig(
        output_dir=str(folder), seed=problem.seed, per_device_train_batch_size=problem.batch_size,
        forward_batch_size=problem.forward_batch_size, label_column=problem.label_column, max_length=problem.max_length,
        max_completion_length=problem.max_completion_length, stop=problem.stop, temperature=0.0, disable_tqdm=True,
        report_to="none", **settings,
    )  # fmt: skip
    trainer = MeZOTrainer(
        problem.model, **goal, args=config, train_dataset=problem.train, eval_dataset=problem.dev, prompt=problem.prompt
    )
    trainer.add_callback(Elapsed(folder, start))
    trainer.pop_callback(PrinterCallback)  # ten lines per cell that nobody reads
    return trainer


class _Spent(TrainerCallback):
    """Reports after each step what has been spent since the last one.

    Args:
        spent: the forwards since the run began.
    """

    def __init__(self, spent: Callable[[], int], report: Report) -> None:
        self._spent, self._report, self._told = spent, report, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self._spent()
        self._report(now - self._told)
        self._told = now


def _fitted(trainer: MeZOTrainer, **chosen: Any) -> Fitted:
    return Fitted(lambda rows: trainer.policy.answers(rows, [CENTRE])[0], trainer.forwards, chosen)


def published(
    problem: Problem, folder: Path, *, objective: str | None = None, rates: Sequence[float] = PUBLISHED_RATES
) -> Fitted:
    """The paper's recipe, with the best of several learning rates. The forward passes of all runs count.

    A rate is judged by what its steps lead to: the start, which all rates share, is no candidate before one has been chosen.

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
        fitted = mezo(
            quarter, folder / f"{rate:g}", objective=objective, learning_rate=rate, eval_on_start=False, **PUBLISHED
        )
        found[rate] = problem.score(problem.dev, fitted.answers(problem.dev)), fitted.forwards
    best = max(found, key=lambda rate: found[rate][0])
    fitted = mezo(problem, folder / "best", objective=objective, learning_rate=best, **PUBLISHED)
    return replace(fitted, forwards=fitted.forwards + sum(forwards for _, forwards in found.values()))


def baseline(fit: Callable[..., Fitted], **settings: Any) -> Callable[[Problem, Path], Fitted]:
    """A baseline. If it is interrupted it starts afresh, so it needs no folder."""
    return lambda problem, _: fit(problem, **settings)


METHODS: dict[str, Method] = {
    "majority": Method("always the commonest label", baseline(majority.fit)),
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
    "mezo_f1": Method("zorl, macro-F1", macro_f1),
    "mezo_lora": Method("zorl, LoRA, the metric", partial(mezo, tune="lora")),
    "mezo_prefix": Method("zorl, prefix, the metric", partial(mezo, tune="prefix")),
    "mezo_head": Method("zorl, output embedding, the metric", partial(mezo, tune="head")),
    "mezo_momentum": Method(
        "zorl, momentum, the metric", partial(mezo, update="momentum", learning_rate=1e-4, **TWO_SIDED)
    ),
    "mezo_adam": Method("zorl, Adam, the metric", partial(mezo, update="adam", **TWO_SIDED)),
    "mezo_one_point": Method("zorl, one point, the metric", partial(mezo, estimator="one_point", n_spsa="1")),
    "mezo_two_sided": Method("zorl, two-sided, the metric", partial(mezo, **TWO_SIDED)),
    "mezo_n_spsa": Method("zorl, two-sided, 1 to 8 directions, the metric", n_spsa),
    "mezo_variance": Method(
        "zorl, variance-modified, the metric",
        partial(mezo, estimator="variance_spsa", n_spsa="1", block_scales="parameter_norms"),
    ),
    "mezo_expectation": Method(
        "zorl, expectation-modified, the metric",
        partial(mezo, estimator="expectation_spsa", n_spsa="1", block_scales="gradient_norms"),
    ),
    "mezo_forward_gradient": Method(
        "zorl, forward gradient, cross entropy",
        partial(mezo, objective=CROSS_ENTROPY, estimator="forward_gradient", n_spsa="1"),
    ),
    "lp_mezo": Method("linear probe, then MeZO, cross entropy", lp_mezo),
    "fine_tuning": Method("fine-tuning, Adam", baseline(fine_tuning.fit, optimizer="adam")),
    "fine_tuning_sgd": Method("fine-tuning, SGD", baseline(fine_tuning.fit, optimizer="sgd")),
    "grpo": Method("GRPO (TRL)", baseline(grpo.fit)),
}
# The default of --methods: baselines that cost no more than MeZO, and MeZO on cross entropy and on the metric.
STANDARD = ("majority", "zero_shot", "threshold", "in_context", "linear_probing", "mezo_cross_entropy", "mezo")
