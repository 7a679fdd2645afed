"""The API for other programs, over gradio_client: the Judge tab without a browser."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import gradio as gr

from zorl.apps.page.desk import AWAY, Desk
from zorl.probe import Choice
from zorl.rewards.judgment_records import Showing


def build(desk: Desk) -> None:
    """Adds /next_pair, /vote, /undo and /progress. `rater` is a name; it may be empty if raters sign in."""

    def who(rater: str, request: gr.Request) -> str:
        return desk.name(rater, request.username)

    def refused(error: Exception) -> gr.Error:
        return gr.Error(AWAY if isinstance(error, ConnectionError) else str(error), print_exception=False)

    def next_pair(rater: str, request: gr.Request) -> dict[str, Any] | None:
        """The pair to judge: showing (its id), prompt, first and second; null if there is none yet: ask again later."""
        try:
            return _told(desk.next_pair(who(rater, request)).showing)
        except (ValueError, ConnectionError) as error:
            raise refused(error) from error

    def vote(rater: str, showing: int, choice: str, request: gr.Request) -> dict[str, Any] | None:
        """Records a verdict (first, second, tie, "both bad" or abstain), durably, and returns the next pair."""
        try:
            turn = desk.vote(who(rater, request), showing, _choice(choice))
        except (ValueError, ConnectionError) as error:
            raise refused(error) from error
        if turn.notice:
            raise gr.Error(turn.notice, print_exception=False)
        return _told(turn.showing)

    def undo(rater: str, request: gr.Request) -> dict[str, Any] | None:
        """Takes back this rater's latest verdict and returns its pair; an error if a step has already used the verdict."""
        try:
            return _told(desk.take_back(who(rater, request)))
        except (ValueError, ConnectionError) as error:
            raise refused(error) from error

    def progress(rater: str, request: gr.Request) -> dict[str, Any]:
        """Steps done, verdicts needed for the next step, pairs in the queue, and what the model is doing."""
        try:
            return asdict(desk.progress(who(rater, request) if rater or desk.logins else None))
        except (ValueError, ConnectionError) as error:
            raise refused(error) from error

    for function in (next_pair, vote, undo, progress):
        gr.api(function, api_name=function.__name__, concurrency_limit=None, queue=False)


def _choice(choice: str) -> Choice:
    try:
        return Choice(choice)
    except ValueError:
        raise ValueError(f"choice must be one of {', '.join(map(repr, map(str, Choice)))}, got {choice!r}") from None


def _told(showing: Showing | None) -> dict[str, Any] | None:
    """What a rater may know about a pair, under the names of `Showing`."""
    if showing is None:
        return None
    return {"showing": showing.id, "prompt": showing.prompt, "first": showing.first, "second": showing.second}
