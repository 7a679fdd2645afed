"""The raters' side of a judgment store: the next pair, the vote, and taking it back."""

from __future__ import annotations

import unicodedata
from typing import Any

from sqlalchemy import Connection, bindparam, exists, func, insert, or_, select, update

from zorl.directions import derive_seed
from zorl.probe import Choice
from zorl.rewards.judgment_log import Readings, in_queue, log
from zorl.rewards.judgment_records import LONGEST_NAME, AlreadyClosed, Showing
from zorl.rewards.judgment_tables import COMPARISON, OPEN, PROBE, REWOUND, TIED, WITHDRAWN, pairs, raters, showings

# A repeat comes at least this many pairs after the first showing, so that it is not recognised …
_REPEAT_AFTER = 5
# … and is drawn from this many pairs before that.
_REPEAT_WITHIN = 50
_LONGEST_LOOK = 10

# The queries behind a click, built once: building one takes longer than running it.
_RATER: Any = bindparam("rater")
_NOW: Any = bindparam("now")
_NEEDED: Any = bindparam("needed")
_WHOLE = select(showings, pairs.c.probe, pairs.c.state, pairs.c.prompt, pairs.c.plus, pairs.c.minus).join_from(
    showings, pairs
)
_SHOWING = _WHOLE.where(showings.c.id == bindparam("showing"))
_SHOWN_TO = select(
    select(func.count()).where(showings.c.rater == raters.c.id).correlate(raters).scalar_subquery()
).where(raters.c.id == _RATER)
# What a rater was shown and has not answered: the latest showing that still makes sense.
_UNANSWERED = (
    _WHOLE.where(showings.c.rater == _RATER, showings.c.choice.is_(None))
    .where(or_(showings.c.repeat, pairs.c.state == OPEN))
    .where(or_(showings.c.repeat, showings.c.expires_at > _NOW, pairs.c.votes < _NEEDED))
    .order_by(showings.c.event.desc())
    .limit(1)
)
_LATEST_VOTE = (
    _WHOLE.where(showings.c.rater == _RATER, showings.c.choice.is_not(None)).order_by(showings.c.event.desc()).limit(1)
)
_NEW_TO_RATER = ~exists().where(showings.c.pair == pairs.c.id, showings.c.rater == _RATER, ~showings.c.repeat)
_OF_A_PROBE = (
    in_queue(select(pairs.c.id), _NEEDED)
    .where(pairs.c.kind == PROBE, _NEW_TO_RATER)
    .order_by(pairs.c.probe, pairs.c.votes, pairs.c.id)
    .limit(1)
)
_COMPARISON = (
    in_queue(select(pairs.c.id, pairs.c.step), _NEEDED)
    .where(pairs.c.kind == COMPARISON, _NEW_TO_RATER)
    .order_by(pairs.c.step.desc(), pairs.c.id)
    .limit(1)
)
# Its votes and the raters that it is reserved for do not add up to what it needs.
_LEASES = (
    select(func.count())
    .where(showings.c.pair == pairs.c.id, ~showings.c.repeat, showings.c.choice.is_(None), showings.c.expires_at > _NOW)
    .correlate(pairs)
    .scalar_subquery()
)
_NOT_KEPT = pairs.c.votes + _LEASES < _NEEDED
_again = showings.alias()
_REPEATABLE = (
    select(showings.c.pair, showings.c.flipped)
    .where(showings.c.rater == _RATER, ~showings.c.repeat)
    .where(showings.c.choice.is_not(None), showings.c.choice != Choice.ABSTAIN.value)
    .where(~exists().where(_again.c.pair == showings.c.pair, _again.c.rater == showings.c.rater, _again.c.repeat))
    .order_by(showings.c.event.desc())
    .offset(_REPEAT_AFTER)
    .limit(_REPEAT_WITHIN)
)


