"""Raters who judge at the same time: leases, overlap, the queue, and what the page says of it."""

from __future__ import annotations

from collections import Counter

import pytest
from stored_judgments import Clock, Open, new_pairs, shown

from zorl.probe import Choice
from zorl.rewards.judgment_store import JudgmentStore, NewPair


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


def test_a_pair_stays_with_who_is_reading_it_but_not_for_ever(open_store: Open, clock: Clock) -> None:
    store = open_store(lease_seconds=10)
    probe = store.add_probe(new_pairs(2), key="a")
    ann, bob = map(store.rater, ("Ann", "Bob"))
    read, other = shown(store, ann), shown(store, bob)
    store.vote(other.id, bob, Choice.TIE)
    for _ in range(12):
        clock.now += 6
        assert store.keep(read.id, ann) is None
    assert store.progress(bob).votes_held == 1
    clock.now += 60  # whoever has not answered by now may have left
    assert store.keep(read.id, ann) is None, "but may still answer"
    assert store.progress(bob).votes_held == 0
    with pytest.raises(ValueError, match="was not given to rater"):
        store.keep(read.id, bob)
    assert store.keep(other.id, bob) == "You have answered it elsewhere."
    store.withdraw(probe.id)
    closed = "The pair that you were looking at is closed: it was withdrawn because the model has changed since."
    assert store.keep(read.id, ann) == closed


def test_who_goes_gives_the_pair_back(open_store: Open) -> None:
    store = open_store(lease_seconds=10)
    store.add_probe(new_pairs(2), key="a")
    guest, ann = store.rater("rater 1a2b"), store.rater("Ann")
    first = shown(store, guest)
    store.release(guest)
    assert shown(store, ann).pair == first.pair
    assert store.progress(guest).votes_held == 1


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
    assert progress.tuner == {"state": "stopped", "message": "", "time": 0.0, "age": 1000.0}
    store.set_tuner("waiting", "for you")
    assert store.tuner() == {"state": "waiting", "message": "for you", "time": 1000.0, "age": 0.0}
    for seconds, told in ((0.5, 1000.0), (1.5, 1001.5)):
        clock.now = 1000.0 + seconds
        store.set_tuner("waiting", "for you")
        assert store.tuner()["time"] == told
    store.set_tuner("generating")
    assert store.tuner() == {"state": "generating", "message": "", "time": 1001.5, "age": 0.0}


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
    assert store.tuner() == {"state": "waiting", "message": "for verdicts", "time": 1240.0, "age": 0.0}
    store.set_tuner("computing")  # may take any time
    clock.now += 3600.0
    assert (store.tuner()["state"], store.tuner()["age"]) == ("computing", 3600.0)


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
