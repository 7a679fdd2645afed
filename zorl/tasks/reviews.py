"""Film reviews whose verdict no single word gives away: the offline demonstration task.

Every review is one sentence, judged "negative" or "positive":

    The plot was far from dull.                                             positive
    The acting was witty, but the ending was never moving.                  negative
    Although the dialogue was bland, the cast was anything but wooden.      positive
    The critics predicted a charming drama, and they were wrong.             negative
    You would be right to call the score superb.                            positive

Negation reverses an adjective, the clause after "but" or beside "although" outweighs the other, and an expectation
may be met or not. Both kinds of adjective, and every negation, are about as frequent in one class as in the other, so a
classifier over single words does little better than chance. Three reviews in four are positive: accuracy is already
0.75 for a model that always says "positive", macro-F1 is 0.43.

A sentence belongs to one of three splits by its checksum, so the training set, the test set and the text that the demo
model was pretrained on have no sentence in common, whatever their seeds.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from typing import Literal

from datasets import Dataset

Label = Literal["negative", "positive"]
Split = Literal["pretrain", "train", "test"]

LABELS: tuple[Label, ...] = ("negative", "positive")
LABEL_WORDS: dict[str, str] = {"negative": "terrible", "positive": "great"}
PROMPT = "{text} It was {mask}"
POSITIVE_SHARE = 0.75

PRAISE = (
    "brilliant", "charming", "clever", "delightful", "fresh", "funny", "gripping", "lovely",
    "memorable", "moving", "polished", "superb", "tender", "vivid", "warm", "witty",
)  # fmt: skip
BLAME = (
    "bland", "boring", "clumsy", "dreadful", "dull", "flat", "forgettable", "hollow",
    "lazy", "messy", "predictable", "shallow", "stale", "tedious", "weak", "wooden",
)  # fmt: skip
PARTS = (
    "acting", "beginning", "camera work", "cast", "dialogue", "direction", "editing", "ending", "finale", "hero",
    "lighting", "middle", "music", "opening", "pacing", "plot", "premise", "score", "script", "villain",
)  # fmt: skip
KINDS = ("cartoon", "comedy", "documentary", "drama", "film", "mystery", "sequel", "thriller")
NEGATIONS = ("not", "never", "hardly", "far from", "anything but", "nowhere near")
INTENSIFIERS = ("", "", "very", "truly", "really", "quite", "so")
PROPHETS = ("I", "We", "My friends", "My parents", "The critics", "The neighbours")
PROPHECIES = ("expected", "predicted")


def reviews(split: Split, seed: int = 0, positive_share: float = POSITIVE_SHARE) -> Iterator[tuple[str, Label]]:
    """An endless stream of `(sentence, label)` from one split, in an order that `seed` fixes. Sentences may recur.

    Raises:
        ValueError: `split` is not "pretrain", "train" or "test".
    """
    if split not in ("pretrain", "train", "test"):
        raise ValueError(f"split must be 'pretrain', 'train' or 'test', got {split!r}")
    rng = random.Random(f"{split} {seed}")
    while True:
        positive = rng.random() < positive_share
        # Sentences of other splits are rejected one by one with the label held fixed, which keeps each class's share as asked.
        sentence = _sentence(rng, positive)
        while split_of(sentence) != split:
            sentence = _sentence(rng, positive)
        yield sentence, LABELS[positive]


def load(n_train: int = 2000, n_test: int = 1000, seed: int = 0) -> tuple[Dataset, Dataset]:
    """The training and the held-out set: distinct sentences, columns `text` and `label` ("negative" or "positive").

    Raises:
        ValueError: a size is negative.
    """
    return _distinct("train", n_train, seed), _distinct("test", n_test, seed)


def split_of(sentence: str) -> Split:
    """The split that owns a sentence: half of all sentences are for pretraining, a quarter each to train and test on."""
    return ("pretrain", "pretrain", "train", "test")[zlib.crc32(sentence.encode()) % 4]


def _distinct(split: Split, size: int, seed: int) -> Dataset:
    if size < 0:
        raise ValueError(f"the size of the {split} set must not be negative, got {size}")
    rows: dict[str, Label] = {}
    stream = reviews(split, seed)
    while len(rows) < size:
        sentence, label = next(stream)
        rows[sentence] = label
    return Dataset.from_dict({"text": list(rows), "label": list(rows.values())})


def _sentence(rng: random.Random, positive: bool) -> str:
    form = rng.choices(_FORMS, weights=_WEIGHTS)[0]
    return form(rng, positive)


def _opinion(rng: random.Random, positive: bool) -> str:
    """A phrase of the given sentiment: "very dull", or nearly as often "far from witty"."""
    if rng.random() < 0.6:
        return f"{rng.choice(INTENSIFIERS)} {_adjective(rng, positive)}".strip()
    return f"{rng.choice(NEGATIONS)} {_adjective(rng, not positive)}"


def _adjective(rng: random.Random, positive: bool) -> str:
    return rng.choice(PRAISE if positive else BLAME)


def _plain(rng: random.Random, positive: bool) -> str:
    return f"The {rng.choice(PARTS)} was {_opinion(rng, positive)}."


def _contrast(rng: random.Random, positive: bool) -> str:
    aside, main = rng.sample(PARTS, 2)
    return f"The {aside} was {_opinion(rng, not positive)}, but the {main} was {_opinion(rng, positive)}."


def _concession(rng: random.Random, positive: bool) -> str:
    aside, main = rng.sample(PARTS, 2)
    concession = f"the {aside} was {_opinion(rng, not positive)}"
    claim = f"the {main} was {_opinion(rng, positive)}"
    if rng.random() < 0.5:
        return f"Although {concession}, {claim}."
    return f"T{claim[1:]}, although {concession}."


def _expectation(rng: random.Random, positive: bool) -> str:
    met = rng.random() < 0.5
    prophet = rng.choice(PROPHETS)
    pronoun = {"I": "I was", "We": "we were"}.get(prophet, "they were")
    prophecy = f"{prophet} {rng.choice(PROPHECIES)} a {_adjective(rng, positive == met)} {rng.choice(KINDS)}"
    return f"{prophecy}, and {pronoun} {'right' if met else 'wrong'}."


def _judgement(rng: random.Random, positive: bool) -> str:
    met = rng.random() < 0.5
    return (
        f"You would be {'right' if met else 'wrong'} to call the {rng.choice(PARTS)} "
        f"{rng.choice(INTENSIFIERS)} {_adjective(rng, positive == met)}.".replace("  ", " ")
    )


_FORMS = (_plain, _contrast, _concession, _expectation, _judgement)
_WEIGHTS = (20, 30, 25, 15, 10)
