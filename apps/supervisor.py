"""Keeps one program running beside another: starts it again when it ends, and ends it with us."""

from __future__ import annotations

import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before it is started again: doubled each time
STEADY = 60.0  # seconds of running after which the pause begins from the first again
PATIENCE = 20.0  # seconds that it has to end after SIGTERM


@dataclass
class Supervisor:
    """Runs a command in a child process, from a thread of its own.

    The child reads the end of its standard input when this process is gone, however that came about.

    Attributes:
        command: the program and its arguments.
        log: file that its output is added to.
        report: told of every end that was not asked for, in a sentence.
        first_pause: seconds before the first new start.
    """

    command: Sequence[str]
    log: Path
    report: Callable[[str], None]
    first_pause: float = FIRST_PAUSE
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)
    _child: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _thread: threading.Thread | None = field(default=None, repr=False)

    @property
    def pid(self) -> int | None:
        """Of the child, while it runs."""
        child = self._child
        return child.pid if child is not None and child.poll() is None else None

    def start(self) -> None:
        """Starts the child, and goes on doing so until `stop`. Returns at once."""
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the child, by SIGTERM, and by SIGKILL where that does not help. Harmless when called again."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        pause = self.first_pause
        while not self._stop.is_set():
            began = time.monotonic()
            code = self._once()
            if self._stop.is_set():
                return
            pause = self.first_pause if time.monotonic() - began > STEADY else pause
            self.report(
                f"It ended unexpectedly ({_why(code)}): {_last_line(self.log)} It is started again in {pause:.0f} s."
            )
            self._stop.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _once(self) -> int:
        """Runs the child until it ends or `stop` is called; returns how it ended."""
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal is ours, and we end it in good order.
            child = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        self._child = child
        try:
            while child.poll() is None and not self._stop.wait(0.1):
                pass
            if child.poll() is None:
                child.terminate()
                try:
                    child.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    child.kill()
            return child.wait()
        finally:
            if child.stdin is not None:
                child.stdin.close()


def _why(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit status {code}"


def _last_line(log: Path) -> str:
    """The last line that the child wrote, as a sentence."""
    with log.open(encoding="utf-8", errors="replace") as lines:
        last = next((line.strip() for line in reversed(deque(lines, maxlen=20)) if line.strip()), "it said nothing")
    return last if last.endswith((".", "!", "?")) else f"{last}."
