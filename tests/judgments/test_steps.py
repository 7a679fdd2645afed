"""The tuner's side of the store: steps, withdrawn probes, going back, requests."""

from __future__ import annotations

import math

import pytest
from stored_judgments import Clock, new_pairs, shown, step_of

from zorl.probe import Choice
from zorl.rewards.judgment_store import AlreadyClosed, JudgmentStore


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
    store.accept_drift(2.5)
    assert store.accepted_drift() == 2.5
    store.rewind(1)
    assert store.accepted_drift() is None, "it was accepted of a model that is gone"
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
