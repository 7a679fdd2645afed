"""Pairs that are shown again, and the current model against the starting one."""

from __future__ import annotations

from stored_judgments import Open, choice_of_plus, new_pairs, shown

from zorl.probe import Choice
from zorl.rewards.judgment_store import JudgmentStore, NewPair


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
