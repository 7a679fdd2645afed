"""The judgment store: no verdict is lost or used twice, whoever is killed when."""

from __future__ import annotations

import math
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from zorl.probe import Choice
from zorl.rewards.judgment_store import (
    AlreadyClosed,
    JudgmentStore,
    NewPair,
    Showing,
    StoredStep,
    Vote,
)

Open = Callable[..., JudgmentStore]


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_store(store_at: str | Path, clock: Clock) -> Iterator[Open]:
    """Opens the test's store, on SQLite and on PostgreSQL, without repeats and comparisons unless asked for."""
    opened: list[JudgmentStore] = []

    def make(**settings: Any) -> JudgmentStore:
        plain = {"repeat_share": 0.0, "comparison_share": 0.0, "clock": clock}
        opened.append(JudgmentStore(store_at, **{**plain, **settings}))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Open) -> JudgmentStore:
    return open_store()


def new_pairs(n: int, text: str = "") -> list[NewPair]:
    return [NewPair(i % 2, i // 2, f"prompt {i}{text}", f"plus {i}{text}", f"minus {i}{text}") for i in range(n)]


def shown(store: JudgmentStore, rater: int) -> Showing:
    showing = store.next_pair(rater)
    assert showing is not None
    return showing


def choice_of_plus(showing: Showing) -> Choice:
    """What a rater says who likes the plus side."""
    return Choice.FIRST if showing.first.startswith("plus") else Choice.SECOND


# --- one rater --------------------------------------------------------------------------------------------------------


def test_verdicts_come_back_un_flipped_and_closing_again_gives_the_same(store: JudgmentStore) -> None:
    probe = store.add_probe(new_pairs(40), key="a", step=3, made_at=2, epsilon=0.5, seeds=(1, 2**63 - 1))
    ann = store.rater("Ann")
    orders = []
    for _ in range(40):
        showing = shown(store, ann)
        orders.append(showing.first.startswith("plus"))
        assert not store.decided(probe.id)
        assert store.close_decided(probe.id) is None
        store.vote(showing.id, ann, choice_of_plus(showing))
    assert store.next_pair(ann) is None
    assert store.decided(probe.id)
    votes = store.close_decided(probe.id)
    assert votes == store.close_probe(probe.id) == store.close_decided(probe.id)
    assert votes == [Vote(i + 1, i % 2, i // 2, "Ann", Choice.FIRST) for i in range(40)]
    assert 10 < sum(orders) < 30  # shown in both orders, about as often
    stored = store.probe(probe.id)
    assert (stored.step, stored.made_at, stored.epsilon, stored.seeds) == (3, 2, 0.5, (1, 2**63 - 1))
    assert (stored.state, store.open_probes()) == ("closed", [stored])


def test_every_choice_keeps_its_meaning_and_abstaining_is_no_tie(store: JudgmentStore) -> None:
    probe = store.add_probe(new_pairs(30), key="a")
    ann = store.rater("Ann")
    given = {}
    for i in range(30):
        showing = shown(store, ann)
        given[showing.pair] = list(Choice)[i % 5]
        flipped = showing.first.startswith("minus")
        store.vote(showing.id, ann, given[showing.pair].flipped if flipped else given[showing.pair])
    assert {vote.pair: vote.choice for vote in store.close_probe(probe.id)} == given


def test_the_same_vote_again_is_the_same_vote_and_another_one_is_refused(store: JudgmentStore) -> None:
    probe = store.add_probe(new_pairs(1), key="a")
    ann, bob = store.rater("Ann"), store.rater("Bob")
    showing = shown(store, ann)
    for _ in range(3):
        store.vote(showing.id, ann, Choice.TIE)
    with pytest.raises(AlreadyClosed, match="already closed: you have answered it with “tie”"):
        store.vote(showing.id, ann, Choice.FIRST)
    with pytest.raises(ValueError, match="was not given to rater"):
        store.vote(showing.id, bob, Choice.FIRST)
    with pytest.raises(ValueError, match="showing 99 was not given"):
        store.vote(99, ann, Choice.FIRST)
    with pytest.raises(ValueError, match="'maybe' is not a valid Choice"):
        store.vote(showing.id, ann, "maybe")  # type: ignore[arg-type]
    assert [vote.choice for vote in store.close_probe(probe.id)] == [Choice.TIE]
    store.vote(showing.id, ann, Choice.TIE)  # acknowledged once more, after a lost reply
    assert [event.action for event in store.events()] == ["asked", "shown", "vote", "late", "closed"]


def test_a_reload_gives_the_same_pair_in_the_same_order(open_store: Open, clock: Clock) -> None:
    store = open_store(lease_seconds=10)
    store.add_probe(new_pairs(9), key="a")
    ann = store.rater("Ann")
    showing = shown(store, ann)
    assert shown(store, ann) == showing
    clock.now += 9  # a reload keeps the pair for longer
    assert shown(store, ann) == showing
    clock.now += 9
    assert shown(store, store.rater("Bob")).pair != showing.pair
    clock.now += 1000  # the lease is over, and nobody has done it meanwhile
    assert shown(open_store(), ann) == showing
    assert len(store.showings()) == 2


def test_undo_shows_the_pair_again_until_its_verdict_is_consumed(store: JudgmentStore) -> None:
    probe = store.add_probe(new_pairs(3), key="a")
    ann = store.rater("Ann")
    with pytest.raises(ValueError, match="nothing to undo"):
        store.undo(ann)
    done = []
    for _ in range(2):
        done.append(shown(store, ann))
        store.vote(done[-1].id, ann, Choice.FIRST)
    third = shown(store, ann)
    assert store.undo(ann) == done[1]
    assert shown(store, ann) == done[1]  # also after a reload
    assert store.undo(ann) == done[0]
    assert store.progress(ann).votes_given == 0
    for showing in (done[0], done[1], third):
        assert shown(store, ann) == showing
        store.vote(showing.id, ann, Choice.SECOND)
    assert {vote.choice for vote in store.close_probe(probe.id)} <= {Choice.FIRST, Choice.SECOND}
    with pytest.raises(AlreadyClosed, match="cannot be undone: the model has already learned from it"):
        store.undo(ann)
    assert len(store.close_probe(probe.id)) == 3


def test_a_late_verdict_is_refused_in_words_and_logged(store: JudgmentStore) -> None:
    closed, withdrawn = store.add_probe(new_pairs(1), key="a"), store.add_probe(new_pairs(1), key="b")
    ann, bob = store.rater("Ann"), store.rater("Bob")
    late, later = shown(store, ann), shown(store, bob)
    assert store.close_probe(closed.id) == []
    store.withdraw(withdrawn.id)
    with pytest.raises(AlreadyClosed, match="^This pair is already closed: the model has already learned from it.$"):
        store.vote(late.id, ann, Choice.FIRST)
    with pytest.raises(
        AlreadyClosed, match="^This pair is already closed: it was withdrawn because the model has changed"
    ):
        store.vote(later.id, bob, Choice.FIRST)
    assert store.next_pair(ann) is None
    assert [e.rater for e in store.events() if e.action == "late" and e.choice is Choice.FIRST] == ["Ann", "Bob"]
    assert store.close_probe(closed.id) == []


def test_identical_answers_tie_unseen(store: JudgmentStore) -> None:
    pairs = [NewPair(0, 0, "p", "same", "same"), NewPair(0, 1, "p", "one", "other")]
    probe = store.add_probe(pairs, key="a")
    alone = store.add_probe(pairs[:1], key="b")
    ann = store.rater("Ann")
    assert store.decided(alone.id)
    assert shown(store, ann).prompt == "p"
    store.vote(1, ann, Choice.BOTH_BAD)
    assert store.next_pair(ann) is None
    choices = [(vote.row, vote.rater, vote.choice) for vote in store.close_probe(probe.id)]
    assert choices == [(0, "", Choice.TIE), (1, "Ann", Choice.BOTH_BAD)]


def test_a_character_that_postgresql_does_not_take_is_replaced_and_tells_answers_apart_still(
    store: JudgmentStore,
) -> None:
    store.add_probe([NewPair(0, 0, "a\0b 🙂", "plus \0", "plus \ufffd", "[0]")], key="a")
    showing = shown(store, store.rater("Zoë 🙂"))
    assert (showing.prompt, {showing.first, showing.second}) == ("a\ufffdb 🙂", {"plus \ufffd"})


def test_what_a_rater_sees_does_not_say_which_side_is_which(store: JudgmentStore) -> None:
    assert {*Showing.__dataclass_fields__} == {"id", "pair", "prompt", "first", "second"}
    with pytest.raises(ValueError, match="there is no rater 7"):
        store.next_pair(7)


@pytest.mark.parametrize("name", ["", "  ", "x" * 41, "two\nlines", "null\0"])
def test_a_name_that_is_none_is_refused(store: JudgmentStore, name: str) -> None:
    with pytest.raises(ValueError, match="1 to 40 printable characters"):
        store.rater(name)


def test_a_rater_has_one_id(store: JudgmentStore) -> None:
    assert store.rater(" Zoë ") == store.rater("Zoe\u0308") != store.rater("zoë")


# --- several raters ---------------------------------------------------------------------------------------------------


def test_a_shown_pair_is_kept_for_its_rater_until_the_lease_ends(open_store: Open, clock: Clock) -> None:
    store = open_store(lease_seconds=10)
    probe = store.add_probe(new_pairs(2), key="a")
    ann, bob, cid = map(store.rater, ("Ann", "Bob", "Cid"))
    first, second = shown(store, ann), shown(store, bob)
    assert first.pair != second.pair
    # All are kept for others: a vote too many is better than waiting.
    assert shown(store, cid).pair == first.pair
    store.vote(second.id, bob, Choice.TIE)
    clock.now += 11
    taken = shown(store, bob)
    assert taken.pair == first.pair
    store.vote(taken.id, bob, Choice.TIE)
    assert store.next_pair(ann) is None  # others have done it
    store.vote(first.id, ann, Choice.TIE)  # no verdict is lost while the probe is open
    assert store.decided(probe.id)
    assert Counter(vote.rater for vote in store.close_probe(probe.id)) == {"Bob": 2, "Ann": 1}


def test_overlap_takes_each_vote_from_another_rater(open_store: Open) -> None:
    store = open_store(votes_per_pair=2)
    probe = store.add_probe(new_pairs(4), key="a")
    raters = [store.rater(name) for name in ("Ann", "Bob", "Cid")]
    while not store.decided(probe.id):
        for rater in raters:
            if (showing := store.next_pair(rater)) is not None:
                store.vote(showing.id, rater, Choice.FIRST)
    votes = store.close_probe(probe.id)
    assert set(Counter(vote.pair for vote in votes).values()) == {2}
    assert len({(vote.pair, vote.rater) for vote in votes}) == 8


def test_the_oldest_probe_is_served_first(store: JudgmentStore) -> None:
    probes = [store.add_probe(new_pairs(2, f" of {key}"), key=key, step=i) for i, key in enumerate("ab")]
    ann = store.rater("Ann")
    seen = []
    while (showing := store.next_pair(ann)) is not None:
        seen.append(showing.prompt[-1])
        store.vote(showing.id, ann, Choice.ABSTAIN)
    assert seen == list("aabb")
    assert [store.decided(probe.id) for probe in probes] == [True, True]


def test_progress_counts_what_the_next_step_takes(open_store: Open, clock: Clock) -> None:
    store = open_store(votes_per_pair=2)
    assert store.progress().votes_needed == 0
    store.add_probe([*new_pairs(3), NewPair(0, 9, "p", "same", "same")], key="a")
    store.add_probe(new_pairs(5), key="b", step=1)
    ann, bob = store.rater("Ann"), store.rater("Bob")
    for _ in range(4):
        showing = shown(store, ann)
        store.vote(showing.id, ann, Choice.FIRST)
    progress = store.progress(ann)
    assert (progress.votes_needed, progress.votes_given, progress.open_pairs) == (6, 3, 4)
    assert store.progress(bob).open_pairs == 8
    assert (progress.verdicts, progress.raters, progress.steps) == (4, 1, 0)
    assert progress.tuner == {"state": "stopped", "message": "", "time": 0.0}
    store.set_tuner("waiting", "for you")
    assert store.tuner() == {"state": "waiting", "message": "for you", "time": 1000.0}
    for seconds, told in ((0.5, 1000.0), (1.5, 1001.5)):
        clock.now = 1000.0 + seconds
        store.set_tuner("waiting", "for you")
        assert store.tuner()["time"] == told
    store.set_tuner("generating")
    assert store.tuner() == {"state": "generating", "message": "", "time": 1001.5}


def test_a_tuner_that_stops_looking_for_verdicts_is_silent(open_store: Open, clock: Clock) -> None:
    store = open_store()
    store.set_tuner("waiting", "for verdicts")
    for seconds, silence in ((30.0, None), (31.0, "31 s"), (240.0, "4 min")):
        clock.now = 1000.0 + seconds
        for told in (store.tuner(), store.progress().tuner):
            assert told["state"] == ("silent" if silence else "waiting")
            assert told["time"] == 1000.0
            assert not silence or f"has not looked for verdicts for {silence}. They are kept" in told["message"]
    store.set_tuner("waiting", "for verdicts")
    assert store.tuner() == {"state": "waiting", "message": "for verdicts", "time": 1240.0}
    store.set_tuner("computing")  # may take any time
    clock.now += 3600.0
    assert store.tuner()["state"] == "computing"


def test_progress_tells_skips_verdicts_in_other_hands_and_what_can_be_undone(open_store: Open, clock: Clock) -> None:
    store = open_store(repeat_share=0, comparison_share=0)
    probe = store.add_probe(new_pairs(2), key="a")
    ann, bob = store.rater("Ann"), store.rater("Bob")
    assert not store.progress(ann).can_undo
    showing = shown(store, ann)
    shown(store, bob)
    store.vote(showing.id, ann, Choice.ABSTAIN)
    progress = store.progress(ann)
    assert (progress.votes_given, progress.votes_skipped, progress.verdicts) == (1, 1, 0)
    assert (progress.votes_held, store.progress(bob).votes_held, store.progress().votes_held) == (1, 0, 1)
    assert progress.can_undo
    assert not store.progress(bob).can_undo
    clock.now += 200  # Bob has closed the page
    assert store.progress(ann).votes_held == 0
    store.close_probe(probe.id)
    assert not store.progress(ann).can_undo


# --- repeats and comparisons ------------------------------------------------------------------------------------------


def test_repeats_come_swapped_and_never_count(open_store: Open) -> None:
    store = open_store(repeat_share=0.3)
    probe = store.add_probe(new_pairs(60), key="a")
    ann = store.rater("Ann")
    while (showing := store.next_pair(ann)) is not None:
        store.vote(showing.id, ann, choice_of_plus(showing))
    records = store.showings()
    repeats = [record for record in records if record.repeat]
    assert 10 < len(repeats) < 40
    once = {record.pair: record for record in records if not record.repeat}
    for repeat in repeats:
        assert repeat.flipped is not once[repeat.pair].flipped
        assert repeat.showing > once[repeat.pair].showing + 5
        assert repeat.opinion is Choice.FIRST
    assert len({repeat.pair for repeat in repeats}) == len(repeats)
    assert len(store.close_probe(probe.id)) == 60
    assert [len(pair.votes) for pair in store.preference_pairs()] == [1] * 60


def test_a_repeat_can_be_answered_when_its_pair_is_closed(open_store: Open) -> None:
    store = open_store(repeat_share=1.0)
    probe = store.add_probe(new_pairs(7), key="a")
    ann = store.rater("Ann")
    for _ in range(6):
        showing = shown(store, ann)
        store.vote(showing.id, ann, Choice.FIRST)
    repeat = shown(store, ann)
    store.close_probe(probe.id)
    assert shown(store, ann) == repeat
    store.vote(repeat.id, ann, Choice.SECOND)
    assert store.undo(ann) == repeat
    assert len(store.close_probe(probe.id)) == 6


def test_comparisons_are_mixed_in_and_fill_a_pause(open_store: Open) -> None:
    store = open_store(comparison_share=0.25)
    store.add_probe(new_pairs(60), key="a")
    store.add_comparisons(new_pairs(60, " compared"), step=4)
    ann = store.rater("Ann")
    seen = []
    while (showing := store.next_pair(ann)) is not None:
        seen.append("compared" in showing.prompt)
        store.vote(showing.id, ann, choice_of_plus(showing))
    assert len(seen) == 120
    assert 5 < sum(seen[:60]) < 28
    assert all(seen[-20:])  # with no pair of a probe left
    votes = store.comparisons()
    assert {(vote.step, vote.choice, vote.rater) for vote in votes} == {(4, Choice.FIRST, "Ann")}
    assert len(votes) == 60


def test_older_comparisons_that_nobody_saw_are_withdrawn_and_identical_ones_take_their_turn(
    store: JudgmentStore,
) -> None:
    same = [NewPair(0, i, "p", "same", "same") for i in range(3)]
    store.add_comparisons([same[0], *new_pairs(1, " old"), same[1], *new_pairs(1, " unseen"), same[2]], step=1)
    ann = store.rater("Ann")
    old = shown(store, ann)
    assert [vote.choice for vote in store.comparisons()] == [Choice.TIE]  # the one that was before it
    store.add_comparisons(new_pairs(1, " new"), step=2)
    store.vote(old.id, ann, choice_of_plus(old))
    new = shown(store, ann)
    assert new.prompt == "prompt 0 new"
    store.vote(new.id, ann, choice_of_plus(new).flipped)
    assert store.next_pair(ann) is None
    given = [(vote.step, vote.rater, vote.choice) for vote in store.comparisons()]
    assert given == [(1, "", Choice.TIE), (1, "Ann", Choice.FIRST), (2, "Ann", Choice.SECOND)]


# --- the tuner --------------------------------------------------------------------------------------------------------


def step_of(probe: int, step: int) -> StoredStep:
    return StoredStep(step, probe, 0.5, (7,), (math.nan,), (0.25,), {"drift": 0.1})


def test_a_step_is_committed_once(store: JudgmentStore, clock: Clock) -> None:
    probe = store.add_probe(new_pairs(1), key="a")
    with pytest.raises(ValueError, match="close its probe 1 first"):
        store.commit_step(step_of(probe.id, 0))
    store.close_probe(probe.id)
    store.commit_step(step_of(probe.id, 0))
    assert (store.probe(probe.id).state, store.open_probes()) == ("applied", [])
    with pytest.raises(ValueError, match="step 0 cannot be committed: the store has steps up to 0"):
        store.commit_step(step_of(probe.id, 0))
    with pytest.raises(ValueError, match="its probe 1 has already made a step"):
        store.commit_step(step_of(probe.id, 1))
    store.add_figures(0, {"win_rate": 0.75})
    (step,) = store.steps()
    assert math.isnan(step.projected[0])
    assert (step.step, step.coefficients, step.seeds, step.created) == (0, (0.25,), (7,), clock.now)
    assert step.figures == {"drift": 0.1, "win_rate": 0.75}
    assert store.decided(probe.id)
    with pytest.raises(ValueError, match="its step is committed"):
        store.withdraw(probe.id)
    with pytest.raises(ValueError, match="there is no step 5 in force"):
        store.add_figures(5, {})


def test_withdrawn_unseen_expired_with_votes(store: JudgmentStore) -> None:
    unseen, voted = (store.add_probe(new_pairs(1), key=key) for key in "ab")
    ann = store.rater("Ann")
    store.vote(shown(store, ann).id, ann, Choice.FIRST)
    store.vote(shown(store, ann).id, ann, Choice.FIRST)
    store.undo(ann)
    for _ in range(2):
        store.withdraw(unseen.id)
        store.withdraw(voted.id)
    assert [store.probe(probe.id).state for probe in (unseen, voted)] == ["expired", "withdrawn"]
    assert not store.decided(unseen.id)
    with pytest.raises(ValueError, match="cannot be closed: it is expired"):
        store.close_probe(unseen.id)
    with pytest.raises(AlreadyClosed, match="withdrawn because the model has changed"):
        store.undo(ann)
    assert len(store.preference_pairs()) == 1  # what people said stays
    store.commit_step(step_of(unseen.id, 0))  # recorded as abstained
    assert store.probe(unseen.id).state == "expired"
    with pytest.raises(ValueError, match="has already made a step"):
        store.commit_step(step_of(unseen.id, 1))


def test_a_key_names_one_probe_until_that_is_gone(store: JudgmentStore) -> None:
    probe = store.add_probe(new_pairs(2), key="a")
    assert store.add_probe(new_pairs(5), key="a") == probe
    store.close_probe(probe.id)
    assert store.add_probe(new_pairs(2), key="a").id == probe.id
    store.withdraw(probe.id)
    again = store.add_probe(new_pairs(2), key="a")
    assert again.id != probe.id
    assert store.probes_written() == 2
    with pytest.raises(ValueError, match="at least one pair"):
        store.add_probe([], key="b")


def test_going_back_leaves_the_log_and_takes_no_verdict_for_what_is_gone(store: JudgmentStore) -> None:
    ann = store.rater("Ann")
    for i in range(3):
        probe = store.add_probe(new_pairs(1), key=f"step {i}", step=i)
        store.vote(shown(store, ann).id, ann, Choice.FIRST)
        store.close_probe(probe.id)
        store.commit_step(step_of(probe.id, i))
    closed = store.add_probe(new_pairs(1), key="closed", step=3)
    store.vote(shown(store, ann).id, ann, Choice.FIRST)
    store.close_probe(closed.id)
    waiting = store.add_probe(new_pairs(1), key="open", step=4)
    store.add_comparisons(new_pairs(1), step=3)
    showing = shown(store, ann)
    store.rewind(1)
    assert [step.step for step in store.steps()] == [0]
    assert store.open_probes() == []
    states = [store.probe(i).state for i in range(1, 6)]
    assert states == ["applied", "rewound", "rewound", "expired", "withdrawn"]
    assert waiting.id == 5
    with pytest.raises(AlreadyClosed):
        store.vote(showing.id, ann, Choice.FIRST)
    assert store.next_pair(ann) is None
    assert len(store.preference_pairs()) == 4
    again = store.add_probe(new_pairs(1), key="step 1", step=1)
    store.close_probe(again.id)
    store.commit_step(step_of(again.id, 1))
    assert [step.step for step in store.steps()] == [0, 1]


def test_requests_wait_for_one_answer(store: JudgmentStore) -> None:
    number = store.request("try", {"prompt": "Once"})
    other = store.request("export_model", {})
    assert store.pending_requests() == [(number, "try", {"prompt": "Once"}), (other, "export_model", {})]
    assert store.request_result(number) is None
    store.answer_request(number, {"start": "a", "current": "b", "step": 3})
    store.answer_request(number, {"error": "too late"})
    assert store.request_result(number) == {"start": "a", "current": "b", "step": 3}
    assert [waiting for waiting, _, _ in store.pending_requests()] == [other]
    for call in (lambda: store.request_result(99), lambda: store.answer_request(99, {})):
        with pytest.raises(ValueError, match="there is no request 99"):
            call()


# --- opening ----------------------------------------------------------------------------------------------------------


def test_settings_stay_with_the_store(store_at: str | Path) -> None:
    url = store_at if isinstance(store_at, str) else f"sqlite:///{store_at}"
    with JudgmentStore(store_at, votes_per_pair=3, lease_seconds=5):
        pass
    with JudgmentStore(str(store_at)) as store, JudgmentStore(store_at, votes_per_pair=3), JudgmentStore(url):
        assert (store.settings.votes_per_pair, store.settings.lease_seconds) == (3, 5)
        assert (store.settings.repeat_share, store.settings.comparison_share) == (0.05, 0.1)
    with pytest.raises(ValueError, match="was made with votes_per_pair=3, and votes_per_pair=2 was asked for"):
        JudgmentStore(store_at, votes_per_pair=2)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"votes_per_pair": 0}, "votes_per_pair must be a whole number of at least 1, got 0"),
        ({"votes_per_pair": 1.5}, "votes_per_pair must be a whole number"),
        ({"lease_seconds": 0}, "lease_seconds must be positive"),
        ({"lease_seconds": math.nan}, "lease_seconds must be positive"),
        ({"repeat_share": 1.5}, "repeat_share must lie in"),
        ({"comparison_share": -0.1}, "comparison_share must lie in"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, settings: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        JudgmentStore(tmp_path / "store", **settings)
    assert not list(tmp_path.iterdir())


def test_what_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "text.sqlite"
    text.write_text("no database " * 100)
    with pytest.raises(ValueError, match="is not a judgment store: it is not an SQLite file"):
        JudgmentStore(text)
    assert text.read_text() == "no database " * 100
    other = tmp_path / "other.sqlite"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE recipes (id INTEGER)")
    connection.close()
    with pytest.raises(ValueError, match="is not a judgment store: it is a database with the tables recipes"):
        JudgmentStore(other)
    with pytest.raises(ValueError, match="is a folder; a judgment store is a file"):
        JudgmentStore(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        JudgmentStore(tmp_path / "nowhere" / "store.sqlite")
    for memory in ("sqlite://", "sqlite:///:memory:", ":memory:"):
        with pytest.raises(ValueError, match="needs a file"):
            JudgmentStore(memory)
    for url in ("nosuch://host/db", "://"):
        with pytest.raises(ValueError, match=r"cannot open|not the URL"):
            JudgmentStore(url)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store"
    JudgmentStore(path).close()
    connection = sqlite3.connect(path)
    connection.execute("UPDATE meta SET value = '99' WHERE name = 'schema'")
    connection.commit()
    connection.close()
    with pytest.raises(ValueError, match="its schema is 99, and this version reads 1"):
        JudgmentStore(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ValueError, match="check the permissions of the file and of its folder"):
            JudgmentStore(tmp_path / "store")
    finally:
        tmp_path.chmod(0o700)


def test_a_file_that_nobody_can_write_is_told(tmp_path: Path) -> None:
    path = tmp_path / "store"
    JudgmentStore(path).close()
    with pytest.raises(ValueError, match="cannot write the judgment store .*readonly"):
        JudgmentStore(f"sqlite:///file:{path}?mode=ro&uri=true")


def test_sqlite_syncs_every_commit(tmp_path: Path) -> None:
    with JudgmentStore(tmp_path / "store") as store, store._database.reading() as connection:
        asked = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")]
    assert asked == ["wal", 2]


# --- many at once, and killed at any moment ---------------------------------------------------------------------------


def test_eight_raters_at_once_lose_nothing_and_judge_nothing_twice(store_at: str | Path) -> None:
    """Threads over two connections' worth of stores, as two processes have them, while a tuner closes and adds probes."""
    acknowledged: dict[int, Choice] = {}
    lock = threading.Lock()
    used: list[Vote] = []
    failures: list[BaseException] = []
    stop = threading.Event()

    def rate(store: JudgmentStore, name: str) -> None:
        try:
            rater = store.rater(name)
            draws = random.Random(name)
            while not stop.is_set():
                showing = store.next_pair(rater)
                if showing is None:
                    time.sleep(0.002)
                    continue
                choice = draws.choice([Choice.FIRST, Choice.SECOND, Choice.TIE])
                try:
                    store.vote(showing.id, rater, choice)
                except AlreadyClosed:
                    continue
                with lock:
                    acknowledged[showing.id] = choice
        except BaseException as error:
            failures.append(error)
            stop.set()

    with JudgmentStore(store_at, repeat_share=0.0, comparison_share=0.0) as tuner, JudgmentStore(store_at) as page:
        threads = [threading.Thread(target=rate, args=((tuner, page)[i % 2], f"rater {i}")) for i in range(8)]
        for thread in threads:
            thread.start()
        for step in range(12):
            probe = tuner.add_probe(new_pairs(30), key=str(step), step=step)
            deadline = time.monotonic() + 20
            while not tuner.decided(probe.id) and not stop.is_set() and time.monotonic() < deadline:
                time.sleep(0.002)
            used += tuner.close_probe(probe.id)
            tuner.commit_step(step_of(probe.id, step))
        stop.set()
        for thread in threads:
            thread.join()
        assert failures == []
        records = {record.showing: record for record in page.showings() if record.choice is not None}
    assert {i: record.choice for i, record in records.items()} == acknowledged
    assert len(used) == len(acknowledged) >= 360
    assert {vote.pair for vote in used} == set(range(1, 361))
    assert len({(vote.pair, vote.rater) for vote in used}) == len(used)


def test_processes_that_come_at_once_make_one_store_and_get_a_pair_each(store_at: str | Path) -> None:
    """Eight open what is not there yet, and ask for a pair as eight raters when all are ready."""
    program = AT_ONCE.replace("PAIRS", "[NewPair(0, row, str(row), 'plus', 'minus') for row in range(8)]")
    result = subprocess.run([sys.executable, "-c", program, str(store_at)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert sorted(map(int, result.stdout.split())) == list(range(1, 9))
    with JudgmentStore(store_at) as store:
        assert store.probes_written() == 1
        assert {record.rater for record in store.showings()} == {f"rater {i}" for i in range(8)}


AT_ONCE = """
import os, sys
from zorl.rewards.judgment_store import JudgmentStore, NewPair
ready, go = os.pipe(), os.pipe()
children = []
for i in range(8):
    child = os.fork()
    if child == 0:
        store = JudgmentStore(sys.argv[1], repeat_share=0.0, comparison_share=0.0)
        store.add_probe(PAIRS, key="the same")
        rater = store.rater(f"rater {i}")
        os.write(ready[1], b".")
        os.read(go[0], 1)
        os.write(1, f"{store.next_pair(rater).pair}\\n".encode())
        store.close()
        os._exit(0)
    children.append(child)
for _ in children:
    os.read(ready[0], 1)
os.write(go[1], b"." * 8)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""

RATER = """
import os, random, sys, time
from zorl.probe import Choice
from zorl.rewards.judgment_store import AlreadyClosed, JudgmentStore
tell = lambda number: os.write(1, b"%d\\n" % number)  # one write, where print makes two if Python does not buffer
store, name = JudgmentStore(sys.argv[1]), sys.argv[2]
rater, draws = store.rater(name), random.Random()
print("ready", flush=True)
while True:
    showing = store.next_pair(rater)
    if showing is None:
        time.sleep(0.005)
        continue
    choice = Choice.FIRST if showing.first.startswith("plus") else Choice.SECOND
    try:
        store.vote(showing.id, rater, choice)
        tell(showing.id)  # acknowledged
        if draws.random() < 0.1:
            store.undo(rater)
            tell(-showing.id)
    except AlreadyClosed:
        pass
"""

TUNER = """
import sys, time
from zorl.rewards.judgment_store import JudgmentStore, NewPair, StoredStep
store = JudgmentStore(sys.argv[1])
print("ready", flush=True)
while True:
    for probe in store.open_probes():  # what a killed process left comes first
        while (votes := store.close_decided(probe.id)) is None:
            time.sleep(0.002)
        store.commit_step(StoredStep(probe.step, probe.id, 0.5, (1,), (0.0,), (0.0,), {"votes": float(len(votes))}))
    step = len(store.steps())
    pairs = [NewPair(0, row, f"prompt {row}", f"plus {row}", f"minus {row}") for row in range(8)]
    store.add_probe(pairs, key=f"step {step}", step=step)
"""


def test_processes_killed_at_any_moment_lose_nothing_and_use_nothing_twice(store_at: str | Path) -> None:
    """A tuner and two raters, killed thirty times. They are forked, for importing takes seconds and forking none."""
    JudgmentStore(store_at, repeat_share=0.1, comparison_share=0.0, lease_seconds=0.05).close()
    template = FORKING.replace("RATER", repr(RATER)).replace("TUNER", repr(TUNER))
    result = subprocess.run([sys.executable, "-c", template, str(store_at)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    with JudgmentStore(store_at) as store:
        said = [line for line in result.stdout.splitlines() if line.lstrip("-").isdecimal()]
        check_the_books(store, said)
        assert len(store.steps()) > 5


# Loads the modules and the driver once, and forks from there.
FORKING = """
import os, random, signal, sys, time, warnings
from zorl.rewards.judgment_store import JudgmentStore
warnings.simplefilter("ignore")
JudgmentStore(sys.argv[1]).close()
draws = random.Random(3)
for _ in range(10):
    children = []
    for program, words in ((TUNER, ()), (RATER, ("rater 0",)), (RATER, ("rater 1",))):
        child = os.fork()
        if child == 0:
            sys.argv = ["", sys.argv[1], *words]
            exec(program, {"__name__": "__main__"})
        children.append(child)
    time.sleep(0.15 + draws.random() / 3)
    for child in draws.sample(children, 3):
        time.sleep(draws.random() / 50)
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
            sys.exit("a process ended by itself")
"""


def check_the_books(store: JudgmentStore, said: list[str]) -> None:
    """What was acknowledged is there, what was taken back is not, and every vote was used once."""
    showings = {record.showing: record for record in store.showings()}
    last: dict[int, bool] = {}  # showing: voted, or taken back, as its rater was told at last
    for line in said:
        last[abs(int(line))] = int(line) > 0
    assert len(last) > 20
    # A rater who was killed may not have been told of one vote or undo more; the log has it.
    actions: dict[int | None, list[str]] = {}
    for event in store.events():
        if event.action in ("vote", "undo"):
            actions.setdefault(event.showing, []).append(event.action)
    for showing, record in showings.items():
        done = actions.get(showing, [])
        assert done == ["vote", "undo"] * (len(done) // 2) + ["vote"] * (len(done) % 2)
        assert (record.choice is not None) == (len(done) % 2 == 1)
        assert record.opinion in (None, Choice.FIRST)
    told = Counter(abs(int(line)) for line in said)
    for showing, times in told.items():
        assert len(actions[showing]) >= times
    steps = store.steps()
    assert [step.step for step in steps] == list(range(len(steps)))
    assert len({step.probe for step in steps}) == len(steps)
    counted = Counter(r.probe for r in showings.values() if r.choice is not None and not r.repeat)
    for step in steps:  # the votes that were used are the votes that there are
        assert store.probe(step.probe).state == "applied"
        assert step.figures["votes"] == len(store.close_probe(step.probe)) == counted[step.probe] >= 8
    assert store.progress().verdicts == sum(record.choice not in (None, Choice.ABSTAIN) for record in showings.values())
