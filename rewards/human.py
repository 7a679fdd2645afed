"""People as a judge: pairs go into a judgment store, and verdicts come out of it once they are given."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zorl.probe import Choice
from zorl.rewards.judgment_records import NewPair, Vote
from zorl.rewards.majority import majority

if TYPE_CHECKING:
    from zorl.rewards.judgment_store import JudgmentStore

_KEY = "judge:"  # prefix of the keys of the probes that are asked here


class HumanJudge:
    """Asks people, by way of a judgment store, and waits for them. A `zorl.judge_objective.Judge`.

    A question has the same key whenever it is asked, so a run that was stopped and is continued gets the verdicts that were given
    in the meantime. One run at a time may use a store: open questions of another are withdrawn.

    Args:
        store: the store that a page shows, in this process or another; or the path or URL of one, which is created if it is
            missing (see `JudgmentStore`).
        poll_seconds: seconds between two looks into the store, at most 1.

    Raises:
        ValueError: `poll_seconds` is out of range, or the store cannot be opened.
    """

    __name__ = "human"

    def __init__(self, store: JudgmentStore | str | Path, poll_seconds: float = 0.5) -> None:
        if not 0 < poll_seconds <= 1:
            raise ValueError(f"poll_seconds must lie in (0, 1], so that a run can be stopped, got {poll_seconds!r}")
        if isinstance(store, str | Path):
            from zorl.rewards.judgment_store import JudgmentStore

            store = JudgmentStore(store)
        self.store = store
        self.poll_seconds = poll_seconds
        self._asked = False

    def __call__(
        self, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any], *, request_id: str, **columns: Any
    ) -> list[Choice]:
        """The raters' majority on each pair, once there are enough votes.

        Raises:
            ValueError: the question was withdrawn while it was open.
        """
        pairs = [
            NewPair(0, row, *map(_text, texts)) for row, texts in enumerate(zip(prompts, first, second, strict=True))
        ]
        content = json.dumps([[pair.prompt, pair.plus, pair.minus] for pair in pairs])
        key = f"{_KEY}{request_id}:{hashlib.sha256(content.encode()).hexdigest()[:32]}"
        probe = self.store.add_probe(pairs, key=key).id
        if not self._asked:
            self._withdraw_all_but(probe)
            self._asked = True
        votes: dict[int, list[Choice]] = defaultdict(list)
        for vote in self._wait(probe):
            votes[vote.row].append(vote.choice)
        self.store.set_tuner("generating", "writing the next pairs")
        return [majority(votes[row]) for row in range(len(pairs))]

    def rest(self) -> None:
        """Tells the page that no run asks any more. A store that does not answer cannot be told."""
        if self._asked:
            with suppress(ConnectionError):
                self.store.set_tuner("stopped", "The run that asks has ended. Verdicts are kept for when it goes on.")

    def _wait(self, probe: int) -> list[Vote]:
        """The votes on a probe, once there are enough."""
        while self.store.probe(probe).state not in ("withdrawn", "expired"):
            votes = self.store.close_decided(probe)
            if votes is not None:
                return votes
            # Again and again: a page that starts later says that no trainer is connected.
            self.store.set_tuner("waiting", "for verdicts")
            time.sleep(self.poll_seconds)
        self._asked = False  # the page is the other run's now
        raise ValueError("the pairs that this run asks about were withdrawn: another run asks in the same store")

    def _withdraw_all_but(self, probe: int) -> None:
        """Withdraws what an earlier run left open: nobody waits for it, and people's time is the budget."""
        for other in self.store.open_probes():
            if other.id != probe and other.state == "open" and other.key.startswith(_KEY):
                self.store.withdraw(other.id)


def _text(value: Any) -> str:
    """A prompt or an answer for people to read; a conversation as its JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