class RatersSide(Readings):
    """What the page asks of the store. Every method is one transaction."""

    def rater(self, name: str) -> int:
        """The id of a rater, who is added if new.

        Raises:
            ValueError: the name is empty, longer than `LONGEST_NAME`, or holds unprintable characters.
        """
        clean = unicodedata.normalize("NFC", name).strip()
        if not 1 <= len(clean) <= LONGEST_NAME or not clean.isprintable():
            raise ValueError(f"a name must have 1 to {LONGEST_NAME} printable characters, got {clean[:60]!r}")
        with self._database.writing() as connection:
            known = connection.scalar(select(raters.c.id).where(raters.c.name == clean))
            if known is not None:
                return known
            made = connection.execute(insert(raters).values(name=clean, created=self._database.clock()))
            return _new_id(made)

    def next_pair(self, rater: int) -> Showing | None:
        """The pair that this rater should judge now, reserved for them until the lease ends; None if there is nothing to judge.

        A showing that they have not answered comes first, in the same order, even after a reload. Then, now and then, a swapped
        repeat or a comparison; the pair of the oldest probe that lacks most votes; a comparison, if there is nothing else; and
        finally, rather than nothing, a pair that is reserved for others who have not answered.

        Raises:
            ValueError: there is no such rater.
        """
        settings, now = self._database.settings, self._database.clock()
        with self._database.writing() as connection:
            count = connection.scalar(_SHOWN_TO, {"rater": rater})
            if count is None:
                raise ValueError(f"there is no rater {rater}")
            asked = {"rater": rater, "now": now, "needed": settings.votes_per_pair}
            mine = connection.execute(_UNANSWERED, asked).first()
            if mine is not None:
                if mine.expires_at - now < settings.lease_seconds / 2:
                    again = log(connection, now, "shown", rater=rater, pair=mine.pair, showing=mine.id)
                    connection.execute(
                        update(showings)
                        .where(showings.c.id == mine.id)
                        .values(expires_at=now + settings.lease_seconds, event=again)
                    )
                return _as_seen(mine)
            if _drawn(settings.repeat_share, rater, count, "repeat"):
                earlier = _to_repeat(connection, rater, count)
                if earlier is not None:
                    return self._show(connection, earlier.pair, rater, now, flipped=not earlier.flipped, repeat=True)
            pair: int | None = None
            if _drawn(settings.comparison_share, rater, count, "comparison"):
                pair = self._comparison(connection, asked)
            pair = pair or self._of_a_probe(connection, asked) or self._comparison(connection, asked)
            pair = pair or self._of_a_probe(connection, asked, leased=True)
            pair = pair or self._comparison(connection, asked, leased=True)
            if pair is None:
                return None
            flipped = bool(derive_seed(pair, "order", rater) & 1)
            return self._show(connection, pair, rater, now, flipped=flipped, repeat=False)

    def vote(self, showing: int, rater: int, choice: Choice) -> None:
        """Records what the rater chose, as seen. It is durable when this returns; the same vote again changes nothing.

        Raises:
            AlreadyClosed: the pair takes no more votes, or this rater has already voted on it. The message is for the rater.
            ValueError: the showing is not this rater's, or the choice is not one of `Choice`.
        """
        chosen = Choice(choice)
        now = self._database.clock()
        refusal = None
        with self._database.writing() as connection:
            row = connection.execute(_SHOWING, {"showing": showing}).first()
            if row is None or row.rater != rater:
                raise ValueError(f"showing {showing} was not given to rater {rater}")
            if row.choice == chosen:
                return
            if row.choice is not None:
                refusal = f"you have answered it with “{row.choice}”; Undo takes your last verdict back"
            elif not row.repeat and row.state != OPEN:
                refusal = _why_closed(row.state)
            said = {"rater": rater, "probe": row.probe, "pair": row.pair, "showing": showing, "choice": chosen}
            if refusal is not None:
                log(connection, now, "late", **said)
            else:
                event = log(connection, now, "vote", **said)
                connection.execute(
                    update(showings)
                    .where(showings.c.id == showing)
                    .values(choice=chosen.value, answered_at=now, event=event)
                )
                self._count(connection, row, 1)
        if refusal is not None:
            raise AlreadyClosed(f"This pair is already closed: {refusal}.")

    def keep(self, showing: int, rater: int) -> str | None:
        """Reserves the pair that a rater is looking at for longer. Returns None, or why it takes no verdict any more.

        The reservation is renewed when half of it is over, but not once the pair has been looked at for `_LONGEST_LOOK` times as
        long: the page of somebody who has left may stay open.

        Raises:
            ValueError: the showing is not this rater's.
        """
        settings, now = self._database.settings, self._database.clock()
        with self._database.reading() as connection:
            row = connection.execute(_SHOWING, {"showing": showing}).first()
        if row is None or row.rater != rater:
            raise ValueError(f"showing {showing} was not given to rater {rater}")
        if row.choice is not None:
            return "You have answered it elsewhere."
        if row.repeat:
            return None
        if row.state != OPEN:
            return f"The pair that you were looking at is closed: {_why_closed(row.state)}."
        lease = settings.lease_seconds
        if row.expires_at - now < lease / 2 and now - row.shown_at < _LONGEST_LOOK * lease:
            mine = (showings.c.id == showing) & showings.c.choice.is_(None)
            with self._database.writing() as connection:
                connection.execute(update(showings).where(mine).values(expires_at=now + lease))
        return None

    def release(self, rater: int) -> None:
        """Ends the reservations of a rater who has gone: their pairs are for others at once."""
        now = self._database.clock()
        theirs = (showings.c.rater == rater) & showings.c.choice.is_(None) & (showings.c.expires_at > now)
        with self._database.writing() as connection:
            connection.execute(update(showings).where(theirs).values(expires_at=now))

    def undo(self, rater: int) -> Showing:
        """Takes back the rater's latest vote, and shows its pair again in the same order.

        Raises:
            AlreadyClosed: that vote has been consumed. The message is for the rater.
            ValueError: there is no vote to take back.
        """
        now = self._database.clock()
        with self._database.writing() as connection:
            row = connection.execute(_LATEST_VOTE, {"rater": rater}).first()
            if row is None:
                raise ValueError("You have nothing to undo.")
            if not row.repeat and row.state != OPEN:
                raise AlreadyClosed(f"Your last verdict cannot be undone: {_why_closed(row.state)}.")
            event = log(
                connection, now, "undo", rater=rater, probe=row.probe, pair=row.pair, showing=row.id, choice=row.choice
            )
            connection.execute(
                update(showings)
                .where(showings.c.id == row.id)
                .values(
                    choice=None, answered_at=None, expires_at=now + self._database.settings.lease_seconds, event=event
                )
            )
            self._count(connection, row, -1)
            return _as_seen(row)

    def _of_a_probe(self, connection: Connection, asked: dict[str, Any], *, leased: bool = False) -> int | None:
        """A pair of the oldest open probe that lacks votes; pairs reserved for others only if `leased`."""
        return connection.scalar(_OF_A_PROBE if leased else _OF_A_PROBE.where(_NOT_KEPT), asked)

    def _comparison(self, connection: Connection, asked: dict[str, Any], *, leased: bool = False) -> int | None:
        """A comparison, of the newest step first. Pairs of identical answers take part, and tie when their turn comes."""
        found = connection.execute(_COMPARISON if leased else _COMPARISON.where(_NOT_KEPT), asked).first()
        skipped = update(pairs).where(pairs.c.kind == COMPARISON, pairs.c.state == OPEN, pairs.c.identical)
        if found is not None:
            skipped = skipped.where(
                or_(pairs.c.step > found.step, (pairs.c.step == found.step) & (pairs.c.id < found.id))
            )
        connection.execute(skipped.values(state=TIED))
        return None if found is None else int(found.id)

    def _show(
        self, connection: Connection, pair: int, rater: int, now: float, *, flipped: bool, repeat: bool
    ) -> Showing:
        made = connection.execute(
            insert(showings).values(
                pair=pair,
                rater=rater,
                repeat=repeat,
                flipped=flipped,
                shown_at=now,
                expires_at=now + self._database.settings.lease_seconds,
                event=0,
            )
        )
        showing = _new_id(made)
        event = log(connection, now, "shown", rater=rater, pair=pair, showing=showing)
        connection.execute(update(showings).where(showings.c.id == showing).values(event=event))
        return _as_seen(connection.execute(_SHOWING, {"showing": showing}).one())

    def _count(self, connection: Connection, row: Any, change: int) -> None:
        """Updates the number of votes on the pair. Repeats do not count."""
        if not row.repeat:
            connection.execute(update(pairs).where(pairs.c.id == row.pair).values(votes=pairs.c.votes + change))


def _as_seen(row: Any) -> Showing:
    first, second = (row.minus, row.plus) if row.flipped else (row.plus, row.minus)
    return Showing(row.id, row.pair, row.prompt, first, second)


def _to_repeat(connection: Connection, rater: int, count: int) -> Any:
    """A showing that the rater answered some time ago and that has not been repeated."""
    recent = connection.execute(_REPEATABLE, {"rater": rater}).all()
    return recent[derive_seed(rater, "repeated", count) % len(recent)] if recent else None


def _drawn(share: float, rater: int, count: int, what: str) -> bool:
    """True for this share of all counts; a pure function, so that no random state is touched."""
    return derive_seed(rater, what, count) < share * 2.0**63


def _why_closed(state: str) -> str:
    if state in (WITHDRAWN, REWOUND):
        return "it was withdrawn because the model has changed since"
    return "the model has already learned from it"


def _new_id(made: Any) -> int:
    """The id of the row that was inserted."""
    return int(made.inserted_primary_key[0])
