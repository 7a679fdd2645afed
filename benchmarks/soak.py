"""A run that is killed again and again ends in the bits of one that never was.

    python benchmarks/soak.py                                # 10,000 steps, 100 kills
    python benchmarks/soak.py --steps 1000 --kills 5

The embedded model is tuned twice, once undisturbed. The other run's process gets SIGKILL at random steps, and within them after
random fractions of a second, and another process continues it each time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from common import machine
from tqdm import tqdm

from zorl.config import DIRECTIONS

RESULT = Path(__file__).parent / "results" / "soak.json"
processes = multiprocessing.get_context(
    "forkserver"
)  # each a fork of one that has imported everything: kills are what is tested
processes.set_forkserver_preload(["zorl.trainer", "zorl.rewards", "zorl.tasks.reviews", "numba"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="of the run (default: 10,000)")
    parser.add_argument("--kills", type=int, default=100, help="at random points of it (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the run, and of where it is killed (default: 0)")
    parser.add_argument(
        "--output", type=Path, default=RESULT, help="of the figures (default: benchmarks/results/soak.json)"
    )
    options = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), options.steps, options.kills, options.seed)
    result |= {
        "seconds": round(time.perf_counter() - begun),
        "machine": machine(),
    }
    text = json.dumps(result, indent=1)
    options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


def soak(folder: Path, steps: int, kills: int, seed: int) -> dict[str, object]:
    """The end of an undisturbed run and of a killed one, compared."""
    generator = random.Random(seed)
    points = sorted(generator.sample(range(1, steps), kills))
    straight, broken = folder / "straight", folder / "broken"
    with tqdm(total=2 * steps, unit="step") as bar:
        bar.set_description("undisturbed")
        finish(start(straight, steps, seed), straight, bar)
        bar.set_description("killed")
        killed = 0
        for point in points:
            process = start(broken, steps, seed)
            if wait(process, broken, point, bar):
                time.sleep(generator.uniform(0, 0.02))  # a step or two: not only right behind a write
                process.kill()
            process.join()
            killed += process.exitcode == -signal.SIGKILL
            bar.set_postfix_str(f"{killed} kills")
        finish(start(broken, steps, seed), broken, bar)
    ends = [json.loads((run / "end.json").read_text(encoding="utf-8")) for run in (straight, broken)]
    logs = [(run / "trajectory.zorl").read_bytes() for run in (straight, broken)]
    return {
        "steps": steps,
        "kills": killed,
        "seed": seed,
        "weights_equal": ends[0] == ends[1],
        "trajectories_equal": logs[0] == logs[1],
        **ends[0],
    }


def start(folder: Path, steps: int, seed: int) -> BaseProcess:
    """The run in `folder`, begun or continued."""
    process = processes.Process(target=run, args=(folder, steps, seed))
    process.start()
    return process


def run(folder: Path, steps: int, seed: int) -> None:
    """Trains to the end, and writes down what the end is."""
    import torch

    from zorl import MeZOConfig, MeZOTrainer, Prompt
    from zorl.apps.embedded import REVIEWER
    from zorl.rewards import accuracy
    from zorl.tasks import reviews

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own lock between processes would outlive those that are killed
    train, test = reviews.load(64, 16)
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        trainer = MeZOTrainer(
            str(REVIEWER), accuracy(), prompt=Prompt(reviews.PROMPT, reviews.LABEL_WORDS), train_dataset=train, eval_dataset=test,
            args=MeZOConfig(
                output_dir=str(folder), max_steps=steps, seed=seed, per_device_train_batch_size=4, calibration="none",
                eval_strategy="steps", eval_steps=50, save_steps=50, logging_steps=50,
                disable_tqdm=True, use_cpu=True, report_to="none",
            ),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=trainer.folder.trajectory.exists())
    end = {"weights_sha256": trainer.tuned.sha256(), "last_step": trainer.step}
    (folder / "end.json").write_text(json.dumps(end), encoding="utf-8")


def wait(process: BaseProcess, folder: Path, step: int, bar: tqdm) -> bool:
    """Until the run has made so many steps. False: it ended before."""
    while (done := steps_in(folder)) < step:
        if not process.is_alive():
            return False
        advance(bar, done)
        time.sleep(0.002)
    advance(bar, done)
    return True


def finish(process: BaseProcess, folder: Path, bar: tqdm) -> None:
    """Waits for the end of the run.

    Raises:
        RuntimeError: it failed.
    """
    while process.is_alive():
        advance(bar, steps_in(folder))
        time.sleep(0.05)
    advance(bar, steps_in(folder))
    if process.exitcode:
        raise RuntimeError(f"the run in {folder} failed with {process.exitcode}")


def advance(bar: tqdm, done: int) -> None:
    """Moves the bar to so many steps of the run that it is at; the second counts from the end of the first."""
    before = 0 if bar.desc.startswith("undisturbed") else bar.total // 2
    if before + done > bar.n:
        bar.update(before + done - bar.n)


def steps_in(folder: Path) -> int:
    """The steps that a trajectory of the default's directions holds, from its size alone: it is being written."""
    path = folder / "trajectory.zorl"
    try:
        with path.open("rb") as file:
            head = int.from_bytes(file.read(8)[4:], "little") + 12
        body = path.stat().st_size - head
    except FileNotFoundError:
        return 0
    a_step = 4 * DIRECTIONS
    blocks, rest = divmod(max(body, 0), 16 * a_step + 4)
    return 16 * blocks + max(rest - 4, 0) // a_step


if __name__ == "__main__":
    main()
