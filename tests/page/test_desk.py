"""The raters' actions: verdicts, undo, logins."""

from __future__ import annotations

from pathlib import Path

import pytest
from judging_pages import desk_of, shown

from zorl.apps.page.desk import Desk
from zorl.probe import Choice


def test_a_verdict_brings_the_next_pair_and_undo_the_last_one(tmp_path: Path) -> None:
    desk = desk_of(tmp_path)
    first = shown(desk.next_pair("ada").showing)
    second = shown(desk.vote("ada", first.id, Choice.FIRST).showing)
    assert second.id != first.id
    back = desk.undo("ada")
    assert back.showing == first
    assert back.notice == "Verdict undone. Judge this pair again."
    assert desk.undo("ada").notice == "You have nothing to undo."


def test_a_verdict_on_a_pair_that_is_closed_says_so_and_brings_the_next_pair(tmp_path: Path) -> None:
    desk = desk_of(tmp_path)
    late = shown(desk.next_pair("ada").showing)
    (probe, *_) = desk.store.open_probes()
    desk.store.close_probe(probe.id)
    turn = desk.vote("ada", late.id, Choice.FIRST)
    assert turn.notice.startswith("This pair is already closed:")
    assert turn.showing is None


def test_nobody_judges_under_another_s_login(tmp_path: Path) -> None:
    desk = Desk(desk_of(tmp_path).store, logins=True)
    assert desk.name("", "ada") == desk.name("ada", "ada") == "ada"
    with pytest.raises(ValueError, match="signed in as ada, so you cannot judge as bob"):
        desk.name("bob", "ada")
    with pytest.raises(ValueError, match="Sign in first"):
        desk.name("bob", None)
    with pytest.raises(ValueError, match="A rater needs a name"):
        Desk(desk.store).name(" ", None)
