"""Quality against forwards: zorl's default without any grid, beside the published MeZO with the best of a grid.

    python benchmarks/efficiency.py --masked MODEL --causal MODEL --data FOLDER            # all cells that are not done yet
    python benchmarks/efficiency.py … --only sst2 trec --jobs 2                            # a part, two at a time
    python benchmarks/efficiency.py --report                                               # docs/efficiency.md and its plots

`--masked` is a small masked language model, `--causal` a small causal one that tells stories. FOLDER holds sst2/ (train.tsv,
test.tsv), trec/ (TREC.train.all, TREC.test.all) and lmbff_kshot/RTE (k-shot splits). A cell is one run; each is written to
`benchmarks/results/efficiency/` when it is done, so an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "benchmarks" / "results" / "efficiency"
SEEDS = (0, 1, 2)
FORWARDS, BATCH, LOOKS = 600, 16, 6  # of a run: what it may spend, of how many rows each, and how often it is scored
TRAIN_ROWS, TEST_ROWS = 1024, 400  # at most
# Of the published recipe's learning rate: run with the first seed, and farther where the best one is on its edge.
GRID = (1e-4, 1e-5, 1e-3)
TWO_SIDED = {"estimator": "spsa", "n_spsa": "1"}
PUBLISHED: dict[str, Any] = {
    "distribution": "gaussian", "epsilon": "1e-3", "update": "sgd", "calibration": "none", "label_reward": "best",
    "lr_scheduler_type": "constant", **TWO_SIDED,
}  # fmt: skip


class Ablation(NamedTuple):
    """The default with one thing changed: what that is worth."""

    title: str
    settings: dict[str, Any]
    rates: float = 1.0  # the learning rate is so many times the default's


ABLATIONS = {
    "two_sided": Ablation("SPSA, one direction a step, in place of eight one-sided ones", TWO_SIDED),
    "bias": Ablation("one fitted bias a label, in place of the label head", {"calibration": "bias"}),
    "none": Ablation("from the label words as they are", {"calibration": "none"}),
    "dense": Ablation("dense ±1 directions, in place of rank one", {"distribution": "rademacher"}),
    "slower": Ablation("a quarter of the learning rate", {}, 1 / 4),
    "faster": Ablation("four times the learning rate", {}, 4.0),
}


@dataclass(frozen=True)
class Problem:
    """Attributes:
    title: what tables call it.
    objectives: that are tuned, by name.
    ablations: that run on it.
    max_length: in tokens, to which its inputs are cut; None for what the model takes.
    """

    title: str
    objectives: tuple[str, ...]
    ablations: tuple[str, ...] = ()
    max_length: int | None = None


LABELS = ("accuracy", "cross_entropy", "macro_f1")
RATES = ("slower", "faster")
PARTS = ("two_sided", "bias", "none", "dense", *RATES)
PROBLEMS = {
    "sst2": Problem("SST-2", LABELS),
    "trec": Problem("TREC", LABELS, PARTS),
    "rte": Problem("RTE", LABELS, max_length=64),
    "stories": Problem("Stories", ("brevity",), ("two_sided", *RATES)),
}
TITLES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "cross_entropy": "cross entropy",
    "brevity": "a short first sentence",
}


class Cell(NamedTuple):
    problem: str
    objective: str
    method: str  # "default", "published", "threshold" (fitted biases alone), or one of the ablations
    seed: int
    rate: float | None = None  # of the published recipe

    @property
    def path(self) -> Path:
        rate = "" if self.rate is None else f"-{self.rate:g}"
        return CELLS / f"{self.problem}-{self.objective}-{self.method}{rate}-{self.seed}.json"

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return found


# --- a run ------------------------------------------------------------------------------------------------------------


def brevity(completions: Sequence[str], **_: Any) -> list[float]:
    """How short the first sentence is: 1 without a word, 0 from twenty on."""
    return [1.0 - min(len(re.split(r"[.!?]", text, maxsplit=1)[0].split()), 20) / 20 for text in completions]


def rows_of(name: str, data: Path, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to tune on, drawn by the seed, and rows to report, which are the same for all."""
    from stories import HELD_OUT, TUNING  # beside this file

    from zorl.tasks import task

    if name == "stories":
        return [{"prompt": text} for text in TUNING], [{"prompt": text} for text in HELD_OUT * 10]
    found = task(name)
    if name == "rte":
        few = data / "lmbff_kshot" / "RTE"
        parts = [
            found.load("train", few / shots / f"{part}.tsv")
            for shots in ("16-13", "16-42")
            for part in ("train", "dev")
        ]
        train, test = [row for part in parts for row in part], found.load("test", few / "16-42" / "test.tsv")
        train = list({(row["premise"], row["hypothesis"]): row for row in train}.values())
    else:
        train, test = found.load("train", data / name), found.load("test", data / name)
    fixed = random.Random(0).sample(test, min(TEST_ROWS, len(test)))
    return random.Random(seed).sample(train, min(TRAIN_ROWS, len(train))), fixed


