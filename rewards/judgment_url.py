"""The address of a judgment store: an SQLite file, or a database on a PostgreSQL server.

A URL may contain a password; nothing made here to be shown or saved does.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError

_SECRETS = ("password", "sslpassword")  # options that libpq takes in the query of a URL


def store_url(where: str | Path) -> URL:
    """The URL that SQLAlchemy opens: SQLite for a file, psycopg for PostgreSQL.

    Raises:
        ValueError: it is a URL of neither, or a file that cannot exist there.
    """
    if isinstance(where, str) and "://" in where:
        url = _parsed(where)
        if url.get_backend_name() in ("postgresql", "postgres"):
            return url.set(drivername="postgresql+psycopg")
        if url.get_backend_name() != "sqlite":
            raise ValueError(f"cannot open {shown(url)!r}: judgments are kept in an SQLite file or on PostgreSQL")
    else:
        url = URL.create("sqlite", database=str(where))
    if url.database in (None, "", ":memory:"):
        raise ValueError("a judgment store needs a file: two processes meet in it, and nothing may get lost")
    if str(url.database).startswith("file:"):  # SQLite's own notation, with options
        return url
    path = Path(str(url.database))
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; a judgment store is a file, such as {path / 'judgments.sqlite'}")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {str(path.parent)!r} to keep the judgment store {path.name!r} in")
    return url


def shown(url: URL) -> str:
    """A store's name in messages: its file, or its URL without password and options."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    plain = url.set(drivername=url.get_backend_name()).difference_update_query(url.query)
    return plain.render_as_string(hide_password=True)


def split_password(database: str) -> tuple[str, str | None]:
    """The URL of a PostgreSQL database without its password, fit to be saved; and the password.

    Raises:
        ValueError: it is not such a URL, or contains the password of a key.
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
    # What cannot be parsed as a URL may hold a password anywhere, so no part of it is repeated.
    wrong = "that is not the URL of a database, such as postgresql://user:password@host/name"
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):  # ValueError: the port is not a number
        raise ValueError(wrong) from None
    if "@" in (url.host or ""):
        raise ValueError(f"{wrong}; in a password @ is written %40")
    return url
