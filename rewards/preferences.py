"""Judgments as JSON Lines files: preferences that TRL trains on, and the raw log."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zorl.probe import Choice
from zorl.rewards.judgment_tables import COMPARISON
from zorl.rewards.majority import majority
from zorl.whole_files import whole_file

if TYPE_CHECKING:
    from zorl.rewards.judgment_store import JudgmentStore


@dataclass(frozen=True, slots=True)
class Written:
    """The number of judged pairs by outcome.

    Attributes:
        preferences: written.
        ties: dropped, because neither answer has a majority.
        abstained: dropped, because nobody has an opinion.
    """

    preferences: int
    ties: int
    abstained: int


def write_preferences(store: JudgmentStore, path: str | Path) -> Written:
    """Writes the majority's preference on every judged pair, as TRL's `DPOTrainer` reads it: prompt, chosen, rejected.

    Comparisons with the starting model are left out: they measure, and their prompts may be held out from training. Text is
    written as text, a conversation as a list of messages.
    """
    rows = []
    ties = abstained = 0
    for pair in store.preference_pairs():
        if pair.kind == COMPARISON:
            continue
        opinion = majority(vote.choice for vote in pair.votes)
        if opinion is Choice.FIRST or opinion is Choice.SECOND:
            chosen, rejected = (pair.plus, pair.minus) if opinion is Choice.FIRST else (pair.minus, pair.plus)
            rows.append(_row(pair.prompt, chosen, rejected))
        elif opinion is Choice.ABSTAIN:
            abstained += 1
        else:
            ties += 1
    _write(Path(path), rows)
    return Written(len(rows), ties, abstained)


def write_events(store: JudgmentStore, path: str | Path) -> int:
    """Writes the raw log, one event per line and in order, and returns the number of events."""
    rows = [asdict(event) for event in store.events()]
    _write(Path(path), rows)
    return len(rows)


def _row(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    messages = {name: _messages(value) for name, value in row.items()}
    # The answers to a conversation are conversations too; a single text that looks like JSON remains a text.
    return row if None in messages.values() else messages


def _messages(value: str) -> list[dict[str, str]] | None:
    """The conversation that a text holds as JSON; None if it does not hold one."""
    if not value.startswith("["):
        return None
    try:
        found = json.loads(value)
    except json.JSONDecodeError:
        return None
    fits = bool(found) and all(isinstance(item, Mapping) and {"role", "content"} <= item.keys() for item in found)
    return found if fits else None


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object per line; the file is complete or not there at all."""
    with whole_file(path) as new, new.open("w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
