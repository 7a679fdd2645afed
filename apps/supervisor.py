"""Keeps a child process running: restarts it when it ends unexpectedly, and ends it together with this process."""

from __future__ import annotations

import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before a restart: doubled each time
STEADY = 60.0  # seconds of running after which the pause is reset
PATIENCE = 20.0  # seconds to wait after SIGTERM before SIGKILL


@dataclass
class Supervisor:
    """Runs a command in a child process, from its own thread.

    When this process is gone, for whatever reason, the child reads the end of its standard input.

    Attributes:
        command: the program and its arguments.
        log: file to which its output is appended.
        report: called with a sentence whenever the child ends unexpectedly.
        first_pause: seconds before the first restart.
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
        """The process id of the child; None if it is not running."""
        child = self._child
        return child.pid if child is not None and child.poll() is None else None

    def start(self) -> None:
        """Starts the child, and restarts it until `stop` is called. Returns at once."""
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the child with SIGTERM, and with SIGKILL if it does not react. May be called repeatedly."""
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
            self.report(f"It ended unexpectedly ({_why(code)}): {_last_line(self.log)} Restarting in {pause:.0f} s.")
            self._stop.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _once(self) -> int:
        """Runs the child until it ends or `stop` is called; returns how it ended."""
        with self.log.open("ab") as log:
            # In its own session: Ctrl-C in the terminal reaches only this process, which then ends the child properly.
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
