"""`zorl diagnose`: suggests a learning rate and an ε for `zorl train` from a few hundred forward passes where tuning starts."""

from __future__ import annotations

import json
import math
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from zorl import MeZOConfig, MeZOTrainer
from zorl.apps.arguments import DiagnoseArguments
from zorl.apps.command_line import build, parse
from zorl.apps.commands import DIAGNOSE
from zorl.apps.inputs import (
    check_model_folder,
    check_source,
    draw,
    label_of,
    load,
    load_rewards,
    load_task,
    make_prompt,
    number,
    source_of,
    stop_of,
)
from zorl.curvature import Estimate
from zorl.diagnosis import Diagnosis, choose_try, diagnose
from zorl.slopes import SLOPE_ERROR
from zorl.updates import measured_in_weights

# Flags that the suggested command does not repeat.
_OWN = (
    "budget",
    "plot",
    "json",
    "learning_rate",
    "epsilon",
    "output_dir",
)


def run(argv: Sequence[str]) -> str:
    """Measures, writes the plot, and returns what to print.

    Raises:
        ValueError: an argument or the data does not fit, or the budget is too small.
    """
    given = parse(DIAGNOSE, argv)
    arguments = build(DiagnoseArguments, given)
    task = load_task(arguments.task)
    check_source(arguments, task)
    assert arguments.model is not None
    if task is not None and arguments.reward is None and arguments.loss is None:
        arguments.reward = [task.metric]
    if (arguments.reward is None) == (arguments.loss is None):
        goals = "neither" if arguments.loss is None else "both"
        raise ValueError(f"give exactly one of --reward and --loss, such as --reward f1; got {goals}")
    check_model_folder(arguments.model)
    prompt = make_prompt(arguments, task=task)
    asked_label = given.get("label_column")
    loaded = load(arguments, prompt, asked_label, task=task)
    label_column = label_of(loaded, prompt, source_of(arguments, task), needed=arguments.loss is not None)
    classes, seed = label_column if prompt.labels else None, int(given.get("seed", MeZOConfig.seed))
    shots = draw(loaded.dataset, arguments.k_shot, arguments.sample, seed=seed, label_column=classes)
    known = asked_label is not None or prompt.labels or task is not None
    rewards = load_rewards(arguments.reward, label_column if known else None)
    settings = {**given, "stop": stop_of(given.get("stop"), task)}
    settings |= {} if label_column is None else {"label_column": label_column}
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # transformers' Trainer creates its folder, although nothing is written to it
        trainer = MeZOTrainer(
            arguments.model,
            rewards or None,
            loss=arguments.loss,
            args=build(MeZOConfig, {**settings, "output_dir": folder, "disable_tqdm": True}),
            train_dataset=loaded.dataset if shots is None else shots.train,
            prompt=prompt,
        )
        with tqdm(desc="diagnosis", unit="forward", total=arguments.budget, leave=False) as bar:
            found = diagnose(trainer, arguments.budget, bar.update)
    result = {
        "model": arguments.model,
        "objective": trainer.objective_name,
        "batch": trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps,
        "distribution": trainer.args.distribution,
        "update": trainer.args.update,
        **_figures(found),
        "command": _command(given, found, trainer.args.update),
    }
    path = Path(arguments.plot)
    path.parent.mkdir(parents=True, exist_ok=True)
    _plot(found, result, path)
    if arguments.json:
        return json.dumps({**result, "plot": str(path)})
    return f"{_table(found, result)}\n\nplot: {path}"


