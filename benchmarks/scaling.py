"""Weak scaling: as many rows per process, more processes. What a step takes, and the bytes that it exchanges.

    python benchmarks/scaling.py --model MODEL        # docs/processes.md and benchmarks/results/scaling.json; some minutes

MODEL is a small masked language model: a folder, or a name on the hub. Each process has one thread. The rounds of 1, 2 and 4
processes take turns. The file also works out what to expect of many GPUs, from the assumptions that it prints.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine

from zorl.config import DIRECTIONS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
PROCESSES = (1, 2, 4)
ROWS, STEPS, SKIPPED = 16, 14, 4  # rows per process; steps per round, of which the first are not counted


def work(model: str, where: Path) -> None:
    """One process of a round."""
    from transformers import TrainerCallback

    from zorl import MeZOConfig, MeZOTrainer, Prompt, processes
    from zorl.rewards import accuracy

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ticks: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ticks.append(time.perf_counter())

    clock = Clock()
    rows = [
        {"text": f"the {word} film , seen {i} times , was as long as its title", "label": str(i % 2)}
        for i in range(128)
        for word in ("great", "odd")
    ]
    args = MeZOConfig(
        output_dir=str(where.parent / "run"), max_steps=STEPS, per_device_train_batch_size=ROWS, use_cpu=True,
        disable_tqdm=True, report_to="none", calibration="none", save_strategy="no", logging_steps=STEPS,
    )  # fmt: skip
    trainer = MeZOTrainer(
        model, accuracy(), args=args, train_dataset=rows, callbacks=[clock],
        prompt=Prompt("{text} it was {mask} .", {"0": "terrible", "1": "great"}),
    )  # fmt: skip
    trainer.train()
    seconds = [
        later - earlier for earlier, later in zip(clock.ticks[SKIPPED:], clock.ticks[SKIPPED + 1 :], strict=False)
    ]
    if processes.index() == 0:
        figures = {
            "seconds_a_step": statistics.median(seconds),
            "bytes_a_step": next(
                (log["exchanged_bytes"] for log in trainer.state.log_history if "exchanged_bytes" in log), 0
            ),
            "parameters": sum(p.numel() for p in trainer.tuned.values()),
        }
        where.write_text(json.dumps(figures))
    processes.leave()


def measure(model: str, rounds: int) -> dict[str, Any]:
    found: dict[int, list[dict[str, Any]]] = {count: [] for count in PROCESSES}
    for _ in range(rounds):
        for count in PROCESSES:
            with tempfile.TemporaryDirectory() as folder:
                where = Path(folder) / "figures.json"
                start = (
                    ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
                )
                subprocess.run(
                    [sys.executable, *start, __file__, "--model", model, "--work", str(where)],
                    check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )  # fmt: skip
                found[count].append(json.loads(where.read_text()))
                print(count, found[count][-1], flush=True)
    rows = []
    for count, figures in found.items():
        seconds = sorted(figure["seconds_a_step"] for figure in figures)
        rows.append({"processes": count, "rows": ROWS * count, "seconds_a_step": statistics.median(seconds),
                     "range": [seconds[0], seconds[-1]], "bytes_a_step": figures[0]["bytes_a_step"]})  # fmt: skip
    return {"machine": machine(), "cores": os.cpu_count(), "rounds": rounds,
            "parameters": found[1][0]["parameters"], "rows": rows}  # fmt: skip


# --- on paper ---------------------------------------------------------------------------------------------------------

GPU = {"parameters": 7e9, "bytes per weight": 2, "rows per GPU": 16, "tokens per row": 256, "points": DIRECTIONS, "labels": 2,
       "useful FLOP/s": 4e14, "memory, bytes/s": 3e12, "latency of a message, s": 1e-5, "network, bytes/s": 2.5e10,
       "a reward, s": 2e-6}  # fmt: skip


def on_paper(gpus: int) -> dict[str, float]:
    """Seconds of the parts of a step, weak scaling; an all-gather is a ring of gpus − 1 messages."""
    a = GPU
    tokens = a["rows per GPU"] * a["tokens per row"] * a["points"]
    sent = 4 * a["points"] * a["rows per GPU"] * a["labels"] + 256
    rewards_sent = 20 * gpus * a["rows per GPU"]
    ring = (gpus - 1) * a["latency of a message, s"]
    return {
        "forwards": 2 * a["parameters"] * tokens / a["useful FLOP/s"],
        "update": 2 * a["parameters"] * a["bytes per weight"] / a["memory, bytes/s"],
        "exchange": 6 * ring + (gpus * sent + 2 * rewards_sent) / a["network, bytes/s"] if gpus > 1 else 0.0,
        "rewards": gpus * a["rows per GPU"] * a["labels"] * a["a reward, s"],
    }


def report(result: dict[str, Any]) -> str:
    base = result["rows"][0]["seconds_a_step"]
    lines = [
        "# Several processes",
        "",
        "    accelerate launch --multi_gpu --num_processes 8 --no_python zorl train …    # a GPU each, NCCL",
        "    torchrun --nproc_per_node 8 --no_python zorl train …                        # the same",
        "    torchrun --nproc_per_node 2 --no_python zorl train --use_cpu …              # on CPUs, gloo",
        "",
        "(Without `--multi_gpu`, `accelerate launch` starts one process, whatever `--num_processes` says; with it, it starts "
        "several, on CPUs too.)",
        "",
        "Every process holds the model and sees the whole batch, which has `per_device_train_batch_size` rows for each. It runs "
        "its share of the rows at all points of the probe. Then the processes exchange their results: for label words "
        "and options the scores of each row, for generation its tokens, for a loss its values. A user's own loss, which may "
        "be one number for all rows, is shared by points. Rewards and judges are asked in the first process alone, once, on the "
        "whole batch, so that a metric of a set is that of the set. The first process's numbers are what all of them tell the "
        "optimizer; each makes the update itself, from the seed. What a step sends does not grow with the model. Before the "
        "first step, where a label head is tuned, each process sends the last hidden states of its rows: rows times the width.",
        "",
        "All need the same `output_dir`; the first process writes the trajectory. The weights are compared by SHA-256 at the end "
        "and every `--check_weights_steps` steps. When a process dies the others end with a message, and the same command "
        "continues from the trajectory, with any number of processes as long as a step has the same number of rows (half the "
        "processes: twice `--per_device_train_batch_size`). Where people judge, a step may wait for them as long as it takes: "
        "the first process tells the others every minute that it is still at work. Forward gradients run in one process only. "
        "A script of your own calls `zorl.processes.leave()` when it is done.",
        "",
        "## Measured",
        "",
        f"Written by `benchmarks/scaling.py` ({result['machine']}; {result['parameters']:,} parameters, {ROWS} rows per process, "
        f"{DIRECTIONS} one-sided directions per step, as is the default, one thread per process, {result['rounds']} rounds in "
        "turns). With more processes than cores, several share a core and a step takes correspondingly longer; "
        "efficiency is relative to that.",
        "",
        "| processes | rows per step | seconds per step | range | efficiency | bytes per step from the first process to each |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        share = max(1.0, row["processes"] / result["cores"])
        low, high = row["range"]
        lines.append(
            f"| {row['processes']} | {row['rows']} | {row['seconds_a_step']:.3f} | {low:.3f} to {high:.3f} | "
            f"{base * share / row['seconds_a_step']:.0%} | {row['bytes_a_step']:,.0f} |"
        )
    assumed = ", ".join(f"{name} {value:g}" for name, value in GPU.items())
    lines += [
        "",
        "## On paper: 8 to 1024 GPUs",
        "",
        f"Not measured. Assumed: {assumed}. A step with a reward of single answers needs six collective operations, each "
        "modelled as a ring with one message per other GPU. (A reward of a whole set, such as F1, is asked for several drawn "
        "sets at every point, and each answer is sent to all.)",
        "",
        "| GPUs | rows per step | forwards, s | update, s | exchange, s | rewards, s | efficiency |",
        "|---|---|---|---|---|---|---|",
    ]
    alone = sum(on_paper(1).values())
    for gpus in (1, 8, 64, 256, 1024):
        parts = on_paper(gpus)
        figures = " | ".join(f"{parts[name]:.4f}" for name in ("forwards", "update", "exchange", "rewards"))
        lines.append(f"| {gpus} | {gpus * int(GPU['rows per GPU'])} | {figures} | {alone / sum(parts.values()):.0%} |")
    lines += [
        "",
        "The update is made by every process, so it does not shrink; with 16 rows per GPU it is small beside the forwards. The "
        "bottleneck is the work that one process does for all, which is the rewards, and the latency of the exchanges. A reward "
        "that takes milliseconds, such as a model, would be felt first.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a small masked language model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="only write docs/processes.md")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.model, options.work)
        return
    if not options.report:
        if options.model is None:
            parser.error("--model is needed")
        RESULTS.write_text(json.dumps(measure(options.model, options.rounds), indent=1) + "\n")
    (ROOT / "docs" / "processes.md").write_text(report(json.loads(RESULTS.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()
