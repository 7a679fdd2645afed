"""What goes into a judgment store and comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from zorl.probe import Choice

LONGEST_NAME = 40  # characters of a rater's name
AUTOMATIC = ""  # who votes on two answers that are the same text; no rater can have this name


class AlreadyClosed(ValueError):  # noqa: N818 - it says what happened, to the rater, and is no fault of anybody
    """A verdict came too late, or twice. The message is a sentence for the rater."""


@dataclass(frozen=True, slots=True)
class NewPair:
    """One prompt and the two answers to compare, as text (a conversation: its JSON).

    Attributes:
        direction: index of the direction in its probe.
        row: index of the prompt in the minibatch.
        plus: the answer at θ + ε·z; of a comparison that of the current model.
        minus: the answer at θ − ε·z; of a comparison that of the starting model. Where both are the same text the pair
            is a tie, and is never shown.
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
    """What a rater may know of a pair. Which answer is which is not in it."""

    id: int
    pair: int
    prompt: str
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Vote:
    """A rater's opinion, with plus as the first; `rater` is empty where identical answers tied by themselves."""

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
    """A probe as the store has it; `state` is one of open, closed, applied, withdrawn, expired, rewound."""

    id: int
    step: int
    made_at: int
    epsilon: float
    seeds: tuple[int, ...]
    state: str
    key: str


@dataclass(frozen=True, slots=True)
class StoredStep:
    """A step that was made: what the trajectory is rebuilt from.

    Attributes:
        step: its number.
        probe: id of the probe that it answers.
        projected: one projected gradient a direction; NaN for one on which everybody abstained.
        coefficients: one a direction, as applied.
        figures: for charts (name → number).
        created: seconds since 1970. Set by the store.
        replayed: (projected, coefficients) of each further update, made of verdicts on this and earlier probes.
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
    """Where the run stands.

    Attributes:
        steps: number of steps in force.
        votes_needed: votes that the next step takes in all; 0 while no probe is open.
        votes_given: how many of these have been given, skips included.
        votes_skipped: how many of those given are skips.
        votes_held: how many of the missing ones are on pairs that other raters have in front of them.
        open_pairs: pairs that this rater could still be given (without a rater: that anybody could).
        verdicts: verdicts given so far by everybody, repeats and comparisons included, skips excluded.
        raters: number of raters who have judged or skipped a pair.
        can_undo: whether this rater's latest verdict can be undone.
        tuner: its state, message and time.
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
    """A row of the store's showings, for charts and agreement.

    Attributes:
        probe: None for a comparison.
        choice: as seen; None while unanswered.
        opinion: the choice with plus as the first.
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
    """A row of the raw log. `choice` is as seen; fields that an action has no use for are None."""

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
