"""The seconds that a run took, over all the processes that it needed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from zorl.whole_files import read_json, write_json

NAME = "seconds.json"
_EVERY = 1.0  # seconds between writes, which wait for the disk


class Elapsed(TrainerCallback):
    """Keeps the seconds of a run in its folder, so that a run that continues counts those from before.

    Args:
        folder: the run's.
        start: when this process began with the run, by `time.perf_counter`.
    """

    def __init__(self, folder: Path, start: float) -> None:
        self._folder, self._start = folder, start
        self._before, self._written = _seconds(folder / NAME) if (folder / NAME).exists() else 0.0, start

    @property
    def seconds(self) -> float:
        """Those of the run so far."""
        return self._before + time.perf_counter() - self._start

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.perf_counter() - self._written >= _EVERY:
            self._write()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write()

    def _write(self) -> None:
        self._written = time.perf_counter()
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._folder / NAME, self.seconds)


def elapsed(folder: Path) -> float:
    """The seconds of the runs in a folder and the folders in it, as far as they got; 0 where there are none.

    Raises:
        ValueError: a file is damaged.
    """
    return sum(map(_seconds, folder.rglob(NAME)))


def _seconds(path: Path) -> float:
    return float(read_json(path, "remove it, and the seconds of the run so far do not count"))
