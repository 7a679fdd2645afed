"""What one rater says is kept: un-flipped, once, until it is used."""

from __future__ import annotations

import pytest
from stored_judgments import Clock, Open, choice_of_plus, new_pairs, shown

from zorl.probe import Choice
from zorl.rewards.judgment_store import AlreadyClosed, JudgmentStore, NewPair, Showing, Vote


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
