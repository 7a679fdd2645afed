"""The tuner's side of a judgment store: probes, their votes, and the steps that they lead to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from sqlalchemy import Connection, delete, exists, func, insert, select, update

from zorl.rewards.judgment_log import Readings, in_queue, log, note, votes_on_probe
from zorl.rewards.judgment_records import NewPair, StoredProbe, StoredStep, Vote
from zorl.rewards.judgment_tables import (
    APPLIED,
    CLOSED,
    COMPARISON,
    EXPIRED,
    LIVE,
    OPEN,
    PROBE,
    REWOUND,
    TIED,
    WITHDRAWN,
    meta,
    pairs,
    probes,
    showings,
    steps,
)

_ACCEPTED = "accepted_drift"  # the name of a row in `meta`


class TunersSide(Readings):
    """What the process that owns the model asks of the store. Every method is one transaction."""

    def tuning(self) -> AbstractContextManager[None]:
        """Lets only this process make steps within the block.

        Raises:
            ValueError: another process is making them when the block begins.
        """
        return self._database.tuning()

    def add_probe(
        self,
        pairs: Sequence[NewPair],
        *,
        key: str,
        step: int = 0,
        made_at: int = 0,
        epsilon: float = 0.0,
        seeds: Sequence[int] = (),
    ) -> StoredProbe:
        """Stores a probe's pairs; from then on they are shown. Identical answers tie at once.

        Args:
            key: names the probe. Adding a key again returns the probe that is there, whatever its state; the key of a probe that
                was withdrawn, expired or rewound is free again.

        Raises:
            ValueError: there are no pairs.
        """
        if not pairs:
            raise ValueError("a probe needs at least one pair to compare")
        self._database.check_claim()
        with self._database.writing() as connection:
            known = connection.execute(select(probes).where(probes.c.key == key, probes.c.state.in_(LIVE))).first()
            if known is not None:
                return _stored(known)
            made = connection.execute(
                insert(probes).values(
                    key=key,
                    step=step,
                    made_at=made_at,
                    epsilon=epsilon,
                    seeds=json.dumps(list(seeds)),
                    state=OPEN,
                    created=self._database.clock(),
                )
            )
            assert made.inserted_primary_key is not None
            probe = int(made.inserted_primary_key[0])
            self._add(connection, pairs, PROBE, probe, step)
            log(connection, self._database.clock(), "asked", probe=probe)
            return _stored(_row(connection, probe))

    def add_comparisons(self, pairs: Sequence[NewPair], *, step: int) -> None:
        """Stores comparisons of the current model (plus) with the starting one. Older ones that nobody saw are withdrawn."""
        with self._database.writing() as connection:
            _withdraw_comparisons(connection, unseen=True)
            self._add(connection, pairs, COMPARISON, None, step)

    def has_comparisons(self, step: int) -> bool:
        """Whether the latest comparison of this step is in force, judged or not."""
        mine = select(pairs.c.state).where(pairs.c.kind == COMPARISON, pairs.c.step == step)
        with self._database.reading() as connection:
            return connection.scalar(mine.order_by(pairs.c.id.desc()).limit(1)) in (OPEN, TIED)

    def comparisons_written(self) -> int:
        """How many comparisons have ever been stored, whatever their state."""
        with self._database.reading() as connection:
            return connection.scalar(select(func.count()).where(pairs.c.kind == COMPARISON)) or 0

    def probe(self, probe: int) -> StoredProbe:
        """A probe in its current state.

        Raises:
            ValueError: there is no such probe.
        """
        with self._database.reading() as connection:
            return _stored(_row(connection, probe))

    def open_probes(self) -> list[StoredProbe]:
        """The probes that are to become steps, in their order: open ones, and closed ones whose step is not committed."""
        query = select(probes).where(probes.c.state.in_((OPEN, CLOSED))).order_by(probes.c.step, probes.c.id)
        with self._database.reading() as connection:
            return [_stored(row) for row in connection.execute(query)]

    def probes_written(self) -> int:
        """How many probes have ever been stored, whatever their state."""
        with self._database.reading() as connection:
            return connection.scalar(select(func.count()).select_from(probes)) or 0

    def decided(self, probe: int) -> bool:
        """Whether every pair that can be shown has its votes; true of a closed probe, false of a withdrawn one.

        Raises:
            ValueError: there is no such probe.
        """
        with self._database.reading() as connection:
            return self._decided(connection, _row(connection, probe))

    def close_decided(self, probe: int) -> list[Vote] | None:
        """Closes a probe that is decided, and returns its votes; None while it is not decided.

        It is one transaction: a rater who takes a vote back comes either before it, or too late.

        Raises:
            ValueError: as for `close_probe`.
        """
        with self._database.writing() as connection:
            row = _row(connection, probe)
            if row.state == OPEN and not self._decided(connection, row):
                return None
            return self._close(connection, row)

    def close_probe(self, probe: int) -> list[Vote]:
        """Closes a probe to further votes, and returns those it has: the same ones on every call.

        Raises:
            ValueError: it was withdrawn, expired or rewound, or there is no such probe.
        """
        with self._database.writing() as connection:
            return self._close(connection, _row(connection, probe))

    def withdraw(self, probe: int) -> None:
        """Withdraws a probe, which counts as expired if anybody has voted on it. Calling it again changes nothing.

        Raises:
            ValueError: its step is committed, or there is no such probe.
        """
        with self._database.writing() as connection:
            row = _row(connection, probe)
            if row.state in (APPLIED, REWOUND):
                raise ValueError(f"probe {probe} cannot be withdrawn: its step is committed")
            self._withdraw(connection, row)

    def commit_step(self, step: StoredStep) -> None:
        """Records a step and marks its probe as applied, both or neither. This is what commits the step.

        The step of a probe that was withdrawn or has expired may be recorded as well: it consists of abstentions.

        Raises:
            ValueError: the step is there already or does not follow the last one, or its probe is still open or has already made
                another step.
            ConnectionError: this process may no longer make steps (see `tuning`).
        """
        self._database.check_claim()
        with self._database.writing() as connection:
            last = connection.scalar(select(func.max(steps.c.step)).where(~steps.c.rewound))
            if last is not None and step.step <= last:
                raise ValueError(f"step {step.step} cannot be committed: the store has steps up to {last}")
            state = _row(connection, step.probe).state
            if state == OPEN:
                raise ValueError(f"step {step.step} cannot be committed: close its probe {step.probe} first")
            taken = exists().where(steps.c.probe == step.probe, ~steps.c.rewound)
            if state in (APPLIED, REWOUND) or connection.scalar(select(taken)):
                raise ValueError(
                    f"step {step.step} cannot be committed: its probe {step.probe} has already made a step"
                )
            connection.execute(
                insert(steps).values(
                    step=step.step,
                    probe=step.probe,
                    epsilon=step.epsilon,
                    seeds=json.dumps(step.seeds),
                    projected=json.dumps(step.projected),
                    coefficients=json.dumps(step.coefficients),
                    replayed=json.dumps(step.replayed),
                    figures=json.dumps(step.figures),
                    created=self._database.clock(),
                    rewound=False,
                )
            )
            log(connection, self._database.clock(), "committed", probe=step.probe)
            if state == CLOSED:
                connection.execute(update(probes).where(probes.c.id == step.probe).values(state=APPLIED))

    def rewind(self, step: int) -> None:
        """Goes back to θ after `step` steps: those numbered `step` (from 0) and later are no longer in force.

        Whatever waits for votes is withdrawn, because it was asked about a model that is gone. Comparisons of the undone steps
        no longer count, and neither does a drift that was accepted.
        """
        with self._database.writing() as connection:
            for row in connection.execute(
                select(steps.c.id, steps.c.probe, probes.c.state)
                .join_from(steps, probes)
                .where(steps.c.step >= step, ~steps.c.rewound)
                .order_by(steps.c.step)
            ).all():
                connection.execute(update(steps).where(steps.c.id == row.id).values(rewound=True))
                if row.state == APPLIED:
                    self._end(connection, row.probe, REWOUND)
            for row in connection.execute(select(probes).where(probes.c.state.in_((OPEN, CLOSED)))).all():
                self._withdraw(connection, row)
            undone = update(pairs).where(pairs.c.kind == COMPARISON, pairs.c.step > step)
            connection.execute(undone.values(state=REWOUND))
            _withdraw_comparisons(connection, unseen=False)
            connection.execute(delete(meta).where(meta.c.name == _ACCEPTED))

    def add_figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds figures to a step in force; a name that is there already gets the new number.

        Raises:
            ValueError: there is no such step.
        """
        with self._database.writing() as connection:
            row = connection.execute(
                select(steps.c.id, steps.c.figures).where(steps.c.step == step, ~steps.c.rewound)
            ).first()
            if row is None:
                raise ValueError(f"there is no step {step} in force")
            merged = json.loads(row.figures) | dict(figures)
            connection.execute(update(steps).where(steps.c.id == row.id).values(figures=json.dumps(merged)))

    def set_tuner(self, state: str, message: str = "") -> None:
        """Reports what the tuner is doing, for the page. The same report within a second is not written again.

        One that waits repeats it about once a second, or else it is taken to be gone (see `tuner`).
        """
        now, before = self._database.clock(), self.tuner()
        if (before["state"], before["message"]) == (state, message) and 0 <= now - before["time"] < 1:
            return
        with self._database.writing() as connection:
            note(connection, "tuner", {"state": state, "message": message, "time": now})

    def accept_drift(self, limit: float) -> None:
        """Keeps the drift, in nats per token, that people have said to go on to."""
        with self._database.writing() as connection:
            note(connection, _ACCEPTED, limit)

    def accepted_drift(self) -> float | None:
        """The drift that people have said to go on to; None if they were never asked."""
        with self._database.reading() as connection:
            value = connection.scalar(select(meta.c.value).where(meta.c.name == _ACCEPTED))
        return None if value is None else float(json.loads(value))

    def _add(self, connection: Connection, new: Sequence[NewPair], kind: str, probe: int | None, step: int) -> None:
        now = self._database.clock()
        rows = [
            {
                "kind": kind,
                "probe": probe,
                "step": step,
                "direction": pair.direction,
                "row": pair.row,
                "prompt": _storable(pair.prompt),
                "plus": _storable(pair.plus),
                "minus": _storable(pair.minus),
                "tokens": pair.tokens,
                "identical": pair.plus == pair.minus,
                # Only some comparisons are shown. Identical ones wait for their turn, or ties would outnumber the rest.
                "state": TIED if kind == PROBE and pair.plus == pair.minus else OPEN,
                "votes": 0,
                "created": now,
            }
            for pair in new
        ]
        if rows:
            connection.execute(insert(pairs), rows)

    def _decided(self, connection: Connection, row: Any) -> bool:
        if row.state != OPEN:
            return row.state in (CLOSED, APPLIED)
        lacking = in_queue(select(func.count()), self._database.settings.votes_per_pair)
        return not connection.scalar(lacking.where(pairs.c.probe == row.id))

    def _close(self, connection: Connection, row: Any) -> list[Vote]:
        if row.state == OPEN:
            self._end(connection, row.id, CLOSED)
            connection.execute(update(pairs).where(pairs.c.probe == row.id, pairs.c.state == OPEN).values(state=CLOSED))
        elif row.state not in (CLOSED, APPLIED):
            raise ValueError(f"probe {row.id} cannot be closed: it is {row.state}")
        return votes_on_probe(connection, row.id)

    def _withdraw(self, connection: Connection, row: Any) -> None:
        if row.state not in (OPEN, CLOSED):
            return
        voted = connection.scalar(select(exists().where(pairs.c.probe == row.id, pairs.c.votes > 0)))
        self._end(connection, row.id, EXPIRED if voted else WITHDRAWN)
        connection.execute(
            update(pairs).where(pairs.c.probe == row.id, pairs.c.state.in_((OPEN, CLOSED))).values(state=WITHDRAWN)
        )

    def _end(self, connection: Connection, probe: int, state: str) -> None:
        connection.execute(update(probes).where(probes.c.id == probe).values(state=state))
        log(connection, self._database.clock(), state, probe=probe)


def _withdraw_comparisons(connection: Connection, *, unseen: bool) -> None:
    open_ones = update(pairs).where(pairs.c.kind == COMPARISON, pairs.c.state == OPEN)
    if unseen:
        open_ones = open_ones.where(~exists().where(showings.c.pair == pairs.c.id))
    connection.execute(open_ones.values(state=WITHDRAWN))


def _storable(text: str) -> str:
    """A text for people. A model may write the character 0, which is invisible and which PostgreSQL refuses."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def _row(connection: Connection, probe: int) -> Any:
    row = connection.execute(select(probes).where(probes.c.id == probe)).first()
    if row is None:
        raise ValueError(f"there is no probe {probe}")
    return row


def _stored(row: Any) -> StoredProbe:
    return StoredProbe(
        id=row.id,
        step=row.step,
        made_at=row.made_at,
        epsilon=row.epsilon,
        seeds=tuple(json.loads(row.seeds)),
        state=row.state,
        key=row.key,
    )