def run_cell(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Tunes, and scores the model before, after and at equal distances in between."""
    from zorl import MeZOConfig, MeZOTrainer, Prompt
    from zorl.rewards import accuracy, f1
    from zorl.tasks import task

    generates = cell.problem == "stories"
    train, test = rows_of(cell.problem, Path(options.data), cell.seed)
    metrics = [brevity] if generates else [accuracy(), f1(average="macro")]
    goal: dict[str, Any] = {
        "accuracy": {"reward_funcs": accuracy()},
        "macro_f1": {"reward_funcs": f1(average="macro")},
        "cross_entropy": {"loss": "cross_entropy"},
        "brevity": {"reward_funcs": brevity},
    }[cell.objective]
    ablation = ABLATIONS.get(cell.method, Ablation("", {}))
    recipe = dict(PUBLISHED if cell.method == "published" else ablation.settings)
    if cell.rate is not None:
        recipe["learning_rate"] = cell.rate
    from zorl.config import DIRECTIONS

    started = 0 if generates or recipe.get("calibration") == "none" else math.ceil(len(train) / BATCH)
    a_step = 2 if recipe.get("estimator") == "spsa" else DIRECTIONS
    every = (FORWARDS - started) // a_step // LOOKS
    steps = every * LOOKS
    with tempfile.TemporaryDirectory() as folder:
        trainer = MeZOTrainer(
            options.causal if generates else options.masked, **goal, metrics=metrics, train_dataset=train, eval_dataset=test,
            prompt=Prompt("{prompt}") if generates else task(cell.problem).prompt(masked=True),
            args=MeZOConfig(
                output_dir=folder, seed=cell.seed, per_device_train_batch_size=BATCH, save_strategy="no", use_cpu=True,
                max_steps=steps, eval_strategy="steps", eval_steps=every, disable_tqdm=True,
                report_to="none", logging_steps=steps, max_completion_length=32,
                max_length=PROBLEMS[cell.problem].max_length, **recipe,
            ),
        )  # fmt: skip
        trainer.args.learning_rate *= ablation.rates
        looks = [trainer.evaluate()]  # before anything is fitted
        began = time.perf_counter()
        trainer.calibrate("bias" if cell.method == "threshold" else None)
        calibrated = time.perf_counter() - began
        if trainer.calibration_forwards:
            looks.append(trainer.evaluate())
        if cell.method == "threshold":
            return {**cell._asdict(), "machine": machine(), "looks": [_figures(look) for look in looks]}
        began = time.perf_counter()
        try:
            trainer.train()
        except FloatingPointError as error:
            return {**cell._asdict(), "machine": machine(), "learning_rate": cell.rate, "diverged": str(error),
                    "looks": [_figures(look) for look in looks]}  # fmt: skip
        seconds = (
            calibrated
            + time.perf_counter()
            - began
            - sum(look["eval_runtime"] for look in trainer.state.log_history[1:] if "eval_runtime" in look)
        )
        looks += [look for look in trainer.state.log_history if "eval_reward" in look and look.get("step")]
        mezo = trainer.mezo
        assert mezo is not None
        return {
            **cell._asdict(), "machine": machine(), "learning_rate": trainer.args.learning_rate, "seconds": round(seconds, 1),
            "informative_share": mezo.informative_share, "test_rows": len(test), "train_rows": len(train),
            "looks": [_figures(look) for look in looks],
        }  # fmt: skip


def _figures(look: dict[str, float]) -> dict[str, float]:
    names = ("forwards", "accuracy", "macro_f1", "brevity", "reward")
    return {name: round(look[f"eval_{name}"], 5) for name in names if f"eval_{name}" in look}


def machine() -> str:
    import torch

    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, one thread a run"


# --- all runs ---------------------------------------------------------------------------------------------------------


def stages(only: Iterable[str]) -> Iterator[list[Cell]]:
    """What to run, in order; a stage is complete before the next one, which may ask what it found, begins."""
    first, *later = SEEDS
    for i in range(len(LABELS)):
        for name in only:
            for objective in PROBLEMS[name].objectives[i : i + 1]:
                pair = name, objective
                ours = [Cell(*pair, "default", seed) for seed in SEEDS]
                yield ours + [Cell(*pair, "published", first, rate) for rate in GRID]
                if objective in LABELS:
                    yield [Cell(*pair, "threshold", seed) for seed in SEEDS]
                while (beyond := farther(*pair)) is not None:
                    yield [Cell(*pair, "published", first, beyond)]
                yield [Cell(*pair, "published", seed, best_rate(*pair)) for seed in later]
    for name in only:
        for method in PROBLEMS[name].ablations:
            yield [Cell(name, PROBLEMS[name].objectives[0], method, seed) for seed in SEEDS]


def tried(problem: str, objective: str) -> list[float]:
    """The published recipe's learning rates that were run with the first seed, in order."""
    paths = CELLS.glob(f"{problem}-{objective}-published-*-{SEEDS[0]}.json")
    return sorted(json.loads(path.read_text(encoding="utf-8"))["rate"] for path in paths)


def best_rate(problem: str, objective: str) -> float:
    """The published recipe's, by the last look at the very rows that are reported: it flatters the recipe."""
    cells = {rate: Cell(problem, objective, "published", SEEDS[0], rate).read() for rate in tried(problem, objective)}
    return max((rate for rate, cell in cells.items() if "diverged" not in cell), key=lambda rate: final(cells[rate]))


def farther(problem: str, objective: str) -> float | None:
    """The next rate to try where the best one so far is the smallest or the largest; None where it lies inside."""
    rates, best = tried(problem, objective), best_rate(problem, objective)
    if best == rates[0] and best > 1e-8:
        return float(f"{best / 10:.0e}")
    return float(f"{best * 10:.0e}") if best == rates[-1] and best < 1.0 else None


def figure_of(objective: str) -> str:
    """What is reported of an objective."""
    return "accuracy" if objective == "cross_entropy" else objective


def final(cell: dict[str, Any]) -> float:
    return float(cell["looks"][-1][figure_of(cell["objective"])])


def run_all(options: argparse.Namespace) -> None:
    """Runs what is missing, `--jobs` at a time, each in a process of its own."""
    CELLS.mkdir(parents=True, exist_ok=True)
    for stage in stages(options.only):
        running: list[subprocess.Popen[bytes]] = []
        for cell in stage:
            if cell.path.exists():
                continue
            while len(running := [process for process in running if process.poll() is None]) >= options.jobs:
                time.sleep(0.2)
            print(f"{time.strftime('%H:%M:%S')}  {cell.path.stem}", flush=True)
            command = [sys.executable, __file__, "--masked", options.masked, "--causal", options.causal, "--data", options.data,
                       "--cell", json.dumps(cell)]  # fmt: skip
            running.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}))
        for process in running:
            process.wait()
        if missing := [cell.path.stem for cell in stage if not cell.path.exists()]:
            raise SystemExit(f"these runs failed, see above: {', '.join(missing)}")


