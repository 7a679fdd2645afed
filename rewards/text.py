"""Rewards for question answering: exact match and token F1, as SQuAD defines them.

Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text", section 6.1; unanswerable
questions as in Rajpurkar et al. 2018 (SQuAD 2.0).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zorl.reward_functions import RewardFunction
from zorl.reward_models import Messages, text_of
from zorl.rewards.columns import truth_of

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")


def exact_match(column: str = "answers") -> RewardFunction:
    """1 if a completion is one of its gold answers after normalisation (see `normalized`), else 0.

    For labels or codes, where case and punctuation count, use `accuracy`.

    Args:
        column: the data set's column with the gold answers: a string, a list of strings (any of them will do), or
            SQuAD's `{"text": [...]}`. An empty list means that the question has no answer, and an empty completion is right.
    """
    return _ExactMatch(column)


def squad_f1(column: str = "answers") -> RewardFunction:
    """F1 of the words that a completion shares with a gold answer, after normalisation; the best gold answer counts.

    Args:
        column: the data set's column with the gold answers, as for `exact_match`.
    """
    return _SquadF1(column)


def normalized(text: str) -> str:
    """The text in lower case, without punctuation, the articles a, an and the, or superfluous white space."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


@dataclass(frozen=True)
class _ExactMatch:
    column: str
    __name__ = "exact_match"

    def __call__(self, completions: Sequence[str | Messages], **columns: Any) -> list[float]:
        golds = _golds(columns, self.column, len(completions))
        answers = [normalized(text_of(completion)) for completion in completions]
        return [float(answer in gold) for answer, gold in zip(answers, golds, strict=True)]


@dataclass(frozen=True)
class _SquadF1:
    column: str
    __name__ = "squad_f1"

    def __call__(self, completions: Sequence[str | Messages], **columns: Any) -> list[float]:
        golds = _golds(columns, self.column, len(completions))
        answers = [normalized(text_of(completion)) for completion in completions]
        return [max(_token_f1(answer, g) for g in gold) for answer, gold in zip(answers, golds, strict=True)]


def _token_f1(answer: str, gold: str) -> float:
    answer_words, gold_words = answer.split(), gold.split()
    if not answer_words or not gold_words:
        return float(answer_words == gold_words)  # SQuAD 2.0: nothing is right only where there is nothing to say
    shared = sum((Counter(answer_words) & Counter(gold_words)).values())
    return 2 * shared / (len(answer_words) + len(gold_words))


def _golds(columns: Mapping[str, Any], column: str, count: int) -> list[list[str]]:
    """The normalised gold answers of each sample, at least one each."""
    golds = []
    for row, value in enumerate(truth_of(columns, column, count)):
        texts = value.get("text") if isinstance(value, Mapping) else value
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"column {column!r} holds {value!r} in row {row} of the batch; expected a string, a list of strings, "
                f"or {{'text': [...]}}"
            )
        golds.append([normalized(text) for text in texts] or [""])
    return golds
