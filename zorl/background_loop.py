"""An asyncio event loop in a thread of its own, for synchronous code that calls coroutines."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """Runs coroutines to their end from synchronous code, even in a thread that has a running loop (a notebook).

    All calls share one loop, which the first one starts and which stops with the object: clients that bind to the loop
    they first ran in (HTTP sessions, locks) keep working from one call to the next.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result. It is cancelled if waiting for it is interrupted (Ctrl-C)."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            thread = threading.Thread(target=_serve, args=(self._loop,), name="zorl-rewards", daemon=True)
            thread.start()
            weakref.finalize(self, _stop, self._loop, thread)
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {"_loop": None}  # a copy, or another process, starts its own


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    if thread is not threading.current_thread():  # the collector may run in the loop's own thread
        thread.join(timeout=5)
