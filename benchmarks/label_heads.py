"""What a label head should be tuned on: the likelihood of the labels that a reward favours, or the expected reward itself.

    python benchmarks/label_heads.py --model MODEL --data FOLDER      # about ten minutes; writes docs/label_heads.md

MODEL is a small masked language model; FOLDER holds sst2/ (train.tsv) and trec/ (TREC.train.all). The model stays as it is: its
states are computed once, a head is tuned on them by each goal, and scored on rows that neither saw. zorl tunes on the first
goal. The second, of which it is rid, lives on in this file.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine, spread
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

from zorl import MeZO, MeZOConfig, MeZOTrainer
from zorl.directions import key
from zorl.expected_reward import expected_reward
from zorl.head_tuning import DIRECTIONS, EPSILON, LEARNING_RATE, LOOK, PATIENCE, STEPS, fit_bias, fit_head
from zorl.kernels import kernel_for
from zorl.probe import Scores
from zorl.rewards import accuracy
from zorl.tasks import task

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "label_heads.json"
SEEDS = (100, 101, 102, 103, 104)
SIZES, HELD_OUT = (1024, 96), 1000
GOALS = {"bias": "fitted biases alone", "expected": "expected reward", "likelihood": "likelihood of favoured labels"}


@dataclass(frozen=True)
class States:
    """What a head is tuned on, and scored on.

    Attributes:
        scores: of the label words, shape `(rows, labels)`.
        states: with a column of ones, of variance one over the tuning rows, shape `(rows, width + 1)`.
        truth: the right label's index, shape `(rows,)`.
    """

    scores: Tensor
    states: Tensor
    truth: Tensor


def expected_head(tuning: States, seed: int) -> Tensor:
    """W and b, by as many steps on the expected accuracy as do the halves of the rows good on each other."""
    rows = torch.arange(len(tuning.scores))
    halves = (rows[0::2], rows[1::2])
    fits = [_steps(tuning, half, seed) for half in halves]
    best, best_step = -1.0, 0
    for step, weights in enumerate(zip(*fits, strict=True)):
        if step % LOOK:
            continue
        value = sum(_right(tuning, other, weight) for other, weight in zip(halves[::-1], weights, strict=True))
        if value > best:
            best, best_step = value, step
        elif step - best_step >= PATIENCE:
            break
    return next(weight.clone() for step, weight in enumerate(_steps(tuning, rows, seed)) if step == best_step)


def _right(on: States, rows: Tensor, weight: Tensor) -> float:
    return float(((on.scores[rows] + on.states[rows] @ weight.T).argmax(1) == on.truth[rows]).sum())


def _steps(tuning: States, rows: Tensor, seed: int) -> Any:
    weight = torch.zeros(tuning.scores.shape[1], tuning.states.shape[1])
    mezo = MeZO(
        [("label_head", weight)], lr=LEARNING_RATE, epsilon=EPSILON, n_spsa=DIRECTIONS, update="normalized", seed=seed
    )
    scores, states = tuning.scores[rows], tuning.states[rows]
    rewards = torch.nn.functional.one_hot(tuning.truth[rows], scores.shape[1]).double()
    at_points = torch.empty(2 * DIRECTIONS, *weight.shape)
    yield weight
    for step in range(STEPS):
        mezo.param_groups[0]["lr"] = LEARNING_RATE / math.sqrt(1.0 + step / LOOK)
        probe = mezo.ask()
        for point, out in zip(probe.points, at_points, strict=True):
            kernel_for(weight).perturb(weight, key(point.seed, "label_head"), point.offset, mezo.distribution, out)
        added = torch.einsum("nw,plw->pnl", states, at_points)
        mezo.tell(probe.id, Scores(expected_reward((scores + added).log_softmax(2), rewards)))
        mezo.step()
        yield weight


def run(name: str, size: int, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy and macro-F1 on held-out rows, by each goal."""
    found, drawn = task(name), random.Random(seed)
    rows = drawn.sample(found.load("train", Path(options.data) / name), size + HELD_OUT)
    with tempfile.TemporaryDirectory() as folder:
        trainer = MeZOTrainer(
            options.model, reward_funcs=accuracy(), prompt=found.prompt(masked=True), train_dataset=rows[:size],
            args=MeZOConfig(output_dir=folder, seed=seed, use_cpu=True, disable_tqdm=True, report_to="none"),
        )  # fmt: skip
    labels = list(trainer.prompt.labels)
    goal = trainer.objective.label_goal(rows[:size])  # type: ignore[union-attr]
    scores, states = trainer.policy.words_and_states(rows[size:])  # type: ignore[union-attr]
    truth = [labels.index(str(row["label"])) for row in rows]
    mean, deviation = goal.states.mean(0), goal.states.std(0).clamp_min(1e-6)
    ones = torch.ones(len(rows), 1)
    standard = torch.cat([(torch.cat([goal.states, states]) - mean) / deviation, ones], dim=1)
    bias = torch.tensor(fit_bias(goal).bias)
    tuning = States(goal.scores + bias, standard[:size], torch.tensor(truth[:size]))
    head = fit_head(goal, seed)
    by_likelihood = scores + torch.tensor(head.bias)
    if head.weight is not None:
        by_likelihood = by_likelihood + states @ torch.tensor(head.weight).T
    logits = {
        "bias": scores + bias,
        "expected": scores + bias + standard[size:] @ expected_head(tuning, seed).T,
        "likelihood": by_likelihood,
    }
    return [
        {
            "task": name, "rows": size, "seed": seed, "goal": by,
            "accuracy": float(accuracy_score(truth[size:], of.argmax(1))),
            "macro_f1": float(f1_score(truth[size:], of.argmax(1), average="macro")),
        }
        for by, of in logits.items()
    ]  # fmt: skip


