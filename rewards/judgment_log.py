"""Reading a judgment store: progress, votes, charts, exports. The only place that un-flips a choice is here."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import Connection, Select, case, exists, func, insert, or_, select, update

from zorl.probe import Choice
from zorl.rewards.judgment_database import JudgmentDatabase
from zorl.rewards.judgment_records import (
    AUTOMATIC,
    ComparisonVote,
    EventRecord,
    JudgedPair,
    Progress,
    ShowingRecord,
    StoredStep,
    Vote,
)
from zorl.rewards.judgment_tables import (
    COMPARISON,
    OPEN,
    PROBE,
    REWOUND,
    TIED,
    events,
    meta,
    pairs,
    probes,
    raters,
    showings,
    steps,
)
from zorl.wording import lasting

_NEVER_RAN = {"state": "stopped", "message": "", "time": 0.0}
_SILENT = 30.0  # seconds after which a tuner that waits, and says so every second, must be gone


class Readings:
    """What a judgment store can be asked without changing it."""

    def __init__(self, database: JudgmentDatabase) -> None:
        self._database = database

    def progress(self, rater: int | None = None) -> Progress:
        """The state of the run, for everybody or with the queue of one rater."""
        needed = self._database.settings.votes_per_pair
        queue = in_queue(select(func.count()).select_from(pairs), needed)
        if rater is not None:
            queue = queue.where(
                ~exists().where(
                    showings.c.pair == pairs.c.id,
                    showings.c.rater == rater,
                    ~showings.c.repeat,
                    showings.c.choice.is_not(None),
                )
            )
        with self._database.reading() as connection:
            first = connection.scalar(
                select(probes.c.id).where(probes.c.state == OPEN).order_by(probes.c.step, probes.c.id).limit(1)
            )
            of_first = (pairs.c.kind == PROBE, pairs.c.state == OPEN, pairs.c.probe == first)
            asked, given, held = connection.execute(
                select(
                    func.count(),
                    func.coalesce(func.sum(_at_most(pairs.c.votes, needed)), 0),
                    func.coalesce(func.sum(_at_most(_held(rater, self._database.clock()), needed - pairs.c.votes)), 0),
                ).where(*of_first)
            ).one()
            skipped = (
                select(func.count())
                .join_from(showings, pairs)
                .where(*of_first, ~showings.c.repeat, showings.c.choice == Choice.ABSTAIN.value)
            )
            opinions = showings.c.choice != Choice.ABSTAIN.value
            answered = exists().where(showings.c.rater == raters.c.id, showings.c.choice.is_not(None))
            return Progress(
                steps=_count(connection, select(func.count()).where(~steps.c.rewound)),
                votes_needed=needed * asked,
                votes_given=given,
                votes_skipped=_count(connection, skipped),
                votes_held=int(held),  # PostgreSQL sums counts as decimals
                open_pairs=_count(connection, queue),
                verdicts=_count(connection, select(func.count()).where(opinions)),
                raters=_count(connection, select(func.count()).select_from(raters).where(answered)),
                can_undo=bool(rater and connection.scalar(_can_undo(rater))),
                tuner=_tuner(connection, self._database.clock()),
            )

    def tuner(self) -> dict[str, Any]:
        """What the tuner last reported: its state, a message, the time, and its `age`, the seconds since then.

        The state is "silent" if it was waiting and is gone.
        """
        with self._database.reading() as connection:
            return _tuner(connection, self._database.clock())

    def count_steps(self) -> int:
        """The number of steps in force."""
        with self._database.reading() as connection:
            return _count(connection, select(func.count()).select_from(steps).where(~steps.c.rewound))

    def revision(self) -> tuple[int, ...]:
        """Numbers that change when steps, their figures or judgments do: what was read before is still true while they stay."""
        with self._database.reading() as connection:
            return (
                _count(connection, select(func.max(events.c.id))),
                _count(connection, select(func.sum(func.length(steps.c.figures)))),
            )

    def steps(self) -> list[StoredStep]:
        """The steps in force, in order."""
        with self._database.reading() as connection:
            rows = connection.execute(select(steps).where(~steps.c.rewound).order_by(steps.c.step)).all()
        return [
            StoredStep(
                step=row.step,
                probe=row.probe,
                epsilon=row.epsilon,
                seeds=tuple(json.loads(row.seeds)),
                projected=tuple(json.loads(row.projected)),
                coefficients=tuple(json.loads(row.coefficients)),
                replayed=tuple((tuple(g), tuple(c)) for g, c in json.loads(row.replayed)),
                figures=json.loads(row.figures),
                created=row.created,
            )
            for row in rows
        ]

    def comparisons(self) -> list[ComparisonVote]:
        """Every vote on a comparison of a step in force, in the order of the pairs."""
        with self._database.reading() as connection:
            votes, of_steps = _votes(connection, (pairs.c.kind == COMPARISON) & (pairs.c.state != REWOUND))
        return [
            ComparisonVote(v.pair, v.direction, v.row, v.rater, v.choice, step)
            for v, step in zip(votes, of_steps, strict=True)
        ]

    def showings(self) -> list[ShowingRecord]:
        """Every pair that a rater was shown, in the order of showing."""
        query = (
            select(showings, pairs.c.kind, pairs.c.probe, pairs.c.step, raters.c.name)
            .join_from(showings, pairs)
            .join(raters, raters.c.id == showings.c.rater)
            .order_by(showings.c.id)
        )
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return [
            ShowingRecord(
                showing=row.id,
                pair=row.pair,
                kind=row.kind,
                probe=row.probe,
                step=row.step,
                rater=row.name,
                repeat=row.repeat,
                flipped=row.flipped,
                choice=None if row.choice is None else Choice(row.choice),
                opinion=None if row.choice is None else _unflipped(row.choice, row.flipped),
                shown_at=row.shown_at,
                answered_at=row.answered_at,
            )
            for row in rows
        ]

    def events(self) -> list[EventRecord]:
        """The raw log, in order."""
        query = (
            select(events, raters.c.name)
            .join_from(events, raters, raters.c.id == events.c.rater, isouter=True)
            .order_by(events.c.id)
        )
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return [
            EventRecord(
                id=row.id,
                time=row.time,
                action=row.action,
                rater=row.name,
                probe=row.probe,
                pair=row.pair,
                showing=row.showing,
                choice=None if row.choice is None else Choice(row.choice),
            )
            for row in rows
        ]

    def preference_pairs(self) -> list[JudgedPair]:
        """Every pair that somebody has voted on, with the votes. Pairs that tied by themselves are left out."""
        with self._database.reading() as connection:
            votes, _ = _votes(connection, ~pairs.c.identical)
            by_pair: dict[int, list[Vote]] = {}
            for vote in votes:
                by_pair.setdefault(vote.pair, []).append(vote)
            rows = connection.execute(select(pairs).where(pairs.c.votes > 0).order_by(pairs.c.id)).all()
        return [
            JudgedPair(
                row.id,
                row.kind,
                row.probe,
                row.step,
                row.prompt,
                row.plus,
                row.minus,
                row.tokens,
                tuple(by_pair[row.id]),
            )
            for row in rows
        ]


def _at_most(value: Any, largest: Any) -> Any:
    """The smaller of two SQL expressions, but not below 0."""
    return case((largest < 0, 0), (value < largest, value), else_=largest)


def _held(rater: int | None, now: float) -> Any:
    """SQL for the number of other raters who have a pair in front of them; 0 if this rater has it too."""
    before_somebody = (
        showings.c.pair == pairs.c.id,
        ~showings.c.repeat,
        showings.c.choice.is_(None),
        showings.c.expires_at > now,
    )
    others = select(func.count()).where(*before_somebody).correlate(pairs).scalar_subquery()
    mine = exists().where(*before_somebody, showings.c.rater == rater).correlate(pairs)
    return case((mine, 0), else_=others)


def _can_undo(rater: int) -> Any:
    """SQL for whether a rater's latest verdict can be undone: a repeat, or on a pair that still takes votes."""
    return (
        select(or_(showings.c.repeat, pairs.c.state == OPEN))
        .join_from(showings, pairs)
        .where(showings.c.rater == rater, showings.c.choice.is_not(None))
        .order_by(showings.c.event.desc())
        .limit(1)
    )


