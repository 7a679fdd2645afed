"""Whether the learning rate and ε of `zorl diagnose` are any good: against a grid, on real text, at 200 forwards each.

    python benchmarks/diagnose.py --model MODEL --data TRAIN.tsv      # some 5,000 forwards of 16 rows per model; resumes
    python benchmarks/diagnose.py --report                            # docs/diagnose.md from what has been measured

The file holds a sentence, a tab and its label (0 or 1) a line, as SST-2's does. Training rows and held-out rows are drawn
from it. Each model's figures are written to `benchmarks/results/diagnose/` after every run.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "diagnose"
OBJECTIVES = ("cross_entropy", "accuracy")
RATES, EPSILONS = (1e-4, 3e-4, 1e-3, 3e-3), ("1e-3", "1e-2")
TRAIN_ROWS, HELD_OUT_ROWS, BATCH = 1024, 400, 16
FORWARDS, BUDGET = 200, 300  # of a run, and of a diagnosis
# What the report calls the models that were measured; another goes by the name of its folder.
TITLES = {"minilm-mlm": "masked, 22.7M", "stories260K": "causal, 0.26M"}


def read(path: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and held-out rows."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [dict(zip(("text", "label"), line.rsplit("\t", 1), strict=True)) for line in lines]
    rows = random.Random(0).sample(rows, TRAIN_ROWS + HELD_OUT_ROWS)
    return rows[:TRAIN_ROWS], rows[TRAIN_ROWS:]


def make_trainer(model: str, objective: str, data: Path, template: str, folder: str, **settings: Any) -> Any:
    from zorl import MeZOConfig, MeZOTrainer, Prompt
    from zorl.rewards import accuracy

    goal: dict[str, Any] = (
        {"loss": "cross_entropy"} if objective == "cross_entropy" else {"reward_funcs": accuracy(column="label")}
    )
    return MeZOTrainer(
        model, **goal, prompt=Prompt(template, {"0": "terrible", "1": "great"}), train_dataset=read(data)[0],
        metrics=[accuracy(column="label")],
        args=MeZOConfig(
            output_dir=folder, seed=0, per_device_train_batch_size=BATCH, max_steps=FORWARDS // 2, calibration="none",
            estimator="spsa", n_spsa="1",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, **settings,
        ),
    )  # fmt: skip


def diagnosed(model: str, objective: str, data: Path, template: str) -> dict[str, Any]:
    from zorl.diagnosis import diagnose

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, objective, data, template, folder)
        found = diagnose(trainer, BUDGET)
        before = trainer.objective.evaluate(read(data)[1])
    rank, bound, trace = found.curvature.effective_rank, found.curvature.effective_rank_bound, found.curvature.trace
    return {
        "learning_rate": float(f"{found.lr_normalized:.1e}"),
        "epsilon": "auto" if found.epsilon is None else f"{found.epsilon:.1e}",
        "parameters": found.parameters,
        "effective_rank": None if math.isnan(rank.value) else [rank.value, rank.low, rank.high],
        "effective_rank_at_most": None if math.isnan(bound.value) else [bound.value, bound.low, bound.high],
        "trace": [trace.value, trace.low, trace.high],
        "tries": [[t.learning_rate, t.fall] for t in found.tries],
        "forwards": found.forwards,
        "seconds": round(time.perf_counter() - start, 1),
        "start": before,
    }


def trained(
    model: str, objective: str, data: Path, template: str, learning_rate: float | None, epsilon: str
) -> dict[str, float]:
    """Held-out figures after a run; without a learning rate of the default's."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, objective, data, template, folder, learning_rate=learning_rate, epsilon=epsilon)
        trainer.train()
        figures: dict[str, float] = trainer.objective.evaluate(read(data)[1])
    return figures


def measure(model: str, data: Path, template: str) -> None:
    """Everything that is not there yet."""
    path = RESULTS / f"{Path(model).name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    result["machine"] = machine()
    for objective in OBJECTIVES:
        cells = result.setdefault(objective, {})
        if "diagnosis" not in cells:
            cells["diagnosis"] = diagnosed(model, objective, data, template)
            path.write_text(json.dumps(result, indent=1) + "\n")
        suggestion = (cells["diagnosis"]["learning_rate"], cells["diagnosis"]["epsilon"])
        todo: dict[str, tuple[float | None, str]] = {"suggested": suggestion, "default": (None, "auto")}
        todo |= {f"{rate:g} {epsilon}": (rate, epsilon) for epsilon in EPSILONS for rate in RATES}
        for name, (rate, epsilon) in todo.items():
            if name not in cells:
                cells[name] = trained(model, objective, data, template, rate, epsilon)
                path.write_text(json.dumps(result, indent=1) + "\n")
                print(path.stem, objective, name, rate, epsilon, cells[name], flush=True)


