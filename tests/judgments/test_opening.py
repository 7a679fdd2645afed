"""Opening a store: its settings, and what is not one."""

from __future__ import annotations

import math
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from zorl.rewards.judgment_store import JudgmentStore


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