def log(connection: Connection, time: float, action: str, **about: Any) -> int:
    """Adds a row to the raw log, and returns its id."""
    made = connection.execute(insert(events).values(time=time, action=action, **about))
    assert made.inserted_primary_key is not None
    return int(made.inserted_primary_key[0])


def note(connection: Connection, name: str, value: Any) -> None:
    """Writes a row of `meta`, over the one that is there."""
    kept = json.dumps(value)
    if not connection.execute(update(meta).where(meta.c.name == name).values(value=kept)).rowcount:
        connection.execute(insert(meta).values(name=name, value=kept))


def in_queue(query: Select[Any], votes_per_pair: Any) -> Select[Any]:
    """A query over pairs, narrowed to those that lack votes."""
    return query.where(pairs.c.state == OPEN, pairs.c.votes < votes_per_pair, ~pairs.c.identical)


def votes_on_probe(connection: Connection, probe: int) -> list[Vote]:
    """The votes on a probe, always in the same order; a pair that tied by itself counts as one vote."""
    return _votes(connection, pairs.c.probe == probe)[0]


def _votes(connection: Connection, condition: Any) -> tuple[list[Vote], list[int]]:
    """Votes on the pairs that meet a condition, and the step of each."""
    about = (pairs.c.id, pairs.c.direction, pairs.c.row, pairs.c.step)
    given = connection.execute(
        select(*about, raters.c.name, showings.c.choice, showings.c.flipped)
        .join_from(showings, pairs)
        .join(raters, raters.c.id == showings.c.rater)
        .where(condition, showings.c.choice.is_not(None), ~showings.c.repeat)
        .order_by(pairs.c.id, showings.c.id)
    ).all()
    tied = connection.execute(select(*about).where(condition, pairs.c.state == TIED)).all()
    found = [
        (Vote(row.id, row.direction, row.row, row.name, _unflipped(row.choice, row.flipped)), row.step) for row in given
    ]
    found += [(Vote(row.id, row.direction, row.row, AUTOMATIC, Choice.TIE), row.step) for row in tied]
    found.sort(key=lambda item: item[0].pair)  # stable: votes on one pair stay in the order of their showings
    return [vote for vote, _ in found], [step for _, step in found]


def _unflipped(choice: str, flipped: bool) -> Choice:
    """A choice as it was seen, turned so that plus comes first."""
    return Choice(choice).flipped if flipped else Choice(choice)


def _tuner(connection: Connection, now: float) -> dict[str, Any]:
    value = connection.scalar(select(meta.c.value).where(meta.c.name == "tuner"))
    said: dict[str, Any] = dict(_NEVER_RAN) if value is None else json.loads(value)
    said["age"] = now - said["time"]
    if said["state"] != "waiting" or said["age"] <= _SILENT:
        return said
    gone = f"It has not looked for verdicts for {lasting(said['age'])}."
    return said | {"state": "silent", "message": f"{gone} They are kept, and count as soon as it is started again."}


def _count(connection: Connection, query: Select[Any]) -> int:
    return connection.scalar(query) or 0
