"""The settings of a judging run: written once by `zorl judge`, read by the process that tunes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from zorl.whole_files import write_json

METHODS = ("replay", "direct")
# Defaults that depend on the method. They are close to the values that did best in `docs/human_efficiency.md`.
DEFAULTS: dict[str, dict[str, Any]] = {
    "replay": {"learning_rate": 0.4, "epsilon": "0.1", "directions": 32, "prompts_per_step": 8},
    "direct": {"learning_rate": 0.12, "epsilon": "0.5", "directions": 1, "prompts_per_step": 4},
}


@dataclass(frozen=True)
class JudgeSettings:
    """Settings of one run, kept in its folder. A setting that is None takes the default of its method.

    Attributes:
        model: name or path of a causal language model.
        prompts: the prompts that the model answers while people judge.
        held_out: prompts for comparisons with the starting model; if empty, those of `prompts`.
        method: how verdicts become steps; see `zorl.apps.learning`.
        prompts_per_step: pairs that people judge per step.
        comparisons_per_step: comparisons of the current with the starting model that are written after each step.
        max_completion_length: maximum tokens per answer.
        temperature: sampling temperature.
        learning_rate: typical change of a parameter per update.
        epsilon: size of the perturbation: a number, or "auto".
        directions: directions per update.
        parameters: shell patterns on the names of the parameters to tune; if empty, one output bias per token is tuned
            (`zorl.output_bias`).
        brake: KL penalty per nat of divergence from the starting model ("replay" only).
        seed: random seed of directions and sampling.
        max_drift: divergence from the starting model, in nats per token, at which tuning pauses; 0 never pauses.
        database: URL of the PostgreSQL database with the judgments, without a password; if empty, they are in a file in the
            run's folder.

    Raises:
        ValueError: a setting is out of its range.
    """

    model: str
    prompts: list[str]
    held_out: list[str] = field(default_factory=list)
    method: str = "replay"
    prompts_per_step: int | None = None
    comparisons_per_step: int = 4
    max_completion_length: int = 64
    temperature: float = 0.8
    learning_rate: float | None = None
    epsilon: str | None = None
    directions: int | None = None
    parameters: list[str] = field(default_factory=list)
    brake: float = 0.05
    seed: int = 0
    max_drift: float = 0.5
    database: str = ""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be 'replay' or 'direct', got {self.method!r}")
        for name, default in DEFAULTS[self.method].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for name in ("prompts_per_step", "directions", "max_completion_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.comparisons_per_step < 0:
            raise ValueError(f"comparisons_per_step must be at least 0, got {self.comparisons_per_step}")
        for name in ("learning_rate", "temperature"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}")
        for name in ("brake", "max_drift"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or a positive number, got {getattr(self, name)}")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be in 0 … 2⁶³−1, got {self.seed}")
        if self.epsilon != "auto" and not _is_positive(str(self.epsilon)):
            raise ValueError(f"epsilon must be a positive number or 'auto', got {self.epsilon!r}")
        if not self.prompts:
            raise ValueError("there are no prompts for the model to answer")

    @property
    def epsilon_value(self) -> Any:
        return "auto" if self.epsilon == "auto" else float(str(self.epsilon))

    def store(self, run: Path) -> str | Path:
        """The path or URL of the judgment store of the run in this folder."""
        return self.database or run / "judgments.sqlite"

    @property
    def output_bias(self) -> bool:
        """Whether only a bias on the output embedding is tuned, one number per token."""
        return not self.parameters

    def write(self, run: Path) -> None:
        """Writes `judge.json` into the run's folder.

        Raises:
            ValueError: the folder holds a run with other settings; the message names the first that differs.
        """
        run.mkdir(parents=True, exist_ok=True)
        path = _path(run)
        if path.exists():
            kept = JudgeSettings.read(run)
            for f in fields(self):
                old, new = getattr(kept, f.name), getattr(self, f.name)
                if old != new:
                    shown = "" if isinstance(old, list) else f": {old!r} there, {new!r} now"
                    raise ValueError(f"{run} holds a run with other {f.name}{shown}; choose another --run folder")
            return
        write_json(path, asdict(self))

    @classmethod
    def read(cls, run: Path) -> JudgeSettings:
        """The settings that `write` left in the folder.

        Raises:
            ValueError: there are none, or the file holds something else.
        """
        path = _path(run)
        if not path.is_file():
            raise ValueError(
                f"{run} holds no judging run: {path.name} is missing; start one with zorl judge --run {run}"
            )
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(**found)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} does not hold the settings of a judging run: {error}") from error


def _is_positive(number: str) -> bool:
    try:
        return 0.0 < float(number) < math.inf
    except ValueError:
        return False


def _path(run: Path) -> Path:
    return run / "judge.json"
