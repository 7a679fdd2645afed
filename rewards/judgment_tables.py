"""The tables of a judgment store, and the states that its rows pass through.

A *probe* asks about some directions; a *pair* is one prompt with the two answers that it compares; a *showing* is a pair
given to one rater, in an order of its own, and later the rater's choice. `events` is the raw log, to which rows are only added.
Times are seconds since 1970. Everything here means the same on SQLite and on PostgreSQL.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    text,
)

from zorl.rewards.judgment_records import LONGEST_NAME

SCHEMA: Final = 1

# Kinds of pairs.
PROBE: Final = "probe"  # the + and the − side of a direction
COMPARISON: Final = "comparison"  # the current model and the starting one

# States of a probe: open → closed → applied, then rewound if people go back; or open → withdrawn, expired.
OPEN: Final = "open"  # votes are taken
CLOSED: Final = "closed"  # its votes are final, its step is not committed yet
APPLIED: Final = "applied"  # its step is committed
WITHDRAWN: Final = "withdrawn"  # withdrawn before anybody voted
EXPIRED: Final = "expired"  # withdrawn with votes on it, which made no step
REWOUND: Final = "rewound"  # its step was committed and taken back
LIVE: Final = (OPEN, CLOSED, APPLIED)  # in these a probe owns its key
# States of a pair: open, closed and withdrawn as above, and
TIED: Final = "tied"  # the two answers are the same text, which nobody needs to judge

metadata = MetaData()

# Id columns have 64 bits on a server. SQLite's row ids always do, and only its INTEGER PRIMARY KEY increments by itself.
_ID = BigInteger().with_variant(Integer, "sqlite")


def _primary() -> Column[int]:
    return Column("id", _ID, primary_key=True, autoincrement=True)


# The schema's version, the store's settings, and the tuner's state.
meta = Table("meta", metadata, Column("name", String(40), primary_key=True), Column("value", Text, nullable=False))

raters = Table(
    "raters",
    metadata,
    _primary(),
    Column("name", String(LONGEST_NAME), nullable=False, unique=True),
    Column("created", Float(53), nullable=False),
)

probes = Table(
    "probes",
    metadata,
    _primary(),
    Column("key", Text, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("made_at", BigInteger, nullable=False),
    Column("epsilon", Float(53), nullable=False),
    Column("seeds", Text, nullable=False),  # JSON: a list of integers
    Column("state", String(16), nullable=False),
    Column("created", Float(53), nullable=False),
)
_alive = text("state IN ('open', 'closed', 'applied')")
Index("one_live_probe_a_key", probes.c.key, unique=True, sqlite_where=_alive, postgresql_where=_alive)
Index("probes_by_state", probes.c.state, probes.c.step, probes.c.id)

pairs = Table(
    "pairs",
    metadata,
    _primary(),
    Column("kind", String(16), nullable=False),
    Column("probe", _ID, ForeignKey("probes.id")),  # NULL for a comparison
    Column("step", BigInteger, nullable=False),
    Column("direction", Integer, nullable=False),
    Column("row", Integer, nullable=False),
    Column("prompt", Text, nullable=False),
    Column("plus", Text, nullable=False),
    Column("minus", Text, nullable=False),
    Column("tokens", Text, nullable=False),  # for prompt and answers, as the tuner wants them back
    Column("identical", Boolean, nullable=False),
    Column("state", String(16), nullable=False),
    Column("votes", Integer, nullable=False),  # showings that were answered, repeats left out
    Column("created", Float(53), nullable=False),
)
# The queue: what is open, oldest probe first, fewest votes first.
Index("pairs_in_queue", pairs.c.kind, pairs.c.state, pairs.c.probe, pairs.c.votes, pairs.c.id)
Index("pairs_of_probe", pairs.c.probe)

showings = Table(
    "showings",
    metadata,
    _primary(),
    Column("pair", _ID, ForeignKey("pairs.id"), nullable=False),
    Column("rater", _ID, ForeignKey("raters.id"), nullable=False),
    Column("repeat", Boolean, nullable=False),  # an attention check: the same pair again, in the other order
    Column("flipped", Boolean, nullable=False),  # the minus side is shown first
    Column("shown_at", Float(53), nullable=False),
    Column("expires_at", Float(53), nullable=False),  # until then the pair is reserved for this rater
    Column("choice", String(16)),  # as seen; NULL while it is unanswered
    Column("answered_at", Float(53)),
    # The newest event of this showing. It gives the order, because a clock may be set back.
    Column("event", BigInteger, nullable=False),
)
Index("one_showing", showings.c.pair, showings.c.rater, showings.c.repeat, unique=True)
Index("showings_unanswered", showings.c.rater, showings.c.choice, showings.c.event)
Index("showings_of_rater", showings.c.rater, showings.c.event)

steps = Table(
    "steps",
    metadata,
    _primary(),
    Column("step", BigInteger, nullable=False),
    Column("probe", _ID, ForeignKey("probes.id"), nullable=False),
    Column("epsilon", Float(53), nullable=False),
    Column("seeds", Text, nullable=False),  # JSON, like the four below; NaN is allowed
    Column("projected", Text, nullable=False),
    Column("coefficients", Text, nullable=False),
    Column("replayed", Text, nullable=False),
    Column("figures", Text, nullable=False),
    Column("created", Float(53), nullable=False),
    Column("rewound", Boolean, nullable=False),
)
_in_force = text("NOT rewound")
Index("one_step_in_force", steps.c.step, unique=True, sqlite_where=_in_force, postgresql_where=_in_force)

requests = Table(
    "requests",
    metadata,
    _primary(),
    Column("kind", String(40), nullable=False),
    Column("payload", Text, nullable=False),  # JSON
    Column("result", Text),  # JSON; NULL while it is unanswered
    Column("created", Float(53), nullable=False),
    Column("answered_at", Float(53)),
)
Index("requests_unanswered", requests.c.answered_at, requests.c.id)

events = Table(
    "events",
    metadata,
    _primary(),
    Column("time", Float(53), nullable=False),
    # shown, vote, undo, late; closed, applied, withdrawn, expired, rewound (of a probe); asked, committed
    Column("action", String(16), nullable=False),
    Column("rater", _ID),
    Column("probe", _ID),
    Column("pair", _ID),
    Column("showing", _ID),
    Column("choice", String(16)),
)
