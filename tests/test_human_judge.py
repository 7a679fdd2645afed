"""People as a judge of `MeZOTrainer`: what is asked, what comes back, and what happens when a run is stopped."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from zorl import MeZOConfig, MeZOTrainer, Prompt
from zorl.probe import Choice
from zorl.rewards import HumanJudge, JudgmentStore
from zorl.rewards.judgment_store import AlreadyClosed
from zorl.rewards.majority import majority

pytestmark = pytest.mark.usefixtures("one_thread")

F, S, T, B, A = Choice.FIRST, Choice.SECOND, Choice.TIE, Choice.BOTH_BAD, Choice.ABSTAIN


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JudgmentStore]:
    with JudgmentStore(tmp_path / "store", repeat_share=0.0, comparison_share=0.0) as opened:
        yield opened


class Raters:
    """People who judge in threads of their own, each by an opinion on the two answers."""

    def __init__(self, store: JudgmentStore, **opinions: Callable[[str, str], Choice]) -> None:
        self.store = store
        self.stop = threading.Event()
        self.seen: list[tuple[str, str, str]] = []
        self.threads = [threading.Thread(target=self._rate, args=item, daemon=True) for item in opinions.items()]

    def __enter__(self) -> Raters:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def _rate(self, name: str, opinion: Callable[[str, str], Choice]) -> None:
        rater = self.store.rater(name)
        while not self.stop.is_set():
            showing = self.store.next_pair(rater)
            if showing is None:
                time.sleep(0.002)
                continue
            with contextlib.suppress(AlreadyClosed):
                self.store.vote(showing.id, rater, opinion(showing.first, showing.second))
                self.seen.append((showing.prompt, showing.first, showing.second))


def shorter(first: str, second: str) -> Choice:
    return F if len(first) < len(second) else S if len(first) > len(second) else T


def ask(judge: HumanJudge, request_id: str = "1", n: int = 4) -> list[Choice]:
    """The answer a… is the shorter one; it is the first of even pairs."""
    pairs = [("a", "bbb") if i % 2 == 0 else ("bbb", "a") for i in range(n)]
    return list(
        judge(
            prompts=[f"p{i}" for i in range(n)],
            first=[f"{first}{i}" for i, (first, _) in enumerate(pairs)],
            second=[f"{second}{i}" for i, (_, second) in enumerate(pairs)],
            request_id=request_id,
            label=["x"] * n,
        )
    )


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([], A),
        ([A, A], A),
        ([F], F),
        ([F, A, A], F),
        ([F, S], T),
        ([F, S, S], S),
        ([F, T], T),
        ([F, T, B], T),
        ([T, B, B], B),
        ([F, F, T, B], T),
        ([F, F, S, T], F),
    ],
)
def test_the_majority(votes: list[Choice], expected: Choice) -> None:
    assert majority(votes) is expected
    assert majority([vote.flipped for vote in votes]) is expected.flipped


def test_the_verdicts_are_the_raters_whatever_order_they_saw(store: JudgmentStore) -> None:
    with Raters(store, ann=shorter) as raters:
        assert ask(HumanJudge(store, 0.01)) == [F, S, F, S]
    assert {first[0] for _, first, _ in raters.seen} <= {"a", "b"}
    assert store.tuner()["state"] == "generating"


def test_several_raters_decide_by_majority(tmp_path: Path) -> None:
    with JudgmentStore(tmp_path / "store", votes_per_pair=3, repeat_share=0.0) as store:
        opinions = {"ann": shorter, "bob": shorter, "cid": lambda first, second: shorter(first, second).flipped}
        with Raters(store, **opinions):
            assert ask(HumanJudge(store, 0.01)) == [F, S, F, S]
        assert len(store.showings()) >= 12


def test_a_question_asked_again_gets_the_verdicts_that_were_given(store: JudgmentStore) -> None:
    with Raters(store, ann=shorter):
        before = ask(HumanJudge(store, 0.01))
    assert ask(HumanJudge(store, 0.01)) == before  # nobody is there, and nobody is needed
    assert store.probes_written() == 1


def test_a_run_that_was_stopped_while_it_waited_goes_on(store: JudgmentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ann = store.rater("ann")

    def interrupted(_: float) -> None:
        showing = store.next_pair(ann)
        assert showing is not None
        store.vote(showing.id, ann, shorter(showing.first, showing.second))
        assert store.tuner()["state"] == "waiting"
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("zorl.rewards.human.time.sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(HumanJudge(store))
    with Raters(store, ann=shorter) as raters:
        assert ask(HumanJudge(store, 0.01)) == [F, S, F, S]
    assert len(raters.seen) == 3


def test_a_question_that_nobody_waits_for_is_withdrawn(store: JudgmentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_run(_: float) -> None:
        monkeypatch.undo()
        with Raters(store, ann=shorter) as raters:
            assert ask(HumanJudge(store, 0.01), "2", n=2) == [F, S]
        assert len(raters.seen) >= 2

    monkeypatch.setattr("zorl.rewards.human.time.sleep", other_run)
    with pytest.raises(ValueError, match="were withdrawn: another run asks in the same store"):
        ask(HumanJudge(store), "1")


def test_conversations_are_stored_as_json(store: JudgmentStore) -> None:
    prompt, one, other = ([{"role": "user", "content": text}] for text in ("Grüße?", "yes", "no"))
    with Raters(store, ann=lambda first, second: F if "yes" in first else S) as raters:
        assert HumanJudge(store, 0.01)(prompts=[prompt], first=[other], second=[one], request_id="1") == [S]
    assert raters.seen[0][0] == '[{"role": "user", "content": "Grüße?"}]'


def test_a_judge_that_rests_says_so_unless_the_store_is_another_run_s(
    store: JudgmentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.set_tuner("unconnected", "start one")
    judge = HumanJudge(store, 0.01)
    judge.rest()
    assert store.tuner()["state"] == "unconnected", "it has not asked anything"
    with Raters(store, ann=shorter):
        ask(judge)
    judge.rest()
    assert store.tuner()["state"] == "stopped"

    def withdrawn(_: float) -> None:
        store.withdraw(store.open_probes()[0].id)

    monkeypatch.setattr("zorl.rewards.human.time.sleep", withdrawn)
    with pytest.raises(ValueError, match="another run asks in the same store"):
        ask(judge, "2")
    store.set_tuner("generating", "the other's")
    judge.rest()
    assert store.tuner()["state"] == "generating"


def test_a_judge_opens_a_store_by_its_path(tmp_path: Path) -> None:
    judge = HumanJudge(tmp_path / "judgments.sqlite")
    assert judge.store.settings.votes_per_pair == 1
    judge.store.close()
    for seconds in (0, 1.5):
        with pytest.raises(ValueError, match="poll_seconds must lie in"):
            HumanJudge(tmp_path / "judgments.sqlite", seconds)


def test_a_trainer_follows_people_and_resumes_with_their_verdicts(
    store: JudgmentStore, parts: Callable[[str], Any], tmp_path: Path
) -> None:
    part = parts("gpt2")
    part.model.save_pretrained(tmp_path / "model")
    part.tokenizer.save_pretrained(tmp_path / "model")

    def trainer(steps: int, judge: Callable[..., Sequence[Choice]], out: str = "out") -> MeZOTrainer:
        return MeZOTrainer(
            str(tmp_path / "model"),
            judge=judge,
            prompt=Prompt("{text}"),
            train_dataset=[{"text": f"the film number {i} was"} for i in range(6)],
            args=MeZOConfig(
                output_dir=str(tmp_path / out), max_steps=steps, per_device_train_batch_size=3, epsilon="1e-2",
                max_completion_length=4, use_cpu=True, report_to="none", learning_rate=1e-3, seed=3,
                lr_scheduler_type="constant",
            ),
        )  # fmt: skip

    with Raters(store, ann=shorter) as raters:
        first = trainer(2, HumanJudge(store, 0.01))
        first.train()
        assert (store.tuner()["state"], store.tuner()["message"][:18]) == ("stopped", "The run that asks ")
        resumed = trainer(4, HumanJudge(store, 0.01))
        resumed.train(resume_from_checkpoint=True)
    assert raters.seen
    # The same raters as a function tune to the same bits: order and store leave no trace.
    plain = trainer(4, lambda first, second, **_: [shorter(a, b) for a, b in zip(first, second, strict=True)], "plain")
    plain.train()
    assert resumed.tuned.sha256() == plain.tuned.sha256()
