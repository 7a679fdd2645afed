"""Who judges what: between the page, or a program, and the store."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from zorl.probe import Choice
from zorl.rewards.judgment_records import LONGEST_NAME, AlreadyClosed, Progress, Showing
from zorl.rewards.judgment_store import JudgmentStore


@dataclass(frozen=True, slots=True)
class Turn:
    """What a rater gets back: the pair to judge now, or None where there is none yet, and a sentence, mostly empty."""

    showing: Showing | None
    notice: str = ""


@dataclass(frozen=True)
class Desk:
    """Every method takes the rater's name and answers from the store alone: no model, nothing to wait for.

    Attributes:
        logins: raters sign in, and judge under the name that they signed in with.
    """

    store: JudgmentStore
    logins: bool = False
    _raters: dict[str, int] = field(default_factory=dict, repr=False)

    def name(self, given: str | None, login: str | None) -> str:
        """Whose verdict it is: the login where there is one, else the name that was given.

        Raises:
            ValueError: a name that is not the login's, or none at all.
        """
        said = (given or "").strip()
        if not self.logins:
            if not said:
                raise ValueError(f"A rater needs a name of 1 to {LONGEST_NAME} characters.")
            return said
        if not login:
            raise ValueError("Sign in first.")
        if said and said != login:
            raise ValueError(f"You are signed in as {login}, so you cannot judge as {said}.")
        return login

    def next_pair(self, name: str) -> Turn:
        """The pair that this rater has in front of them, or the next one.

        Raises:
            ValueError: the name is empty or too long.
        """
        return Turn(self.store.next_pair(self._rater(name)))

    def vote(self, name: str, showing: int, choice: Choice) -> Turn:
        """Keeps a verdict, durably, and answers with the next pair. A verdict that comes too late is explained.

        Raises:
            ValueError: see `next_pair`; or this showing is not this rater's.
        """
        rater = self._rater(name)
        notice = ""
        try:
            self.store.vote(showing, rater, choice)
        except AlreadyClosed as error:
            notice = str(error)
        return Turn(self.store.next_pair(rater), notice)

    def undo(self, name: str) -> Turn:
        """Takes the latest verdict back and answers with its pair; where that cannot be, with the reason and the pair at hand.

        Raises:
            ValueError: see `next_pair`.
        """
        try:
            return Turn(self.take_back(name), "Taken back. Judge it again.")
        except ValueError as error:  # AlreadyClosed is one
            return Turn(self.store.next_pair(self._rater(name)), str(error))

    def take_back(self, name: str) -> Showing:
        """Takes the latest verdict back and returns its pair.

        Raises:
            AlreadyClosed: a step has used the verdict.
            ValueError: see `next_pair`; or this rater has no verdict to take back.
        """
        return self.store.undo(self._rater(name))

    def progress(self, name: str | None = None) -> Progress:
        """How far the run is, as this rater sees it.

        Raises:
            ValueError: see `next_pair`.
        """
        return self.store.progress(self._rater(name) if name else None)

    def _rater(self, name: str) -> int:
        if name not in self._raters:
            self._raters[name] = self.store.rater(name)
        return self._raters[name]


def new_name() -> str:
    """For a rater who has not said who they are: no two browsers share one."""
    return f"rater {secrets.token_hex(2)}"
