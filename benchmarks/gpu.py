"""On a GPU: the kernel's bandwidth, what a step costs, and whether a CPU replays the run to the same bits.

python benchmarks/gpu.py              # about a minute on a large GPU
python benchmarks/gpu.py --write      # docs/gpu.md and benchmarks/results/gpu.json
python benchmarks/gpu.py --report     # docs/gpu.md alone, from the results; needs no GPU
python benchmarks/gpu.py --small      # small sizes: tries that it works, on a CPU too
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import machine
from speed import CASES, Cases, make_model, measure, wait
from torch import Tensor

from zorl import MeZOConfig, MeZOTrainer, Prompt
from zorl.apps.embedded import REVIEWER
from zorl.directions import DISTRIBUTIONS, key
from zorl.kernels import kernel_for, reference
from zorl.rewards import accuracy
from zorl.tasks import reviews

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = {
    "hidden_size": 2048,
    "word_embed_proj_dim": 2048,
    "ffn_dim": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
}
SMALL = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
RUNS: tuple[dict[str, Any], ...] = (
    {}, {"distribution": "rademacher"}, {"distribution": "gaussian"}, {"distribution": "rank4"}, {"update": "adam"},
    {"dtype": "bfloat16"},
)  # fmt: skip


def milliseconds(work: Callable[[], Any], rounds: int = 9) -> float:
    """The median, after two calls that warm up."""
    found = []
    for _ in range(rounds + 2):
        wait()
        start = time.perf_counter()
        work()
        wait()
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found[2:])


def kernels(rows: int) -> list[dict[str, Any]]:
    """θ ← θ + Σ cᵢzᵢ on a matrix of rows × 16384, next to a copy of it, which reads and writes as many bytes."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        theta = torch.randn(rows, 16384, device=DEVICE).to(dtype)
        other = torch.empty_like(theta)
        moved = 2 * theta.numel() * theta.element_size()
        copy = milliseconds(lambda: other.copy_(theta))  # noqa: B023
        row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "elements": theta.numel(),
                               "copy_gb_s": round(moved / copy / 1e6)}  # fmt: skip
        for distribution in DISTRIBUTIONS:
            for directions in (1, 8):
                taken = milliseconds(lambda: _add(kernel_for(theta), theta, directions, distribution))  # noqa: B023
                found.append({**row, "distribution": distribution, "directions": directions, "ms": round(taken, 3),
                              "gb_s": round(moved / taken / 1e6), "copies": round(taken / copy, 2)})  # fmt: skip
            small = theta[: max(1, rows // 16)].clone()
            slow = milliseconds(lambda: _add(reference, small, 1, distribution), 3)  # noqa: B023
            fast = milliseconds(lambda: _add(kernel_for(small), small, 1, distribution), 3)  # noqa: B023
            found[-2]["reference_times"] = round(slow / fast, 1)
    return found


def _add(kernel: Any, theta: Tensor, directions: int, distribution: Any) -> None:
    kernel.add(
        theta, [key(i, "w") for i in range(directions)], [1e-6 * (-1) ** i for i in range(directions)], distribution
    )


def steps(*, small: bool) -> list[dict[str, Any]]:
    """As benchmarks/speed.py, with the shape of OPT-1.3B in bfloat16."""
    model = make_model(**(SMALL if small else SHAPE)).to(DEVICE, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for size, length in ((2, 16),) if small else ((1, 64), (16, 64), (16, 256)):
        tokens = torch.randint(5, 50_000, (size, length), generator=generator).to(DEVICE)
        warm = Cases(model, tokens, generate=False)
        for work in (warm.two_forwards, warm.scratch_step, warm.twin_n1, warm.twin_n4):
            work()  # compiles
        del warm
        rows += measure(model, f"{size}x{length}", tokens, 3 if small else 7, generate=False, quick=False)
    return rows


def replays() -> list[dict[str, Any]]:
    """A run on this device, its trajectory replayed by `zorl replay` where there is no GPU."""
    found = []
    train, _ = reviews.load(320, 0)
    for settings in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            arguments = MeZOConfig(
                output_dir=f"{folder}/run", max_steps=20, per_device_train_batch_size=16, disable_tqdm=True,
                logging_strategy="no", save_strategy="no", report_to="none", **settings,
            )  # fmt: skip
            trainer = MeZOTrainer(
                str(REVIEWER),
                accuracy(),
                prompt=Prompt(reviews.PROMPT, reviews.LABEL_WORDS),
                train_dataset=train,
                args=arguments,
            )
            device = next(trainer.model.parameters()).device.type  # type: ignore[union-attr]
            before = trainer.tuned.sha256()
            trainer.train()
            after = trainer.tuned.sha256()
            trainer.save_model()
            done = subprocess.run(
                [sys.executable, "-m", "zorl.apps.cli", "replay", "--trajectory", f"{folder}/run", "--output_dir",
                 f"{folder}/again", "--json"], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
            )  # fmt: skip
        told = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": done.stderr[-300:]}
        same = after != before and told.get("weights_sha256") == after
        found.append({"settings": settings, "device": device, "sha256": after, "same": same} | (
            {"error": told["error"]} if "error" in told else {}))  # fmt: skip
    return found


def report(kept: dict[str, Any]) -> str:
    """docs/gpu.md."""
    lines = [
        "# On a GPU", "",
        f"Written by `benchmarks/gpu.py --write` ({kept['machine']}).", "",
        "## The kernel", "",
        "θ ← θ + Σ cᵢzᵢ in place, on a matrix of "
        f"{kept['kernels'][0]['elements'] / 1e6:,.0f}M weights; medians. A copy reads and writes as many bytes: a kernel that "
        "takes one copy's time makes its directions for nothing. The last column is the plain torch kernel's time, on a "
        "sixteenth of the matrix and one direction, in units of the Triton kernel's.", "",
        "| dtype | direction | directions | ms | GB/s | a copy, GB/s | in copies | plain torch |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in kept["kernels"]:
        lines.append(
            f"| {row['dtype']} | {row['distribution']} | {row['directions']} | {row['ms']:.2f} | {row['gb_s']:,} | "
            f"{row['copy_gb_s']:,} | {row['copies']:.2f} | {row.get('reference_times', '')} |"
        )
    lines += [
        "", "## A step", "",
        "The shape of OPT-1.3B with random weights, bfloat16; cases and columns are those of [speed.md](speed.md). Memory is "
        "what torch has allocated on the GPU at the highest.", "",
        "| batch | case | ratio to two forwards | range | memory, MB | inference with as many rows, MB |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in kept["steps"]:
        if row["case"] == "forwards":
            lines.append(
                f"| {row['batch']} | two forwards | 1 ({1e3 * row['seconds']:.1f} ms) |  | {row['peak_memory_mb']} |  |"
            )
        else:
            low, high = row["spread"]
            lines.append(f"| {row['batch']} | {CASES[row['case']]} | {row['ratio']:.2f} | {low:.2f} to {high:.2f} | "
                         f"{row['peak_memory_mb']} | {row.get('inference_mb') or ''} |")  # fmt: skip
    same = [row for row in kept["replays"] if row["same"]]
    lines += [
        "", "## The same bits on a CPU", "",
        f"Runs of 20 steps on the {kept['replays'][0]['device']}, and their trajectories replayed by `zorl replay` on the "
        f"same machine's CPU. {len(same)} of {len(kept['replays'])} give weights with the same SHA-256.", "",
        "| settings | SHA-256 of the weights | same |", "|---|---|---|",
        *(f"| {', '.join(f'{k}={v}' for k, v in row['settings'].items()) or 'defaults'} | `{row['sha256'][:16]}…` | "
          f"{'yes' if row['same'] else 'no'} |" for row in kept["replays"]), "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/gpu.md and the results")
    parser.add_argument("--report", action="store_true", help="only write docs/gpu.md again, from the results")
    parser.add_argument("--small", action="store_true", help="small sizes: tries that it works")
    options = parser.parse_args()
    if options.report:
        kept = json.loads(RESULTS.read_text(encoding="utf-8"))
    else:
        if DEVICE.type != "cuda" and not options.small:
            parser.error("there is no GPU here; --small tries the benchmark on a CPU")
        kept = {"machine": machine(), "replays": replays(), "kernels": kernels(4 if options.small else 16384),
                "steps": steps(small=options.small)}  # fmt: skip
        print(report(kept))
    if options.write:
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    if options.write or options.report:
        (ROOT / "docs" / "gpu.md").write_text(report(kept), encoding="utf-8")


if __name__ == "__main__":
    main()