def _figures(found: Diagnosis) -> dict[str, Any]:
    """The results for JSON: an estimate becomes a list of its value and the two ends of its 95% interval."""
    of = found.curvature
    gradient, trace, frobenius, norm = of.gradient_squared, of.trace, of.frobenius, of.norm
    theory = found.corollary_1
    return {
        "parameters": found.parameters,
        "forwards": found.forwards,
        "calibration_forwards": found.calibration_forwards,
        "directions": len(of.slopes),
        "gradient_norm_squared": _triple(gradient),
        "trace": _triple(trace),
        "frobenius_norm": _triple(frobenius),
        "operator_norm": _triple(norm),
        "effective_rank": _triple(of.effective_rank),
        "effective_rank_at_most": _triple(of.effective_rank_bound),
        "lemma_2": {
            "n_spsa": found.n_spsa,
            "expected": found.lemma_2,
        },
        "confirmed_by_another_batch": _triple(found.confirmed),
        "epsilons": [
            {"epsilon": look.epsilon, "informative": look.informative, "slope_error": number(look.slope_error)}
            for look in found.looks
        ],
        "corollary_1": {
            "learning_rate_normalized": None if theory is None else number(theory * found.gradient),
            "learning_rate_sgd": None if theory is None else number(theory),
        },
        "tries": [{"learning_rate": number(t.learning_rate), "fall_a_step": number(t.fall)} for t in found.tries],
        "predicted_fall_a_step": None if found.predicted_fall is None else number(found.predicted_fall),
        "suggested": {
            "epsilon": "auto" if found.epsilon is None else _rounded(found.epsilon),
            "learning_rate_normalized": _rounded(found.lr_normalized),
            "learning_rate_sgd": _rounded(found.lr_sgd),
        },
    }


def _triple(estimate: Estimate) -> list[float | None]:
    return [number(estimate.value), number(estimate.low), number(estimate.high)]


def _rounded(value: float) -> float:
    """Rounds to two digits: the estimate is no more precise."""
    return float(f"{value:.1e}")


def _command(given: Mapping[str, Any], found: Diagnosis, update: str) -> str:
    """A `zorl train` command with the given flags and the suggested ones."""
    words = ["zorl", "train"]
    for name, value in given.items():
        if name in _OWN or value is None or value is False:
            continue
        if isinstance(value, Mapping):
            value = [f"{label}={word}" for label, word in value.items()]
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name}", *map(str, values)]
    rate = found.lr_normalized if measured_in_weights(update) else found.lr_sgd
    epsilon = "auto" if found.epsilon is None else f"{_rounded(found.epsilon):g}"
    return shlex.join([*words, "--learning_rate", f"{_rounded(rate):g}", "--epsilon", epsilon])


def _table(found: Diagnosis, result: Mapping[str, Any]) -> str:
    of, d, m = found.curvature, found.parameters, len(found.curvature.slopes)
    size = f"{d:,} parameters, batches of {result['batch']} rows, {result['distribution']} directions"
    unit = found.gradient if measured_in_weights(result["update"]) else 1.0
    undefined = "not defined for this estimator"
    lemma = undefined if found.lemma_2 is None else f"{found.lemma_2:.4g}"
    rate = undefined if found.corollary_1 is None else f"{found.corollary_1 * unit:.1e}".replace("inf", "no limit")
    best = choose_try(found.tries)
    rows = [
        ("gradient, squared norm", _shown(of.gradient_squared), "Slope of the loss at θ, on one batch."),
        ("trace of the Hessian", _shown(of.trace), "Expected curvature along a random direction of length √d."),
        ("Frobenius norm", _shown(of.frobenius), "Curvature over all directions, root of the sum of squares."),
        ("largest eigenvalue", _shown(of.norm), f"Curvature of the sharpest direction; overestimated if r > {m}."),
        ("effective rank r", _shown(of.effective_rank), f"Trace over largest eigenvalue; this, not d = {d:,}, slows MeZO down."),
        ("r is at most", _shown(of.effective_rank_bound), "Trace squared over Frobenius norm squared, if H ⪰ 0."),
        (f"Lemma 2, n = {found.n_spsa}", lemma, "Squared norm of the estimated gradient over the true one: computed."),
        ("confirmed", _shown(found.confirmed), "Share of a squared slope that another batch confirms."),
        ("Corollary 1", rate, f"The learning rate that follows, for update={result['update']}."),
    ]  # fmt: skip
    spent = f"{found.forwards} forward passes of a batch, {found.calibration_forwards} of them for the calibration before tuning"
    looks = [
        f"{look.epsilon:>10.1e}{look.informative:>14.0%}"
        f"{'?' if math.isnan(look.slope_error) else f'{look.slope_error:.1%}':>19}"
        f"{'   <- chosen' if look.epsilon == found.epsilon else ''}"
        for look in found.looks
    ]
    tries = [f"{t.learning_rate:>14.1e}{t.fall:>27.2e}{'   <- chosen' if t is best else ''}" for t in found.tries]
    paragraphs = [
        f"{result['model']}: {result['objective']}, {size}\n{spent}; in brackets: 95% intervals",
        "\n".join(f"{name:24}{figure:>34}   {meaning}" for name, figure, meaning in rows),
        "\n".join([f"{'epsilon':>10}{'informative':>14}{'slope error':>19}", *looks]),
        f"Chosen: the largest epsilon whose slope error is at most {SLOPE_ERROR:.0%}, or else the one with the smallest error.\n"
        "Smaller ones lose slopes to rounding or to the steps of a reward; larger ones average over curvature."
        + (
            ""
            if found.epsilon is not None
            else "\nNone keeps the probes informative here: epsilon=auto adapts it during training."
        ),
        "\n".join([f"{'learning rate':>14}{'fall of the loss per step':>27}   update={result['update']}", *tries]),
        f"{_about_the_middle_rate(found)}It is chosen unless another rate lowered the loss significantly more.",
        f"suggested: learning_rate {found.lr_normalized:.1e} with update=normalized (typical change of a weight per step),\n"
        f"           or {found.lr_sgd:.1e} with update=sgd; epsilon {result['suggested']['epsilon']}",
        f"  {result['command']}",
    ]
    return "\n\n".join(paragraphs)