def report() -> str:
    """docs/diagnose.md."""
    found = {TITLES.get(path.stem, path.stem): json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    machines = sorted({result["machine"] for result in found.values()})
    lines = [
        "# The learning rate and ε of `zorl diagnose`, against a grid",
        "",
        f"Written by `benchmarks/diagnose.py --report` ({'; '.join(machines)}). The models are a masked one of 22.7M parameters "
        "(6 layers, width 384) and a causal one of 0.26M that tells stories, those of [efficiency.md](efficiency.md). "
        f"SST-2, {TRAIN_ROWS} training sentences, batches of {BATCH}, SPSA along one direction of rank one per step, "
        "update=normalized with a linear schedule, no label head. "
        f"Every run has {FORWARDS} forwards, and is scored on {HELD_OUT_ROWS} sentences that were held out. The diagnosis has "
        f"{BUDGET} forwards at most. "
        "The default's learning rate is 3e-4 for 22.7M parameters and 2.8e-3 for 0.26M, its ε adapts itself. One seed, so small "
        "differences are noise: the standard error of an accuracy here is 0.025.",
        "",
        "| model | objective | suggested lr, ε | start | suggested | the default | best of the grid | at | median "
        "| worst | suggestion beats |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    runs = len(RATES) * len(EPSILONS)
    partly = []
    for model, result in found.items():
        for objective in OBJECTIVES:
            cells = result.get(objective, {})
            if len(cells) <= 3:
                partly.append(f"'{model}' on {objective.replace('_', ' ')} was not run.")
                continue
            figure = "loss" if objective == "cross_entropy" else "accuracy"
            sign = -1.0 if figure == "loss" else 1.0
            grid = {name: cells[name][figure] for name in cells if name not in ("diagnosis", "suggested", "default")}
            best = max(grid, key=lambda name: sign * grid[name])
            mine = cells["suggested"][figure]
            beaten = sum(sign * mine >= sign * value for value in grid.values())
            worst = min(grid.values(), key=lambda value: sign * value)
            row = (
                model, f"{objective.replace('_', ' ')} ({figure})",
                f"{cells['diagnosis']['learning_rate']:.1e}, {cells['diagnosis']['epsilon']}",
                f"{cells['diagnosis']['start'][figure]:.3f}", f"**{mine:.3f}**", f"{cells['default'][figure]:.3f}",
                f"{grid[best]:.3f}", best.replace(" ", ", "), f"{statistics.median(grid.values()):.3f}", f"{worst:.3f}",
                f"{beaten} of {len(grid)}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(row)} |")
            if len(grid) < runs:
                partly.append(
                    f"Of '{model}' on {objective.replace('_', ' ')} only {len(grid)} of these {runs} runs were done: its best, "
                    "median and worst are of those, and the last column counts those alone."
                )
    lines += [
        "",
        f"The grid has the learning rates {', '.join(f'{rate:g}' for rate in RATES)} and ε {' and '.join(EPSILONS)}: "
        f"{runs} runs, {runs * FORWARDS} forwards, against {BUDGET}. {''.join(f'{sentence} ' for sentence in partly)}"
        "Where the best and the worst of a grid are within noise of each other, "
        "no setting learned anything. The rule by which a diagnosis chooses was settled with these runs in view, but for "
        "those of the masked model on accuracy, which were made afterwards. Those are a test of the rule; "
        "the others show only that it can do what it should.",
        "",
        "What the diagnoses found where tuning starts, with 95% intervals:",
        "",
        "| model | objective | parameters | effective rank | at most | trace of the Hessian | fall of the loss a step "
        "| seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, result in found.items():
        for objective in OBJECTIVES:
            of = result.get(objective, {}).get("diagnosis")
            if of is None:
                continue
            triples = [
                "not known" if triple is None else f"{triple[0]:.3g} [{triple[1]:.2g}, {triple[2]:.2g}]"
                for triple in (of["effective_rank"], of["effective_rank_at_most"], of["trace"])
            ]
            falls = ", ".join(f"{fall:.1e} at {rate:.1e}" for rate, fall in of["tries"])
            shown = (
                model,
                objective.replace("_", " "),
                f"{of['parameters']:,}",
                *triples,
                falls,
                f"{of['seconds']:.0f}",
            )
            lines.append(f"| {' | '.join(shown)} |")
    lines += [
        "",
        "Everything here comes from forward passes alone, and that sets limits:",
        "",
        "* **No power iteration.** It needs products Hv. Values of the loss give quadratic forms vᵀHv, and by polarisation vᵀHw: "
        "one coordinate of Hv for a few forward passes, where d are needed. The trace is therefore Hutchinson's, from second "
        "differences along random directions, and ‖H‖ is the largest eigenvalue of the small matrix ZᵀHZ of all pairs of these "
        "directions, less what the rest of the spectrum adds to it.",
        "* **The effective rank r may be too small.** If the spectrum is flat and r is not well below the number of directions "
        "m, the norm comes out too large by a factor of at most 1 + 2√(r/m). The lower end of the norm's interval and the upper "
        "end of the rank's allow for that; r is never shown above its bound, the column 'at most'.",
        "* **Lemma 2's ratio is computed, not measured.** It is a formula of d and n. A measured one would compare the length of "
        "the estimate with ‖∇L‖², and the only ‖∇L‖² that forward passes know is the mean square of the slopes of which the "
        "estimate consists. `zorl diagnose` prints the ratio and the learning rate of Corollary 1 for `spsa` and `one_sided` "
        "only: the other estimators have other second moments, or a bias.",
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a masked or causal language model: a folder, or a name on the hub")
    parser.add_argument("--data", type=Path, help="sentences and labels")
    parser.add_argument("--template", default="{text} it was {mask} .")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--report", action="store_true", help="only write docs/diagnose.md")
    arguments = parser.parse_args()
    if not arguments.report:
        if arguments.model is None or arguments.data is None:
            parser.error("--model and --data are needed")
        import torch

        torch.set_num_threads(arguments.threads)
        measure(arguments.model, arguments.data, arguments.template)
    (ROOT / "docs" / "diagnose.md").write_text(report())


if __name__ == "__main__":
    main()
