"""A judgment store's database and its transactions: short, durable once they end, one writer at a time.

Writers queue up before their first statement, so a transaction that reads and then writes can neither fail half-way nor
deadlock. In SQLite (WAL mode, full synchronisation) BEGIN IMMEDIATE does this; in PostgreSQL an advisory lock does, which a
transaction releases however it ends.
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

from sqlalchemy import Connection, Engine, create_engine, event, func, insert, inspect, select, update
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from zorl.rewards.judgment_tables import SCHEMA, meta, metadata
from zorl.rewards.judgment_url import shown, store_url

_WAIT = 30.0  # seconds that a writer waits for the others; each takes milliseconds
_WRITERS_LOCK, _TUNERS_LOCK = (
    0x7A6F726C,
    0x7A6F726D,
)  # the numbers of PostgreSQL's advisory locks: "zorl" and the next one
_OF_A_CONNECTION = (  # settings of PostgreSQL
    "SET default_transaction_isolation = 'read committed'",
    "SET synchronous_commit = on",  # a server may be configured to acknowledge what is not yet on disk
    f"SET lock_timeout = '{_WAIT:.0f}s'",
    # A machine that has disappeared would keep its locks until TCP notices, which takes hours by default.
    f"SET idle_in_transaction_session_timeout = '{_WAIT / 3:.0f}s'",
    "SET tcp_keepalives_idle = 30",
    "SET tcp_keepalives_interval = 10",
    "SET tcp_keepalives_count = 3",
)


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Settings that are saved when the store is created, so that all processes follow the same ones.

    Attributes:
        votes_per_pair: votes that a pair needs, each from a different rater.
        lease_seconds: how long a shown pair is reserved for its rater.
        repeat_share: the share of showings that repeat a pair the rater has judged, in the other order.
        comparison_share: the share of showings that compare the current model with the starting one.

    Raises:
        ValueError: a value is out of range.
    """

    votes_per_pair: int = 1
    lease_seconds: float = 120.0
    repeat_share: float = 0.05
    comparison_share: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.votes_per_pair, bool) or not isinstance(self.votes_per_pair, int) or self.votes_per_pair < 1:
            raise ValueError(f"votes_per_pair must be a whole number of at least 1, got {self.votes_per_pair!r}")
        if not 0 < self.lease_seconds < float("inf"):
            raise ValueError(f"lease_seconds must be positive, got {self.lease_seconds!r}")
        for name in ("repeat_share", "comparison_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)!r}")


class JudgmentDatabase:
    """A database that holds a judgment store; an empty one becomes a store.

    Args:
        where: an SQLite file, or a URL such as postgresql://user:password@host/name.
        wished: settings that must hold; None accepts the stored value, or the default in a new store.
        clock: seconds since 1970.

    Raises:
        ValueError: it cannot be opened or written, is not a judgment store, has another schema, or has other settings.
    """

    def __init__(self, where: str | Path, wished: dict[str, Any], clock: Callable[[], float]) -> None:
        url = store_url(where)
        self.name = shown(url)
        self.clock = clock
        # PostgreSQL's session with the right to make steps, and its number.
        self._claim: tuple[Connection, Any] | None = None
        self._turn = threading.Lock()  # threads queue up here, because in SQLite's own queue they would poll
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
        """A transaction that sees one state of the store.

        Raises:
            ConnectionError: the database does not answer.
        """
        with self._answering(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """The only transaction that may write. It is durable when the block ends, and undone if the block raises.

        Raises:
            ConnectionError: the database does not answer. If this happens as the block ends, the block may have taken effect.
        """
        with self._answering(), self._turn, self._writer() as connection:
            yield connection

    @contextmanager
    def tuning(self) -> Iterator[None]:
        """Lets only this process make steps within the block. For a store in a file, the claim on the run's folder is enough.

        Raises:
            ConnectionError: the database does not answer.
            ValueError: another process makes steps.
        """
        if self._engine.dialect.name == "sqlite":
            yield
            return
        with self._answering(), self._engine.connect() as connection:
            with connection.begin():
                free = connection.scalar(select(func.pg_try_advisory_lock(_TUNERS_LOCK)))
            if not free:
                raise ValueError(
                    f"another process is making the steps of the judgment store {self.name!r}; stop it first"
                )
            with connection.begin():
                self._claim = connection, connection.scalar(select(func.pg_backend_pid()))
            try:
                yield
            finally:
                self._claim = None
                connection.invalidate()  # the lock belongs to the session, and ends with it

    def check_claim(self) -> None:
        """Checks that a process within `tuning` still holds its claim, which ends with its connection to the server.

        Raises:
            ConnectionError: the claim is gone. Another process may be making the steps by now.
        """
        if self._claim is None:
            return
        connection, session = self._claim
        with self._answering(), connection.begin():
            if connection.scalar(select(func.pg_backend_pid())) != session:  # the driver has opened another
                raise ConnectionError(f"the judgment store {self.name!r} has ended this process's right to make steps")

    @contextmanager
    def _writer(self) -> Iterator[Connection]:
        with self._engine.connect().execution_options(immediate=True) as connection, connection.begin():
            yield connection

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except OperationalError as error:
            raise ConnectionError(f"the judgment store {self.name!r} does not answer: {_reason(error)}") from error

    def _opened(self, wished: dict[str, Any]) -> StoreSettings:
        """The settings of the store, which is created if it is not there."""
        wished = {name: value for name, value in wished.items() if value is not None}
        chosen = StoreSettings(**wished)
        try:
            with self._writer() as connection:
                tables = inspect(connection).get_table_names()
                if not tables:
                    metadata.create_all(connection)
                    values = {"schema": SCHEMA, "settings": asdict(chosen)}
                    connection.execute(
                        insert(meta), [{"name": name, "value": json.dumps(value)} for name, value in values.items()]
                    )
                    return chosen
                stored = self._stored(connection, tables, wished)
                # If nothing can be written, it fails here and not at the first verdict.
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
                f"{self.name!r} is not a judgment store: it is a database with the tables {', '.join(sorted(tables)[:5])}"
            )
        if (schema := json.loads(found["schema"])) != SCHEMA:
            raise ValueError(
                f"{self.name!r} was written by another version of zorl: its schema is {schema}, and this version reads "
                f"{SCHEMA}; open it with the version that made it, or choose another store"
            )
        stored = StoreSettings(**json.loads(found["settings"]))
        for f in fields(stored):
            kept = getattr(stored, f.name)
            if f.name in wished and wished[f.name] != kept:
                raise ValueError(
                    f"{self.name!r} was made with {f.name}={kept}, and {f.name}={wished[f.name]} was asked for; leave it "
                    f"out, or choose another store"
                )
        return stored


