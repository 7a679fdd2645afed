"""The raters' actions, between the page (or a program) and the store."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from zorl.probe import Choice
from zorl.rewards.judgment_records import LONGEST_NAME, AlreadyClosed, Progress, Showing
from zorl.rewards.judgment_store import JudgmentStore

AWAY = (
    "The judgments cannot be reached at the moment. What you press now may not be saved; this page goes on by itself."
)


@dataclass(frozen=True, slots=True)
class Turn:
    """What a rater gets back: the pair to judge now (None if there is none yet), and a notice, which is usually empty."""

    showing: Showing | None
    notice: str = ""


@dataclass(frozen=True)
class Desk:
    """Every method takes the rater's name and answers from the store only: no model is involved, nobody waits.

    Attributes:
        logins: whether raters sign in, and judge under the name that they signed in with.
    """

    store: JudgmentStore
    logins: bool = False
    _raters: dict[str, int] = field(default_factory=dict, repr=False)

    def name(self, given: str | None, login: str | None) -> str:
        """The rater's name: the login if raters sign in, else the given name.

        Raises:
            ValueError: there is no name, or it is not that of the login.
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
        """The pair that this rater has in front of them, or else the next one.

        Raises:
            ValueError: the name is empty or too long.
        """
        return Turn(self.store.next_pair(self._rater(name)))

    def keep(self, name: str, showing: int) -> Turn | None:
        """Keeps the pair that a rater is looking at for them: None. If it takes no verdict any more, the next pair, and why.

        Raises:
            ValueError: see `next_pair`; or this pair was not shown to this rater.
        """
        rater = self._rater(name)
        why = self.store.keep(showing, rater)
        return None if why is None else Turn(self.store.next_pair(rater), why)

    def leave(self, name: str) -> None:
        """Gives the pair in front of a rater, who goes on under another name, back to the queue."""
        self.store.release(self._rater(name))

    def vote(self, name: str, showing: int, choice: Choice) -> Turn:
        """Records a verdict, durably, and returns the next pair. If the verdict came too late, the notice says so.

        Raises:
            ValueError: see `next_pair`; or this pair was not shown to this rater.
        """
        rater = self._rater(name)
        notice = ""
        try:
            self.store.vote(showing, rater, choice)
        except AlreadyClosed as error:
            notice = str(error)
        return Turn(self.store.next_pair(rater), notice)

    def undo(self, name: str) -> Turn:
        """Takes back the latest verdict and returns its pair; if that is impossible, the current pair and the reason.

        Raises:
            ValueError: see `next_pair`.
        """
        try:
            return Turn(self.take_back(name), "Verdict undone. Judge this pair again.")
        except ValueError as error:  # AlreadyClosed is one
            return Turn(self.store.next_pair(self._rater(name)), str(error))

    def take_back(self, name: str) -> Showing:
        """Takes back the latest verdict and returns its pair.

        Raises:
            AlreadyClosed: a step has already used the verdict.
            ValueError: see `next_pair`; or this rater has no verdict to take back.
        """
        return self.store.undo(self._rater(name))

    def progress(self, name: str | None = None) -> Progress:
        """The progress of the run, as this rater sees it.

        Raises:
            ValueError: see `next_pair`.
        """
        return self.store.progress(self._rater(name) if name else None)

    def _rater(self, name: str) -> int:
        if name not in self._raters:
            self._raters[name] = self.store.rater(name)
        return self._raters[name]


def new_name() -> str:
    """A random name for a rater who has not given one."""
    return f"rater {secrets.token_hex(2)}"
