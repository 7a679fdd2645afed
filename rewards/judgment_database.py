"""Opening a judgment store's database, and its transactions: short, durable when they end, one writer at a time.

SQLite runs in WAL mode with full synchronisation, and a writer begins with BEGIN IMMEDIATE: a transaction that first reads and
then writes can neither fail half-way nor wait for another that waits for it. Other databases get the same order of
writers from a lock on one row.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, insert, inspect, make_url, select, update
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from zorl.rewards.judgment_tables import SCHEMA, meta, metadata

_WAIT = 30.0  # seconds that a writer waits for the others; each takes milliseconds


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Kept in the store when it is made, so that all processes follow the same.

    Attributes:
        votes_per_pair: that a pair needs, each of another rater.
        lease_seconds: for which a shown pair is kept for its rater.
        repeat_share: of showings that repeat a pair the rater has judged, in the other order.
        comparison_share: of showings that compare the current model with the starting one.

    Raises:
        ValueError: a value is out of range.
    """

    votes_per_pair: int = 1
    lease_seconds: float = 120.0
    repeat_share: float = 0.05
    comparison_share: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.votes_per_pair, bool) or not isinstance(self.votes_per_pair, int) or self.votes_per_pair < 1:
            raise ValueError(f"votes_per_pair must be a whole number from 1 on, got {self.votes_per_pair!r}")
        if not 0 < self.lease_seconds < float("inf"):
            raise ValueError(f"lease_seconds must be positive, got {self.lease_seconds!r}")
        for name in ("repeat_share", "comparison_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)!r}")


class JudgmentDatabase:
    """A database that holds a judgment store; an empty one becomes a store.

    Args:
        where: a file, or a URL such as postgresql+psycopg://…
        wished: settings that must hold; those that are None are as stored, or the default in a new store.
        clock: seconds since 1970.

    Raises:
        ValueError: it cannot be opened or written, is no judgment store, has another schema, or has other settings.
    """

    def __init__(self, where: str | Path, wished: dict[str, Any], clock: Callable[[], float]) -> None:
        url = _url(where)
        self.name = url.database if url.drivername.startswith("sqlite") else url.render_as_string()
        self.clock = clock
        self._turn = threading.Lock()  # threads queue up here: in SQLite's own queue they would poll
        self._engine = _engine(url)
        try:
            self.settings = self._opened(wished)
        except BaseException:
            self._engine.dispose()
            raise

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the store."""
        with self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """The one transaction that may write. It is durable when the block ends, and undone if the block raises."""
        with self._turn, self._engine.connect().execution_options(immediate=True) as connection, connection.begin():
            # BEGIN IMMEDIATE is SQLite's lock; this is that of databases with locks on rows, and nothing on SQLite.
            connection.execute(select(meta.c.name).where(meta.c.name == "schema").with_for_update())
            yield connection

    def _opened(self, wished: dict[str, Any]) -> StoreSettings:
        """The settings of the store, which is made if it is not there."""
        wished = {name: value for name, value in wished.items() if value is not None}
        chosen = StoreSettings(**wished)
        try:
            with self._engine.connect().execution_options(immediate=True) as connection, connection.begin():
                tables = inspect(connection).get_table_names()
                if not tables:
                    metadata.create_all(connection)
                    values = {"schema": SCHEMA, "settings": asdict(chosen)}
                    connection.execute(
                        insert(meta), [{"name": name, "value": json.dumps(value)} for name, value in values.items()]
                    )
                    return chosen
                stored = self._stored(connection, tables, wished)
                # Fails here, and not at the first verdict, where nothing can be written.
                connection.execute(update(meta).where(meta.c.name == "schema").values(value=json.dumps(SCHEMA)))
                return stored
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise ValueError(_refusal(self.name, error)) from error

    def _stored(self, connection: Connection, tables: list[str], wished: dict[str, Any]) -> StoreSettings:
        found: dict[str, str] = {}
        if {"meta", "showings"} <= {*tables}:
            found = {row.name: row.value for row in connection.execute(select(meta))}
        if not {"schema", "settings"} <= found.keys():
            raise ValueError(
                f"'{self.name}' is no judgment store: it is a database with the tables {', '.join(sorted(tables)[:5])}"
            )
        if (schema := json.loads(found["schema"])) != SCHEMA:
            raise ValueError(
                f"'{self.name}' was written by another version of zorl: its schema is {schema}, and this version reads "
                f"{SCHEMA}; open it with the version that made it, or choose another file"
            )
        stored = StoreSettings(**json.loads(found["settings"]))
        for f in fields(stored):
            kept = getattr(stored, f.name)
            if f.name in wished and wished[f.name] != kept:
                raise ValueError(
                    f"'{self.name}' was made with {f.name}={kept}, and {f.name}={wished[f.name]} was asked for; leave it "
                    f"out, or choose another file"
                )
        return stored


def _url(where: str | Path) -> URL:
    """A database's URL.

    Raises:
        ValueError: it is not one, or a file that cannot be there.
    """
    if isinstance(where, str) and "://" in where:
        try:
            url = make_url(where)
        except ArgumentError as error:
            raise ValueError(f"'{where}' is not the URL of a database: {error}") from error
        if not url.drivername.startswith("sqlite"):
            return url
    else:
        url = URL.create("sqlite", database=str(where))
    if url.database in (None, "", ":memory:"):
        raise ValueError("a judgment store needs a file: two processes meet in it, and none of it may get lost")
    if str(url.database).startswith("file:"):  # SQLite's own notation, with options
        return url
    path = Path(str(url.database))
    if path.is_dir():
        raise ValueError(f"'{path}' is a folder; a judgment store is a file, such as {path / 'judgments.sqlite'}")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder '{path.parent}' to keep the judgment store '{path.name}' in")
    return url


def _engine(url: URL) -> Engine:
    """Connections that behave as this file promises."""
    try:
        if not url.drivername.startswith("sqlite"):
            return create_engine(url, pool_pre_ping=True)
        engine = create_engine(url, pool_size=8, max_overflow=64, connect_args={"timeout": _WAIT})
    except (ImportError, SQLAlchemyError) as error:  # ImportError: the driver that the URL names
        raise ValueError(f"cannot open '{url.render_as_string()}': {error}") from error

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself
        _in_wal_mode(connection)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(
            "BEGIN IMMEDIATE" if connection.get_execution_options().get("immediate") else "BEGIN"
        )

    return engine


def _in_wal_mode(connection: Any) -> None:
    """Switches a new file to WAL. SQLite does not wait here for others that do the same, so this does."""
    deadline = time.monotonic() + _WAIT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _refusal(name: str | None, error: Exception) -> str:
    reason = str(getattr(error, "orig", None) or error)
    if "not a database" in reason:
        return f"'{name}' is no judgment store: it is not an SQLite file"
    if "readonly" in reason or "unable to open" in reason:
        return f"cannot write the judgment store '{name}': {reason}; check the rights of the file and of its folder"
    if "malformed" in reason:
        return f"the judgment store '{name}' is damaged: {reason}"
    return f"cannot open the judgment store '{name}': {reason}"