def _engine(url: URL) -> Engine:
    """An engine whose connections behave as this file promises."""
    if url.get_backend_name() == "sqlite":
        return _sqlite(url)
    try:
        return _postgresql(url)
    except ImportError as error:
        raise ValueError(
            f"cannot open {shown(url)!r}: PostgreSQL needs the driver psycopg; pip install 'psycopg[binary]'"
        ) from error


def _sqlite(url: URL) -> Engine:
    engine = create_engine(url, pool_size=8, max_overflow=64, connect_args={"timeout": _WAIT})

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver begins no transaction by itself
        _in_wal_mode(connection)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if _writes(connection) else "BEGIN")

    return engine


def _postgresql(url: URL) -> Engine:
    patient = url.set(query={"connect_timeout": f"{_WAIT / 3:.0f}", **url.query})
    engine = create_engine(patient, pool_size=8, pool_pre_ping=True)

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        if (encoding := connection.info.parameter_status("server_encoding")) != "UTF8":
            connection.close()
            raise ValueError(
                f"cannot keep judgments in {shown(url)!r}: its encoding is {encoding}, and answers may hold any character; "
                "make it with createdb --encoding UTF8 --template template0"
            )
        for setting in _OF_A_CONNECTION:
            connection.execute(setting)
        connection.commit()  # otherwise they would be undone with the first transaction

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # At each statement a writer sees all that was committed before it, so all that its predecessors did; a snapshot
        # of its own would be older than its lock. A reader sees one snapshot.
        if _writes(connection):
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITERS_LOCK})")
        else:
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")

    return engine


def _writes(connection: Connection) -> bool:
    return bool(connection.get_execution_options().get("immediate"))


def _in_wal_mode(connection: Any) -> None:
    """Switches a new file to WAL. SQLite does not wait for others that do the same, so this does."""
    deadline = time.monotonic() + _WAIT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _refusal(name: str, error: Exception) -> str:
    reason = _reason(error)
    if "not a database" in reason:
        return f"{name!r} is not a judgment store: it is not an SQLite file"
    if "readonly" in reason or "unable to open" in reason:
        return (
            f"cannot write the judgment store {name!r}: {reason}; check the permissions of the file and of its folder"
        )
    if "malformed" in reason:
        return f"the judgment store {name!r} is damaged: {reason}"
    return f"cannot open the judgment store {name!r}: {reason}"


def _reason(error: Exception) -> str:
    """The driver's message, first line only: psycopg adds advice in further ones."""
    return " ".join(str(getattr(error, "orig", None) or error).split())
