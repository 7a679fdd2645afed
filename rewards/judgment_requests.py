"""What the page asks of the process that owns the model, and its answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import insert, select, update

from zorl.rewards.judgment_log import Readings, note
from zorl.rewards.judgment_tables import meta, requests

_BEGUN = "begun_request"  # the name of a row in `meta`


class Requests(Readings):
    """Requests, each answered once. Every method is one transaction."""

    def request(self, kind: str, payload: Mapping[str, Any]) -> int:
        """Sends a request to the process with the model, and returns an id for `request_result`."""
        with self._database.writing() as connection:
            made = connection.execute(
                insert(requests).values(
                    kind=kind, payload=json.dumps(dict(payload)), created=self._database.clock(), result=None
                )
            )
            assert made.inserted_primary_key is not None
            return int(made.inserted_primary_key[0])

    def pending_requests(self) -> list[tuple[int, str, dict[str, Any]]]:
        """The requests that wait for an answer as (id, kind, payload), oldest first."""
        query = select(requests).where(requests.c.answered_at.is_(None)).order_by(requests.c.id)
        with self._database.reading() as connection:
            return [(row.id, row.kind, json.loads(row.payload)) for row in connection.execute(query)]

    def begin_request(self, request: int) -> bool:
        """Notes that a request is being carried out. False if that was noted before: the process that did so has ended since."""
        with self._database.writing() as connection:
            value = connection.scalar(select(meta.c.value).where(meta.c.name == _BEGUN))
            note(connection, _BEGUN, request)
        return value is None or json.loads(value) != request

    def answer_request(self, request: int, result: Mapping[str, Any]) -> None:
        """Answers a request; a second answer changes nothing.

        Raises:
            ValueError: there is no such request.
        """
        with self._database.writing() as connection:
            if connection.scalar(select(requests.c.id).where(requests.c.id == request)) is None:
                raise ValueError(f"there is no request {request}")
            connection.execute(
                update(requests)
                .where(requests.c.id == request, requests.c.answered_at.is_(None))
                .values(result=json.dumps(dict(result)), answered_at=self._database.clock())
            )

    def request_result(self, request: int) -> dict[str, Any] | None:
        """The answer to a request; None until it is given.

        Raises:
            ValueError: there is no such request.
        """
        with self._database.reading() as connection:
            row = connection.execute(select(requests.c.result).where(requests.c.id == request)).first()
        if row is None:
            raise ValueError(f"there is no request {request}")
        return None if row.result is None else dict(json.loads(row.result))
