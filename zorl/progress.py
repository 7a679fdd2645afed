"""A readable progress bar: figures that change every step stand behind the bar, each evaluation gets its own line."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import ProgressCallback

_NOT_SHOWN = ("runtime", "samples_per_second", "forwards")


class Progress(ProgressCallback):
    """Trainer's progress bar, with figures instead of dictionaries."""

    def close(self) -> None:
        """Ends the bar's line where training did not run to its end."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        bar = self.training_bar
        if bar is None or logs is None:
            return
        evaluated = {
            name.removeprefix("eval_"): value
            for name, value in logs.items()
            if name.startswith("eval_") and name.removeprefix("eval_") not in _NOT_SHOWN
        }
        if evaluated:
            figures = ", ".join(f"{name} {value:.4f}" for name, value in evaluated.items())
            bar.write(f"step {state.global_step}/{state.max_steps}, held out: {figures}")
        elif "informative_share" in logs:
            names = [name for name in ("reward", "cross_entropy", "objective", "decided_share") if name in logs]
            shown = [f"{name} {logs[name]:.3f}" for name in names[:1]]
            shown += [f"informative {logs['informative_share']:.0%}", f"epsilon {logs['epsilon']:.2g}"]
            bar.set_postfix_str(", ".join(shown))
