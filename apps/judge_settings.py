"""What a judging run is made of: written once by `zorl judge`, read by the process that tunes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class JudgeSettings:
    """Settings of one run, kept in its folder.

    Attributes:
        model: name or path of a causal language model.
        prompts: what the model answers while people judge.
        held_out: prompts for comparisons with the starting model; empty: taken from `prompts`.
        prompts_per_step: pairs that one step asks people for.
        comparisons_per_step: pairs of the current against the starting model that are written after a step.
        max_completion_length: tokens of an answer.
        temperature: of sampling.
        learning_rate: as in `MeZOConfig`.
        epsilon: a number, or "auto".
        parameters: shell patterns of the parameters to tune; empty: all.
        seed: of directions and sampling.
        max_drift: nats a token between the current and the starting model at which tuning pauses; 0: never.
    """

    model: str
    prompts: list[str]
    held_out: list[str] = field(default_factory=list)
    prompts_per_step: int = 4
    comparisons_per_step: int = 4
    max_completion_length: int = 40
    temperature: float = 1.0
    learning_rate: float = 2e-3
    epsilon: str = "2e-2"
    parameters: list[str] = field(default_factory=list)
    seed: int = 0
    max_drift: float = 0.5

    @property
    def epsilon_value(self) -> Any:
        return "auto" if self.epsilon == "auto" else float(self.epsilon)

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
        whole = path.with_name(f"{path.name}.new")
        whole.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        whole.replace(path)

    @classmethod
    def read(cls, run: Path) -> JudgeSettings:
        """The settings that `write` left in the folder.

        Raises:
            ValueError: there are none, or they are not such settings.
        """
        path = _path(run)
        if not path.is_file():
            raise ValueError(
                f"{run} holds no judging run: {path.name} is missing; start one with zorl judge --run {run}"
            )
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(**found)
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path} does not hold the settings of a judging run: {error}") from error


def _path(run: Path) -> Path:
    return run / "judge.json"
