"""Preferences and the raw log as files: TRL loads the one, and everything is in the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from zorl.probe import Choice
from zorl.rewards.judgment_store import JudgmentStore, NewPair, Showing
from zorl.rewards.preferences import Written, write_events, write_preferences

PLUS, MINUS = "plus", "minus"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JudgmentStore]:
    with JudgmentStore(tmp_path / "store", votes_per_pair=3, repeat_share=0.0, comparison_share=0.0) as opened:
        yield opened


def judge(store: JudgmentStore, says: Callable[[str, Showing], Choice]) -> None:
    """All raters judge all there is."""
    for name in ("ann", "bob", "cid"):
        rater = store.rater(name)
        while (showing := store.next_pair(rater)) is not None:
            store.vote(showing.id, rater, says(name, showing))


def likes(showing: Showing, side: str) -> Choice:
    return Choice.FIRST if side in showing.first else Choice.SECOND


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_majority_is_written_and_the_rest_is_counted(store: JudgmentStore, tmp_path: Path) -> None:
    prompts = ["all plus", "all minus", "two to one", "draw", "tie", "silent"]
    store.add_probe([NewPair(0, i, prompt, f"{PLUS} ü", f"{MINUS}\n2") for i, prompt in enumerate(prompts)], key="a")
    store.add_probe([NewPair(0, 0, "identical", "same", "same")], key="b")
    store.add_comparisons([NewPair(0, 0, "compared", PLUS, MINUS)], step=1)

    def says(name: str, showing: Showing) -> Choice:
        if showing.prompt in ("all minus", "compared"):
            return likes(showing, MINUS)
        if showing.prompt == "two to one":
            return likes(showing, MINUS if name == "bob" else PLUS)
        if showing.prompt == "draw":
            return {"ann": likes(showing, PLUS), "bob": likes(showing, MINUS)}.get(name, Choice.ABSTAIN)
        return {"tie": Choice.BOTH_BAD, "silent": Choice.ABSTAIN}.get(showing.prompt, likes(showing, PLUS))

    judge(store, says)
    path = tmp_path / "preferences.jsonl"
    assert write_preferences(store, path) == Written(preferences=3, ties=2, abstained=1)
    plus, minus = f"{PLUS} ü", f"{MINUS}\n2"
    assert read(path) == [
        {"prompt": "all plus", "chosen": plus, "rejected": minus},
        {"prompt": "all minus", "chosen": minus, "rejected": plus},
        {"prompt": "two to one", "chosen": plus, "rejected": minus},
    ], "a comparison measures the model, and is nothing to learn from"
    assert not path.with_name("preferences.jsonl.new").exists()


def test_conversations_come_back_as_messages_and_json_text_stays_text(store: JudgmentStore, tmp_path: Path) -> None:
    def talk(role: str, text: str) -> str:
        return json.dumps([{"role": role, "content": text}])

    pairs = [
        NewPair(0, 0, talk("user", "hi"), talk("assistant", PLUS), talk("assistant", MINUS)),
        NewPair(0, 1, talk("user", "hi"), PLUS, MINUS),
        NewPair(0, 2, "[1, 2", f"[{PLUS}", f"[{MINUS}]"),
    ]
    store.add_probe(pairs, key="a")
    judge(store, lambda _, showing: likes(showing, PLUS))
    write_preferences(store, tmp_path / "p.jsonl")
    chat, text, brackets = read(tmp_path / "p.jsonl")
    assert chat["chosen"] == [{"role": "assistant", "content": PLUS}]
    assert chat["prompt"] == [{"role": "user", "content": "hi"}]
    assert text["prompt"] == talk("user", "hi")
    assert brackets["rejected"] == f"[{MINUS}]"


def test_trl_recognises_the_file_as_preferences(store: JudgmentStore, tmp_path: Path) -> None:
    from datasets import load_dataset
    from trl.data_utils import is_conversational

    store.add_probe([NewPair(0, i, f"prompt {i}", PLUS, MINUS) for i in range(3)], key="a")
    judge(store, lambda _, showing: likes(showing, PLUS))
    write_preferences(store, tmp_path / "p.jsonl")
    dataset = load_dataset(
        "json", data_files=str(tmp_path / "p.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert dataset.column_names == ["prompt", "chosen", "rejected"]
    assert not is_conversational(dataset[0])


def test_the_raw_log_has_everything_in_order(store: JudgmentStore, tmp_path: Path) -> None:
    probe = store.add_probe([NewPair(0, 0, "p", PLUS, MINUS)], key="a")
    ann = store.rater("ann")
    showing = store.next_pair(ann)
    assert showing is not None
    store.vote(showing.id, ann, Choice.TIE)
    store.undo(ann)
    store.withdraw(probe.id)
    with pytest.raises(ValueError, match="already closed"):
        store.vote(showing.id, ann, Choice.FIRST)
    assert write_events(store, tmp_path / "log.jsonl") == 6
    rows = read(tmp_path / "log.jsonl")
    assert [row["action"] for row in rows] == ["asked", "shown", "vote", "undo", "withdrawn", "late"]
    assert [row["choice"] for row in rows] == [None, None, "tie", "tie", None, "first"]
    assert {row["rater"] for row in rows} == {None, "ann"}
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