def report(cells: Sequence[dict[str, Any]]) -> str:
    lines = [
        "# What a label head is tuned on",
        "",
        f"Written by `benchmarks/label_heads.py` ({machine()}). A masked language model of 22.7M parameters, that of "
        "[efficiency.md](efficiency.md), not tuned, in the paper's prompts. A head on its last state is tuned on some training "
        "rows, with accuracy as the reward, and scored "
        f"on {HELD_OUT} others: mean ± standard deviation over {len(SEEDS)} draws. All rows are from the training files.",
        "",
        "| task, rows | goal | accuracy | macro-F1 |",
        "|---|---|---|---|",
    ]  # fmt: skip
    for name in ("sst2", "trec"):
        for size in SIZES:
            for goal, title in GOALS.items():
                of = [c for c in cells if (c["task"], c["rows"], c["goal"]) == (name, size, goal)]
                figures = [spread([c[figure] for c in of]) for figure in ("accuracy", "macro_f1")]
                lines.append(f"| {name.upper().replace('SST2', 'SST-2')}, {size} | {title} | {' | '.join(figures)} |")
    return "\n".join(
        [
            *lines,
            "",
            "The expected reward is flat for rows that are confidently wrong, and stops improving once a row is barely right. "
            "The likelihood does neither, and has no local maxima. So the head is tuned on the likelihood of the labels that the "
            "reward favours, with each row weighted by what a wrong choice costs it, and not on the reward.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of a masked language model")
    parser.add_argument("--data", required=True, help="folder with the data sets")
    options = parser.parse_args()
    cells = []
    for name in ("sst2", "trec"):
        for size in SIZES:
            for seed in SEEDS:
                cells += run(name, size, seed, options)
                print(
                    *(f"{c['task']} {size} {seed} {c['goal']} {c['accuracy']:.3f}" for c in cells[-3:]),
                    sep="\n",
                    flush=True,
                )
    RESULTS.write_text(json.dumps({"machine": machine(), "cells": cells}, indent=1) + "\n", encoding="utf-8")
    (ROOT / "docs" / "label_heads.md").write_text(report(cells), encoding="utf-8")


if __name__ == "__main__":
    main()
