"""Compares a model zero-shot, with one fitted threshold, and tuned: as a table, a plot and a dictionary."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score
from transformers import TrainerCallback

from zorl import MeZOTrainer
from zorl.apps.inputs import say
from zorl.apps.memory import peak_memory_mb

ROWS = {"zero_shot": "zero-shot", "threshold": "one fitted threshold", "tuned": "tuned with zorl"}


class Begin(TrainerCallback):
    """Records the step at which training begins: 0 for a new run."""

    step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step
        if 0 < self.step < state.max_steps:
            say(f"continuing after step {self.step} of {state.max_steps}")


class Comparison:
    """Collects results of one trainer's model at several stages.

    Args:
        trainer: a trainer whose prompt has label words.
        test: held-out rows, with the trainer's label column.
    """

    def __init__(self, trainer: MeZOTrainer, test: Dataset) -> None:
        self.trainer = trainer
        self.test = test.to_list()
        self.truth = [str(row[trainer.args.label_column]) for row in self.test]
        self.figures: dict[str, dict[str, Any]] = {}
        self.seconds = 0.0
        self._begin = Begin()
        trainer.add_callback(self._begin)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the duration of the block to the tuning time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start

    def measure(self, name: str) -> None:
        """Scores the current model on the whole test set."""
        predicted: Sequence[Any] = self.trainer.predict(self.test).predictions  # type: ignore[assignment]
        labels = list(self.trainer.prompt.labels)
        per_class = f1_score(self.truth, predicted, labels=labels, average=None, zero_division=0)
        self.figures[name] = {
            "macro_f1": float(f1_score(self.truth, predicted, labels=labels, average="macro", zero_division=0)),
            "accuracy": float(accuracy_score(self.truth, predicted)),
            "f1": dict(zip(labels, map(float, per_class), strict=True)),
            "forwards": self.trainer.forwards,
            "seconds": round(self.seconds, 2),
            "peak_memory_mb": round(peak_memory_mb()),
        }

    def result(self) -> dict[str, Any]:
        """All measurements, for `result.json`."""
        mezo = self.trainer.mezo
        assert mezo is not None
        return {
            **self.figures,
            "forwards": self.trainer.forwards,
            "seconds": round(self.seconds, 2),
            "peak_memory_mb": round(peak_memory_mb()),
            "informative_share": round(mezo.informative_share, 4),
            "seed": self.trainer.args.seed,
            "objective": self.trainer.objective_name,
            "steps": mezo.steps,
            "resumed_from_step": self._begin.step,  # `seconds` counts the steps since then
            "test_rows": len(self.test),
            "weights_sha256": self.trainer.tuned.sha256(),
        }

    def table(self) -> str:
        labels = list(self.trainer.prompt.labels)
        head = ["", "macro-F1", "accuracy", *(f"F1 {label}" for label in labels), "forwards", "seconds", "memory MB"]
        lines = [
            [
                ROWS[name],
                f"{figures['macro_f1']:.3f}",
                f"{figures['accuracy']:.3f}",
                *(f"{figures['f1'][label]:.3f}" for label in labels),
                str(figures["forwards"]),
                f"{figures['seconds']:.1f}",
                str(figures["peak_memory_mb"]),
            ]
            for name, figures in self.figures.items()
        ]
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        rows = ["  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
                for line in [head, *lines]]  # fmt: skip
        share = self.trainer.mezo.informative_share if self.trainer.mezo is not None else float("nan")
        caption = f"On {len(self.test)} held-out rows. {share:.0%} of the directions found a difference."
        if self._begin.step:
            caption += f"\nThe run was continued from step {self._begin.step}: seconds count the steps since then."
        return "\n".join(["", rows[0], "-" * len(rows[0]), *rows[1:], "", caption])

    def plot(self, path: Path) -> None:
        """Plots the held-out reward against forward passes, with the two baselines as lines."""
        from matplotlib.figure import Figure

        history = [entry for entry in self.trainer.state.log_history if "eval_reward" in entry]
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        start = self.figures["threshold"]["macro_f1"]
        forwards = [self.trainer.calibration_forwards, *(entry["eval_forwards"] for entry in history)]
        axes.plot(
            forwards,
            [start, *(entry["eval_reward"] for entry in history)],
            marker="o",
            color="#1f5aa6",
            label=ROWS["tuned"],
        )
        for name, style in (("threshold", "--"), ("zero_shot", ":")):
            axes.axhline(self.figures[name]["macro_f1"], linestyle=style, color="#666666", label=ROWS[name])
        axes.set(xlabel="forward passes of a batch", ylabel="macro-F1, held out", ylim=(None, 1.01))
        axes.set_title("Macro-F1 itself, maximised with forward passes only")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
        figure.savefig(path, dpi=150)
