"""Requests of the page to the tuner: written to the store and answered there; a timer checks for the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zorl.rewards.judgment_store import JudgmentStore


@dataclass(frozen=True)
class Requests:
    """Requests of one kind."""

    store: JudgmentStore
    kind: str

    def ask(self, **payload: Any) -> int:
        """Writes a request and returns its id, without waiting."""
        return self.store.request(self.kind, payload)

    def answer(self, request: int) -> dict[str, Any] | None:
        """The answer, or None if there is none yet.

        Raises:
            ValueError: the tuner could not carry out the request; the message says why.
        """
        result = self.store.request_result(request)
        if result is not None and "error" in result:
            raise ValueError(str(result["error"]))
        return result

    def waiting(self, otherwise: str) -> str:
        """What to tell somebody who waits: `otherwise`, unless the tuner is down."""
        tuner = self.store.tuner()
        if tuner.get("state") in ("failed", "stopped", "silent"):
            return f"The model is not running at the moment: {tuner.get('message') or tuner['state']}"
        return otherwise
