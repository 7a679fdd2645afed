"""What the page asks of the process that tunes: written to the store, answered there, looked for by a timer."""

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
        """Writes a request down and gives its id; nobody waits."""
        return self.store.request(self.kind, payload)

    def answer(self, request: int) -> dict[str, Any] | None:
        """The answer, or None where there is none yet.

        Raises:
            ValueError: the answer is that it cannot be done; the message says why.
        """
        result = self.store.request_result(request)
        if result is not None and "error" in result:
            raise ValueError(str(result["error"]))
        return result

    def waiting(self, otherwise: str) -> str:
        """What to tell somebody who waits: `otherwise`, unless the process that would answer is down."""
        tuner = self.store.tuner()
        if tuner.get("state") in ("failed", "stopped"):
            return f"The model is not running at the moment: {tuner.get('message') or tuner['state']}"
        return otherwise
