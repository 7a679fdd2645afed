"""A run that is killed again and again ends in the bits of one that never was.

    python benchmarks/soak.py                                # 10,000 steps, 100 kills
    python benchmarks/soak.py --steps 1000 --kills 5

The embedded model is tuned twice by the same process, once undisturbed. The other one gets SIGKILL at random steps and, within
them, after random fractions of a second, and is started again each time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from zorl.apps.embedded import REVIEWER

RESULT = Path(__file__).parent / "results" / "soak.json"
PROGRAM = """
import sys
import torch
from zorl import MeZOConfig, MeZOTrainer, Prompt
from zorl.rewards import accuracy
from zorl.tasks import reviews
torch.set_num_threads(1)
model, folder, steps, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
train, test = reviews.load(64, 16)
trainer = MeZOTrainer(
    model, accuracy(), prompt=Prompt(reviews.PROMPT, reviews.LABEL_WORDS), train_dataset=train, eval_dataset=test,
    args=MeZOConfig(
        output_dir=folder, max_steps=steps, seed=seed, per_device_train_batch_size=4, calibration="none", disable_tqdm=True,
        eval_strategy="steps", eval_steps=100, save_steps=10, load_best_model_at_end=True, logging_steps=100, use_cpu=True,
        report_to="none",
    ),
)
trainer.train(resume_from_checkpoint=trainer.folder.trajectory.exists())
print("weights", trainer.tuned.sha256(), trainer.step)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="of the run (default: 10,000)")
    parser.add_argument("--kills", type=int, default=100, help="at random points of it (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the run, and of where it is killed (default: 0)")
    options = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), options.steps, options.kills, options.seed)
    result |= {"seconds": round(time.perf_counter() - begun), "machine": machine()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def soak(folder: Path, steps: int, kills: int, seed: int) -> dict[str, object]:
    """The end of an undisturbed run and of a killed one, compared."""
    generator = random.Random(seed)
    points = sorted(generator.sample(range(1, steps), kills))
    with tqdm(total=2 * steps, unit="step") as bar:
        bar.set_description("undisturbed")
        expected = finish(start(folder / "straight", steps, seed), folder / "straight", bar)
        bar.set_description("killed")
        killed = 0
        for point in points:
            process = start(folder / "broken", steps, seed)
            if wait(process, folder / "broken", point, bar):
                time.sleep(generator.uniform(0, 0.02))  # a step or two: not only right behind a write
                process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
            bar.set_postfix_str(f"{killed} kills")
        found = finish(start(folder / "broken", steps, seed), folder / "broken", bar)
    logs = [
        hashlib.sha256((folder / name / "trajectory.zorl").read_bytes()).hexdigest() for name in ("straight", "broken")
    ]
    return {
        "steps": steps,
        "kills": killed,
        "seed": seed,
        "weights_equal": found == expected,
        "trajectories_equal": logs[0] == logs[1],
        "weights_sha256": expected.split()[0],
        "best_step": int(expected.split()[1]),
    }


def start(folder: Path, steps: int, seed: int) -> subprocess.Popen[str]:
    """The run in `folder`, begun or continued."""
    command = [sys.executable, "-c", PROGRAM, str(REVIEWER), str(folder), str(steps), str(seed)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def wait(process: subprocess.Popen[str], folder: Path, step: int, bar: tqdm) -> bool:
    """Until the run has made so many steps. False: it ended before."""
    while (done := steps_in(folder)) < step:
        if process.poll() is not None:
            return False
        bar.update(max(0, done - bar_at(bar)))
        time.sleep(0.002)
    bar.update(max(0, done - bar_at(bar)))
    return True


def finish(process: subprocess.Popen[str], folder: Path, bar: tqdm) -> str:
    """Hash and number of the step that the run ends with.

    Raises:
        RuntimeError: it failed.
    """
    while process.poll() is None:
        bar.update(max(0, steps_in(folder) - bar_at(bar)))
        time.sleep(0.05)
    bar.update(max(0, steps_in(folder) - bar_at(bar)))
    assert process.stdout is not None
    lines = [line for line in process.stdout.read().splitlines() if line.startswith("weights ")]
    if process.returncode or not lines:
        raise RuntimeError(f"the run in {folder} failed with {process.returncode}")
    return lines[-1].removeprefix("weights ")


def bar_at(bar: tqdm) -> int:
    """The steps of the run that the bar is at: the second one counts from the end of the first."""
    return bar.n if bar.desc.startswith("undisturbed") else bar.n - bar.total // 2


def steps_in(folder: Path) -> int:
    """The steps that a trajectory of one direction a step holds, from its size alone: it is being written."""
    path = folder / "trajectory.zorl"
    try:
        with path.open("rb") as file:
            head = int.from_bytes(file.read(8)[4:], "little") + 12
        body = path.stat().st_size - head
    except FileNotFoundError:
        return 0
    blocks, rest = divmod(max(body, 0), 16 * 4 + 4)
    return 16 * blocks + max(rest - 4, 0) // 4


def machine() -> str:
    import torch

    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


if __name__ == "__main__":
    main()