def _about_the_middle_rate(found: Diagnosis) -> str:
    if found.corollary_1 == math.inf:
        return "Corollary 1 sets no limit, because nothing curves upwards: the middle rate moves weights by epsilon per step.\n"
    if found.predicted_fall is None:
        return "The middle rate is Corollary 1's for estimator=spsa, but moves weights by at most epsilon per step.\n"
    return (
        "The middle rate is that of Corollary 1, but moves weights by at most epsilon per step; it should lower the loss by\n"
        f"{found.predicted_fall:.1e} in the first step. "
    )


def _shown(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "unknown"
    if math.isnan(estimate.low):
        return f"{estimate.value:.3g}"
    return f"{estimate.value:.3g} [{estimate.low:.2g}, {estimate.high:.2g}]"


def _plot(found: Diagnosis, result: Mapping[str, Any], path: Path) -> None:
    import torch
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    epsilons = [look.epsilon for look in found.looks]
    errors = [look.slope_error if look.slope_error > 0.0 else math.nan for look in found.looks]
    left.loglog(epsilons, errors, "o-", color="#1f5aa6")
    left.axhline(SLOPE_ERROR, color="#8a8a8a", linewidth=0.8, linestyle="--")
    if found.epsilon is not None:
        left.axvline(found.epsilon, color="#c2571a", linewidth=1.2)
    left.set(title="slope error", xlabel="epsilon")

    spectrum = torch.linalg.eigvalsh(found.curvature.matrix).flip(0) / len(found.curvature.slopes)
    middle.bar(range(1, len(spectrum) + 1), spectrum.tolist(), color="#1f5aa6")
    middle.axhline(found.curvature.norm.value, color="#c2571a", linewidth=1.2)
    middle.set(title=f"Hessian in {len(spectrum)} directions: eigenvalues", xlabel="(line: the largest, corrected)")

    rates = [f"{t.learning_rate:.1e}" for t in found.tries]
    best = choose_try(found.tries)
    colours = ["#c2571a" if t is best else "#1f5aa6" for t in found.tries]
    right.bar(rates, [t.fall for t in found.tries], color=colours)
    if found.predicted_fall is not None:
        right.axhline(found.predicted_fall, color="#8a8a8a", linewidth=0.8, linestyle="--")
    right.axhline(0.0, color="black", linewidth=0.6)
    dashed = "" if found.predicted_fall is None else " (dashed: predicted)"
    right.set(title=f"fall of the loss per step{dashed}", xlabel=f"learning rate, update={result['update']}")
    figure.suptitle(f"{Path(str(result['model'])).name}, {result['objective']}")
    figure.savefig(path, dpi=150)