# --- the report -------------------------------------------------------------------------------------------------------


def found(problem: str, objective: str, method: str) -> list[dict[str, Any]]:
    """The cells of all seeds that are done; of the published recipe those with its best learning rate, which must not diverge."""
    if method == "published" and len(tried(problem, objective)) < len(GRID):
        return []
    rate = best_rate(problem, objective) if method == "published" else None
    paths = [Cell(problem, objective, method, seed, rate).path for seed in SEEDS]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def spread(values: Sequence[float]) -> str:
    if not values:
        return "—"
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


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
                f"| {spread(list(map(final, ours)))} "
                f"| {'never' if share is None else f'{needed:.0f} ({share:.0%})'} "
                f"| {seconds(theirs):.0f} | {seconds(ours):.0f} "
                f"| {statistics.fmean(run['informative_share'] for run in ours):.0%} "
                f"| {min(len(ours), len(theirs))} |"
            )
    cut = [f"those of {problem.title} to {problem.max_length}" for problem in PROBLEMS.values() if problem.max_length]
    lines = [
        "# What a forward buys",
        "",
        f"Written by `benchmarks/efficiency.py --report` from the cells in `benchmarks/results/efficiency/` "
        f"({'; '.join(sorted({run['machine'] for run in every}))}).",
        "",
        f"A run has {FORWARDS} forwards of {BATCH} rows, those of its start included, and at most {TRAIN_ROWS} rows to "
        f"learn from; figures are of at most {TEST_ROWS} test rows, the same for all runs. Masked language model of 22.7M "
        "parameters, in the paper's prompts; stories are told by a causal one of 260,032. Long inputs are cut to what the "
        f"model takes, {', '.join(cut)} tokens. *Published* is the paper's recipe, with the best of the learning rates "
        f"{', '.join(f'{rate:g}' for rate in sorted(GRID))}, and of more where the best was the smallest or the largest: all "
        "were run in full with the first seed, and the best was taken by the test rows themselves, which flatters it. *Zorl* "
        "is the default, the same for all, with no learning rate or ε given. Mean ± standard deviation over the seeds; three "
        "seeds tell large differences from noise, and no small ones.",
        "",
        "| task, objective | figure | before | fitted threshold | published (its rate, of how many) | zorl "
        "| forwards to reach it | seconds, published | seconds, zorl | informative | seeds |",
        f"|{'---|' * 11}",
        *rows,
        "",
        "*Forwards to reach it*: after how many zorl is, in the mean, as good as the published recipe is at its end, and what "
        f"share of its {FORWARDS} that is; 0 where that is no better than before tuning. The search is not counted against the "
        f"published recipe; with it, every rate that was tried is another {FORWARDS} forwards, or fewer where the weights went "
        "out of range. *Seconds* are a run's own, the median over the seeds, two runs at a time "
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
        "The same figure after tuning on it, and after tuning on cross entropy. The paper's own gap is 5 to 26 points on three "
        "of four tasks.",
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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    objectives = [o for o in PROBLEMS[name].objectives if found(name, o, "default") and found(name, o, "published")]
    if not objectives:
        return False
    figure, axes = plt.subplots(
        2, len(objectives), figsize=(4.2 * len(objectives), 6.4), layout="constrained", squeeze=False, sharey="col"
    )
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
    plt.close(figure)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masked", help="folder or hub name of a masked language model")
    parser.add_argument("--causal", help="folder or hub name of a causal language model")
    parser.add_argument("--data", help="folder with the data sets")
    parser.add_argument("--only", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="tasks to run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--report", action="store_true", help="only write docs/efficiency.md and its plots")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.report and not (options.masked and options.causal and options.data):
        parser.error("--masked, --causal and --data are needed to run; --report alone writes the report")
    if options.cell:
        cell = Cell(*json.loads(options.cell))
        result = run_cell(cell, options)
        cell.path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return
    if not options.report:
        run_all(options)
    (ROOT / "docs" / "efficiency.md").write_text(report(), encoding="utf-8")


if __name__ == "__main__":
    main()
