"""Where a judgment store is: an SQLite file, or a database on a PostgreSQL server.

A password may be part of a URL; it is in nothing that is made here to be shown or saved.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError

_SECRETS = ("password", "sslpassword")  # that libpq takes in the query of a URL


def store_url(where: str | Path) -> URL:
    """What SQLAlchemy opens: SQLite for a file, psycopg for a URL of PostgreSQL.

    Raises:
        ValueError: it is not a URL of either, or a file that cannot be there.
    """
    if isinstance(where, str) and "://" in where:
        url = _parsed(where)
        if url.get_backend_name() in ("postgresql", "postgres"):
            return url.set(drivername="postgresql+psycopg")
        if url.get_backend_name() != "sqlite":
            raise ValueError(f"cannot open '{shown(url)}': judgments are kept in an SQLite file or on PostgreSQL")
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


def shown(url: URL) -> str:
    """A store's name in messages: its file, or its URL without password and options."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    plain = url.set(drivername=url.get_backend_name()).difference_update_query(url.query)
    return plain.render_as_string(hide_password=True)


def split_password(database: str) -> tuple[str, str | None]:
    """The URL of a PostgreSQL database without its password, which can be saved, and the password.

    Raises:
        ValueError: it is no such URL, or carries the password of a key.
    """
    url = store_url(database) if "://" in database else None
    if url is None or url.get_backend_name() != "postgresql":
        raise ValueError(
            "--database takes the URL of a PostgreSQL database, postgresql://user@host/name; without it the judgments are "
            "kept in the run's folder"
        )
    if "sslpassword" in url.query:
        raise ValueError("--database: leave sslpassword out of the URL, which is kept in the run's folder")
    password = url.password if url.password is not None else url.query.get("password")
    clean = URL.create(
        "postgresql",
        username=url.username,
        host=url.host,
        port=url.port,
        database=url.database,
        query={name: value for name, value in url.query.items() if name not in _SECRETS},
    )
    return clean.render_as_string(hide_password=False), None if password is None else str(password)


def _parsed(text: str) -> URL:
    # What cannot be read as a URL may hold a password anywhere, so nothing of it is repeated.
    wrong = "that is not the URL of a database, such as postgresql://user:password@host/name"
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):  # ValueError: a port that is no number
        raise ValueError(wrong) from None
    if "@" in (url.host or ""):
        raise ValueError(f"{wrong}; in a password @ is written %40")
    return url
