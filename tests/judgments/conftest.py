"""The judgment store, on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stored_judgments import Clock, Open

from zorl.rewards.judgment_store import JudgmentStore


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
