"""The demo for five seeds: macro-F1 before and after, beside one fitted threshold.

python benchmarks/demo.py            # about a minute per seed on two cores; writes docs/demo.md and results/demo.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import machine

ROOT = Path(__file__).resolve().parent.parent
SEEDS = range(5)


def main() -> None:
    runs = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "zorl.apps.optimize_f1", "--seed", str(seed), "--output_dir", folder]
            one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # a small model gains nothing by a second one
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one_thread)
            runs.append(json.loads((Path(folder) / "result.json").read_text()))
            print(
                f"seed {seed}: macro-F1 {runs[-1]['tuned']['macro_f1']:.3f} in {runs[-1]['seconds']:.0f} s", flush=True
            )
    where = f"{machine()}, one thread"
    target = ROOT / "benchmarks" / "results" / "demo.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"machine": where, "runs": runs}, indent=1) + "\n")
    lines = [
        "# The demo, five seeds",
        "",
        f"Written by `benchmarks/demo.py` ({where}). "
        f"Macro-F1 on {runs[0]['test_rows']} held-out reviews; macro-F1 itself is "
        "the objective. Seconds are those of tuning alone, on one thread.",
        "",
        "All settings are the defaults except one: tuning starts from a fitted threshold instead of a label head. The default "
        "learning rate was chosen on other models and tasks; whether it suits this one was then checked here, with two "
        "seeds. The embedded model was chosen among several pretrained ones for the gap that it leaves between what it knows and "
        "what it answers. So this shows that F1 can be optimised directly, and how, on a task that was picked to show it.",
        "",
        "| seed | zero-shot | one fitted threshold | tuned | forwards | seconds | peak memory, MB | informative probes |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {run['seed']} | {run['zero_shot']['macro_f1']:.3f} | {run['threshold']['macro_f1']:.3f} "
            f"| {run['tuned']['macro_f1']:.3f} | {run['forwards']} | {run['seconds']:.1f} | {run['peak_memory_mb']} "
            f"| {run['informative_share']:.0%} |"
            for run in runs
        ),
        "",
    ]
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "demo.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
