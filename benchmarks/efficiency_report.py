"""docs/efficiency.md and its plots, from the cells of benchmarks/efficiency.py.

python benchmarks/efficiency_report.py
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import MASKED_MODEL, spread
from efficiency import (
    ABLATIONS,
    BATCH,
    CELLS,
    FORWARDS,
    GRID,
    PROBLEMS,
    ROOT,
    SEEDS,
    TEST_ROWS,
    TITLES,
    TRAIN_ROWS,
    Cell,
    best_rate,
    figure_of,
    final,
    tried,
)


def found(problem: str, objective: str, method: str) -> list[dict[str, Any]]:
    """The cells of all seeds that are done; of the published recipe those with its best learning rate, which must not diverge."""
    if method == "published" and len(tried(problem, objective)) < len(GRID):
        return []
    rate = best_rate(problem, objective) if method == "published" else None
    paths = [Cell(problem, objective, method, seed, rate).path for seed in SEEDS]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def curve(runs: Sequence[dict[str, Any]]) -> list[tuple[float, float, float]]:
    """Forwards, mean, and half of the mean's 95% confidence interval over the seeds (Student's t), look by look."""
    from scipy.stats import t

    figure, points, n = figure_of(runs[0]["objective"]), [], len(runs)
    for looks in zip(*(run["looks"] for run in runs), strict=True):
        values = [look[figure] for look in looks]
        half = t.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0
        points.append((looks[0]["forwards"], statistics.fmean(values), half))
    return points


def seconds(runs: Sequence[dict[str, Any]]) -> float:
    """Of a run's tuning, its start included and its looks left out: the median over the seeds."""
    return statistics.median(run["seconds"] for run in runs)


def reached(runs: Sequence[dict[str, Any]], quality: float) -> float | None:
    """Forwards at the first look whose mean is no worse."""
    return next((forwards for forwards, mean, _ in curve(runs) if mean >= quality), None)


def report() -> str:
    """docs/efficiency.md, from the cells that are there."""
    every = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(CELLS.glob("*.json"))]
    rows, shares = [], []
    for name, problem in PROBLEMS.items():
        for objective in problem.objectives:
            ours, theirs = found(name, objective, "default"), found(name, objective, "published")
            if not ours or not theirs:
                continue
            theirs_in_all = theirs[0]["looks"][-1]["forwards"]
            needed = reached(ours, statistics.fmean(map(final, theirs)))
            share = None if needed is None else needed / theirs_in_all
            shares.append(math.inf if share is None else share)
            threshold = list(map(final, found(name, objective, "threshold")))
            rows.append(
                f"| {problem.title}, {TITLES[objective]} | {TITLES[figure_of(objective)]} "
                f"| {spread([run['looks'][0][figure_of(objective)] for run in ours])} | {spread(threshold)} "
                f"| {spread(list(map(final, theirs)))} ({theirs[0]['learning_rate']:g} of {len(tried(name, objective))}) "
                f"| {label_head(ours, figure_of(objective))} | {spread(list(map(final, ours)))} "
                f"| {'never' if share is None else f'{needed:.0f} ({share:.0%})'} "
                f"| {seconds(theirs):.0f} | {seconds(ours):.0f} "
                f"| {statistics.fmean(run['informative_share'] for run in ours):.0%} "
                f"| {min(len(ours), len(theirs))} |"
            )
    cut = [f"those of {problem.title} to {problem.max_length}" for problem in PROBLEMS.values() if problem.max_length]
    lines = [
        "# What a forward pass buys",
        "",
        f"Written by `benchmarks/efficiency_report.py` from the cells in `benchmarks/results/efficiency/` "
        f"({'; '.join(sorted({run['machine'] for run in every}))}).",
        "",
        f"A run has {FORWARDS} forwards of {BATCH} rows, those of its start included, and at most {TRAIN_ROWS} rows to "
        f"learn from; figures are of at most {TEST_ROWS} test rows, the same for all runs. Masked language model of 22.7M "
        "parameters, in the paper's prompts; stories are told by a causal one of 260,032. "
        f"{MASKED_MODEL} Long inputs are cut to what the "
        f"model takes, {', '.join(cut)} tokens. *Published* is the paper's recipe, with the best of the learning rates "
        f"{', '.join(f'{rate:g}' for rate in sorted(GRID))}, and of more where the best was the smallest or the largest: all "
        "were run in full with the first seed, and the best was taken by the test rows themselves, which flatters it. *Zorl* "
        "is the default, the same for all, with no learning rate or ε given. Mean ± standard deviation over the seeds; three "
        "seeds can tell large differences from noise, but not small ones.",
        "",
        "| task, objective | figure | before | fitted threshold | published (its rate, of how many) | label head | zorl "
        "| forwards to reach it | seconds, published | seconds, zorl | informative | seeds |",
        f"|{'---|' * 12}",
        *rows,
        "",
        "*Forwards to reach it*: the number of forwards after which zorl, on average, matches the published recipe's final "
        f"score, and its share of {FORWARDS}; 0 where that score is no better than before tuning. The search is not counted "
        f"against the published recipe; with it, every rate that was tried costs another {FORWARDS} forwards, or fewer where "
        "the weights went out of range. *Label head* is zorl's first look, after the forwards of its calibration alone."
        " *Seconds* are a run's own, the median over the seeds, two runs at a time "
        "on two cores and now and then beside other work: what a forward takes is measured in [speed.md](speed.md).",
        "",
    ]  # fmt: skip
    if shares:
        lines += [f"The median share is {statistics.median(shares):.0%}.", ""]
    lines += gap_to_cross_entropy() + ablations()
    lines += ["What else was tried, and what became of it: [what_pays.md](what_pays.md).", ""]
    plots = [name for name in PROBLEMS if plot(name, ROOT / "docs" / f"efficiency_{name}.png")]
    for name in plots:
        lines += [f"![{PROBLEMS[name].title}: quality against forwards](efficiency_{name}.png)", ""]
    return "\n".join(lines).rstrip() + "\n"


