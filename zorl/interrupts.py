"""Ctrl-C, or a scheduler's SIGTERM, never leaves θ half written: it waits for the few milliseconds in which θ moves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Interruptible = Callable[[Callable[[], Any]], Any]


@contextmanager
def uninterrupted() -> Iterator[Interruptible]:
    """Holds SIGINT back until the block is done, then delivers it. In Python only the main thread receives signals.

    The block gets a function that calls its argument with SIGINT let through, for code that may take long. What must be undone
    in that case belongs in a `finally` of the block.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield lambda function: function()  # None: the handler is not Python's and cannot be restored
        return
    pending: list[FrameType | None] = []

    def hold(number: int, frame: FrameType | None) -> None:
        pending.append(frame)

    def interruptible(function: Callable[[], Any]) -> Any:
        signal.signal(signal.SIGINT, handler)
        try:
            if pending:
                _deliver(handler, pending)
            return function()
        finally:
            signal.signal(signal.SIGINT, hold)

    handler = signal.signal(signal.SIGINT, hold)
    try:
        yield interruptible
    finally:
        signal.signal(signal.SIGINT, handler)
        if pending:
            _deliver(handler, pending)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Turns SIGTERM into Ctrl-C within the block. Schedulers end runs with it, and torchrun the processes that one has left."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in what a shell starts in the background
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is None:
        yield
        return
    handler = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _deliver(handler: Any, pending: list[FrameType | None]) -> None:
    frame = pending.pop()
    pending.clear()
    if callable(handler):
        handler(signal.SIGINT, frame)
    elif handler == signal.SIG_DFL:
        signal.raise_signal(signal.SIGINT)
