"""The judgment store: the record of all human work, and the only place where a tuner and a page meet.

A pair is stored before it is shown, a verdict is durable before it is acknowledged, and every action is one transaction: either
process may be killed at any moment, and no verdict is lost or used twice. The row of a step is its commit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from zorl.rewards.judgment_database import JudgmentDatabase, StoreSettings
from zorl.rewards.judgment_raters import RatersSide
from zorl.rewards.judgment_records import (
    AUTOMATIC,
    AlreadyClosed,
    ComparisonVote,
    EventRecord,
    JudgedPair,
    NewPair,
    Progress,
    Showing,
    ShowingRecord,
    StoredProbe,
    StoredStep,
    Vote,
)
from zorl.rewards.judgment_requests import Requests
from zorl.rewards.judgment_tuning import TunersSide

__all__ = [
    "AUTOMATIC",
    "AlreadyClosed",
    "ComparisonVote",
    "EventRecord",
    "JudgedPair",
    "JudgmentStore",
    "NewPair",
    "Progress",
    "Showing",
    "ShowingRecord",
    "StoreSettings",
    "StoredProbe",
    "StoredStep",
    "Vote",
]


class JudgmentStore(RatersSide, TunersSide, Requests):
    """Pairs to judge and the verdicts on them, in a database. Threads may share one object; each process opens its own.

    The settings are saved when the store is created. To open it again, leave them out or give the same ones.

    Args:
        url_or_path: an SQLite file, created if it is not there, or the URL of an empty PostgreSQL database or of one that holds a
            store, postgresql://user:password@host/name; `pip install 'psycopg[binary]'` brings the driver.
        votes_per_pair: votes that a pair needs, each from a different rater; 1 by default.
        lease_seconds: how long a shown pair is reserved for its rater; 120 by default.
        repeat_share: the share of showings that repeat, in the other order, a pair the rater has judged; 0.05 by default.
            Their votes tell how consistent the rater is, and count for nothing else.
        comparison_share: the share of showings that compare the current model with the starting one; 0.1 by default.
        clock: seconds since 1970.

    Every method raises ConnectionError if the database does not answer.

    Raises:
        ValueError: a setting is out of range or contradicts the store's; the database cannot be opened or written, is not
            a judgment store, or has another version.
    """

    def __init__(
        self,
        url_or_path: str | Path,
        *,
        votes_per_pair: int | None = None,
        lease_seconds: float | None = None,
        repeat_share: float | None = None,
        comparison_share: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        wished = {
            "votes_per_pair": votes_per_pair,
            "lease_seconds": lease_seconds,
            "repeat_share": repeat_share,
            "comparison_share": comparison_share,
        }
        super().__init__(JudgmentDatabase(url_or_path, wished, clock))

    @property
    def settings(self) -> StoreSettings:
        """The settings that the store was created with."""
        return self._database.settings

    def close(self) -> None:
        """Closes the database's connections. Nothing is lost without it."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
