"""Quality against forwards: zorl's default without any grid, beside the published MeZO with the best of a grid.

    python benchmarks/efficiency.py --masked MODEL --causal MODEL --data FOLDER            # all cells that are not done yet
    python benchmarks/efficiency.py … --only sst2 trec --jobs 2                            # a part, two at a time
    python benchmarks/efficiency_report.py                                                 # docs/efficiency.md and its plots

`--masked` is a small masked language model, `--causal` a small causal one that tells stories. FOLDER holds sst2/ (train.tsv,
test.tsv), trec/ (TREC.train.all, TREC.test.all) and lmbff_kshot/RTE (k-shot splits). A cell is one run; each is written to
`benchmarks/results/efficiency/` when it is done, so an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common import machine

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
    "bias": Ablation("one fitted bias per label, in place of the label head", {"calibration": "bias"}),
    "none": Ablation("from the label words as they are", {"calibration": "none"}),
    "dense": Ablation("dense ±1 directions, in place of rank one", {"distribution": "rademacher"}),
    "prefix": Ablation("a prefix of five tokens, in place of the whole model", {"tune": "prefix"}),
    "lora": Ablation("low-rank adapters, in place of the whole model", {"tune": "lora"}),
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
PARTS = ("two_sided", "bias", "none", "dense", "prefix", "lora", *RATES)
PROBLEMS = {
    "sst2": Problem("SST-2", LABELS),
    "trec": Problem("TREC", LABELS, PARTS),
    "rte": Problem("RTE", LABELS, max_length=64),
    "stories": Problem("Stories", ("brevity",), ("two_sided", "prefix", "lora", *RATES)),
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

    where = f"{machine()}, one thread per run"
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
            return {**cell._asdict(), "machine": where, "looks": [_figures(look) for look in looks]}
        began = time.perf_counter()
        try:
            trainer.train()
        except FloatingPointError as error:
            return {**cell._asdict(), "machine": where, "learning_rate": cell.rate, "diverged": str(error),
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
            **cell._asdict(), "machine": where, "learning_rate": trainer.args.learning_rate, "seconds": round(seconds, 1),
            "informative_share": mezo.informative_share, "test_rows": len(test), "train_rows": len(train),
            "looks": [_figures(look) for look in looks],
        }  # fmt: skip


def _figures(look: dict[str, float]) -> dict[str, float]:
    names = ("forwards", "accuracy", "macro_f1", "brevity", "reward")
    return {name: round(look[f"eval_{name}"], 5) for name in names if f"eval_{name}" in look}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masked", required=True, help="folder or hub name of a masked language model")
    parser.add_argument("--causal", required=True, help="folder or hub name of a causal language model")
    parser.add_argument("--data", required=True, help="folder with the data sets")
    parser.add_argument("--only", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="tasks to run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        cell = Cell(*json.loads(options.cell))
        result = run_cell(cell, options)
        cell.path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return
    run_all(options)


if __name__ == "__main__":
    main()