def label_head(runs: list[dict[str, Any]], figure: str) -> str:
    """The figure after the calibration, and its forwards; a dash where a run has none."""
    looks = [run["looks"][1] for run in runs]
    if any(look["forwards"] > TRAIN_ROWS / BATCH for look in looks):
        return "—"
    return f"{spread([look[figure] for look in looks])} ({looks[0]['forwards']})"


def gap_to_cross_entropy() -> list[str]:
    rows = []
    for name, problem in PROBLEMS.items():
        for objective in ("accuracy", "macro_f1"):
            ours, other = found(name, objective, "default"), found(name, "cross_entropy", "default")
            if ours and other:
                figure = figure_of(objective)
                both = {run["seed"] for run in ours} & {run["seed"] for run in other}
                values = [[run["looks"][-1][figure] for run in runs if run["seed"] in both] for runs in (ours, other)]
                gap = statistics.fmean(values[0]) - statistics.fmean(values[1])
                rows.append(
                    f"| {problem.title}, {TITLES[objective]} | {spread(values[0])} | {spread(values[1])} | {gap:+.3f} |"
                )
    if not rows:
        return []
    return [
        "## The metric itself, or cross entropy",
        "",
        "The same figure after tuning on it, and after tuning on cross entropy. In the paper, accuracy or F1 as "
        "the objective is 4 to 26 points behind on three of five tasks, and less than one on the other two.",
        "",
        "| | tuned on it | tuned on cross entropy | difference |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


def ablations() -> list[str]:
    pairs = [(name, problem.objectives[0]) for name, problem in PROBLEMS.items() if problem.ablations]
    shown = [pair for pair in pairs if any(found(*pair, method) for method in ABLATIONS)]
    if not shown:
        return []
    lines = [
        "## What each part is worth",
        "",
        "With one part of the default replaced; accuracy as the objective, and of stories how short the first sentence is.",
        "",
        f"| | {' | '.join(PROBLEMS[name].title for name, _ in shown)} |",
        f"|---|{'---|' * len(shown)}",
    ]
    for method, title in [("default", "the default"), *((key, part.title) for key, part in ABLATIONS.items())]:
        lines.append(
            f"| {title} | {' | '.join(spread([final(run) for run in found(*pair, method)]) for pair in shown)} |"
        )
    return [*lines, ""]


def plot(name: str, target: Path) -> bool:
    """A column an objective: means and their 95% confidence bands against forwards, and below them against seconds."""
    from matplotlib.figure import Figure

    objectives = [o for o in PROBLEMS[name].objectives if found(name, o, "default") and found(name, o, "published")]
    if not objectives:
        return False
    figure = Figure(figsize=(4.2 * len(objectives), 6.4), layout="constrained")
    axes = figure.subplots(2, len(objectives), squeeze=False, sharey="col")
    for column, objective in enumerate(objectives):
        shown: list[float] = []
        for method, title, colour in (
            ("published", "published, best of its grid", "#b3541e"),
            ("default", "zorl", "#1f5aa6"),
        ):
            runs = found(name, objective, method)
            forwards, means, halves = zip(*curve(runs), strict=True)
            low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
            shown += means
            a_forward = seconds(runs) / forwards[-1]
            for axis, spent in ((axes[0][column], forwards), (axes[1][column], [n * a_forward for n in forwards])):
                axis.plot(spent, means, marker="o", markersize=3, label=title, color=colour)
                axis.fill_between(spent, low, high, color=colour, alpha=0.2, linewidth=0)
        for axis, spent in ((axes[0][column], f"forwards of {BATCH} rows"), (axes[1][column], "seconds")):
            if threshold := found(name, objective, "threshold"):
                height = statistics.fmean(map(final, threshold))
                axis.axhline(height, color="#666666", linestyle="--", label="one fitted threshold")
            axis.set_ylim(
                min(shown) - 0.05, max(shown) + 0.05
            )  # a band of two or three seeds may be wider than the figure
            axis.set_xlabel(spent)
            axis.set_ylabel(TITLES[figure_of(objective)] + ", test")
            axis.grid(alpha=0.3)
        axes[0][column].set_title(f"{PROBLEMS[name].title}, tuned on {TITLES[objective]}", fontsize=10)
    axes[0][0].legend(fontsize=8)
    figure.savefig(target, dpi=110)
    return True


if __name__ == "__main__":
    (ROOT / "docs" / "efficiency.md").write_text(report(), encoding="utf-8")
