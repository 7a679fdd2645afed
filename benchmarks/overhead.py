"""What Trainer's loop costs a step, over the bare loop of ask, evaluate, tell and step.

    python benchmarks/overhead.py            # offline, the embedded model; about a minute

Both loops evaluate the same objective on the same number of rows; rounds alternate, and medians are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import machine

from zorl import MeZO, MeZOConfig, MeZOTrainer, Prompt
from zorl.apps.embedded import REVIEWER
from zorl.rewards import accuracy
from zorl.tasks import reviews

STEPS, BATCH, ROUNDS = 100, 16, 7


def trainer_in(folder: str) -> MeZOTrainer:
    train, _ = reviews.load(STEPS * BATCH, 0)
    return MeZOTrainer(
        str(REVIEWER),
        accuracy(),
        prompt=Prompt(reviews.PROMPT, reviews.LABEL_WORDS),
        train_dataset=train,
        args=MeZOConfig(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=BATCH, calibration="none", disable_tqdm=True,
            logging_strategy="no", save_strategy="no", use_cpu=True, epsilon="1e-3",
        ),
    )  # fmt: skip


def with_trainer() -> float:
    """Milliseconds per step; starting and ending a run are not counted."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_in(folder)
        times: list[float] = []
        step = trainer.training_step
        trainer.training_step = lambda *a, **k: (times.append(time.perf_counter()), step(*a, **k))[1]  # type: ignore[method-assign]
        trainer.train()
    return 1e3 * (times[-1] - times[10]) / (len(times) - 11)


def bare() -> float:
    """Milliseconds per step."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_in(folder)
        rows = list(trainer.train_dataset)  # type: ignore[arg-type]
        mezo = MeZO(
            trainer.tuned.items(), lr=5e-4, epsilon=1e-3, update="normalized", distribution=trainer.args.distribution,
            estimator=trainer.args.estimator, n_spsa=trainer.args.n_spsa, trajectory=Path(folder) / "t.zorl",
        )  # fmt: skip
        times = []
        for i in range(STEPS):
            times.append(time.perf_counter())
            probe = mezo.ask()
            mezo.tell(probe.id, trainer.objective.ask(rows[i * BATCH : (i + 1) * BATCH], probe.points, i).answers)
            mezo.step()
        mezo.close()
    return 1e3 * (times[-1] - times[10]) / (len(times) - 11)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of torch; one keeps the figures steady (default: 1)")
    torch.set_num_threads(parser.parse_args().threads)
    pairs = [(bare(), with_trainer()) for _ in range(ROUNDS + 1)][1:]  # the first round warms caches up
    extra = [b - a for a, b in pairs]
    result = {
        "bare_ms": round(statistics.median(a for a, _ in pairs), 3),
        "trainer_ms": round(statistics.median(b for _, b in pairs), 3),
        "overhead_ms": round(statistics.median(extra), 3),
        "overhead_ms_range": [round(min(extra), 3), round(max(extra), 3)],
        "machine": machine(),
    }
    print(json.dumps(result, indent=1))
    target = Path(__file__).resolve().parent / "results" / "overhead.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
