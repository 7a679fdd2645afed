"""The records that go into a judgment store and come out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from zorl.probe import Choice

LONGEST_NAME = 40  # characters of a rater's name
AUTOMATIC = ""  # the voter on two identical answers; no rater can have this name


class AlreadyClosed(ValueError):  # noqa: N818 - it tells the rater what happened, and is nobody's error
    """A verdict came too late, or twice. The message is a sentence for the rater."""


@dataclass(frozen=True, slots=True)
class NewPair:
    """One prompt and the two answers to compare, as text (a conversation: its JSON).

    Attributes:
        direction: index of the direction in its probe.
        row: index of the prompt in the minibatch.
        plus: the answer at θ + ε·z; in a comparison, the current model's.
        minus: the answer at θ − ε·z; in a comparison, the starting model's. If both are the same text, the pair is a tie and
            is never shown.
        tokens: whatever the tuner wants back with the votes, such as the token ids of the three texts.
    """

    direction: int
    row: int
    prompt: str
    plus: str
    minus: str
    tokens: str = ""


@dataclass(frozen=True, slots=True)
class Showing:
    """What a rater may know about a pair. It does not say which answer is which."""

    id: int
    pair: int
    prompt: str
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Vote:
    """A rater's opinion, with plus first; `rater` is empty where identical answers tied by themselves."""

    pair: int
    direction: int
    row: int
    rater: str
    choice: Choice


@dataclass(frozen=True, slots=True)
class ComparisonVote(Vote):
    """An opinion on the current model (first) against the starting one, at a step."""

    step: int


@dataclass(frozen=True, slots=True)
class StoredProbe:
    """A stored probe; `state` is one of open, closed, applied, withdrawn, expired, rewound."""

    id: int
    step: int
    made_at: int
    epsilon: float
    seeds: tuple[int, ...]
    state: str
    key: str


@dataclass(frozen=True, slots=True)
class StoredStep:
    """A step that was made, from which the trajectory can be rebuilt.

    Attributes:
        step: its number.
        probe: the id of the probe that it answers.
        projected: one projected gradient per direction; NaN if everybody abstained.
        coefficients: one per direction, as applied.
        figures: name → number, for charts.
        created: seconds since 1970. Set by the store.
        replayed: (projected, coefficients) of each further update, from verdicts on this and earlier probes.
    """

    step: int
    probe: int
    epsilon: float
    seeds: tuple[int, ...]
    projected: tuple[float, ...]
    coefficients: tuple[float, ...]
    figures: dict[str, float] = field(default_factory=dict)
    created: float = 0.0
    replayed: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of the run.

    Attributes:
        steps: the number of steps in force.
        votes_needed: all the votes that the next step needs; 0 while no probe is open.
        votes_given: how many of them have been given, skips included.
        votes_skipped: how many of those given are skips.
        votes_held: how many of the missing ones are on pairs that other raters have in front of them.
        open_pairs: pairs that this rater (without a rater: anybody) could still be given.
        verdicts: verdicts that everybody has given so far, repeats and comparisons included, skips excluded.
        raters: the number of people who have judged or skipped a pair.
        can_undo: whether this rater's latest verdict can be undone.
        tuner: what the tuner last reported (see `Readings.tuner`).
    """

    steps: int
    votes_needed: int
    votes_given: int
    votes_skipped: int
    votes_held: int
    open_pairs: int
    verdicts: int
    raters: int
    can_undo: bool
    tuner: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ShowingRecord:
    """A stored showing, for charts and agreement.

    Attributes:
        probe: None for a comparison.
        choice: as seen; None while unanswered.
        opinion: the choice, turned so that plus comes first.
    """

    showing: int
    pair: int
    kind: str
    probe: int | None
    step: int
    rater: str
    repeat: bool
    flipped: bool
    choice: Choice | None
    opinion: Choice | None
    shown_at: float
    answered_at: float | None


@dataclass(frozen=True, slots=True)
class EventRecord:
    """A row of the raw log. `choice` is as seen; fields that an action does not use are None."""

    id: int
    time: float
    action: str
    rater: str | None
    probe: int | None
    pair: int | None
    showing: int | None
    choice: Choice | None


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """A pair with all votes on it. `probe` is None for a comparison."""

    pair: int
    kind: str
    probe: int | None
    step: int
    prompt: str
    plus: str
    minus: str
    tokens: str
    votes: tuple[Vote, ...]
