"""Where two answers differ, word by word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from typing import NamedTuple

# A word with the space in front of it. In scripts without spaces: one character.
_WORD = re.compile(
    r"\s*(?:[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u9fff\uac00-\ud7af]+(?:['’][^\W]+)*|\S)|\s+$"
)
_LARGEST = 1_000_000  # product of the word counts of two middles, beyond which matching would take too long for a click


class Part(NamedTuple):
    """A part of an answer, and whether it is missing from the other answer."""

    text: str
    differs: bool


@lru_cache(maxsize=1024)
def difference(first: str, second: str) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The parts of both texts. Joined, they give the text; white space alone never counts as a difference."""
    a, b = _WORD.findall(first), _WORD.findall(second)
    words_a, words_b = [word.strip() for word in a], [word.strip() for word in b]
    head = _common(words_a, words_b)
    tail = _common(words_a[head:][::-1], words_b[head:][::-1])
    middle_a, middle_b = words_a[head : len(a) - tail], words_b[head : len(b) - tail]
    same_a, same_b = [True] * len(a), [True] * len(b)
    same_a[head : len(a) - tail] = [False] * len(middle_a)
    same_b[head : len(b) - tail] = [False] * len(middle_b)
    if len(middle_a) * len(middle_b) <= _LARGEST:
        for block in SequenceMatcher(None, middle_a, middle_b, autojunk=False).get_matching_blocks():
            for i in range(block.size):
                same_a[head + block.a + i] = same_b[head + block.b + i] = True
    return tuple(_parts(a, same_a)), tuple(_parts(b, same_b))


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """The number of words that both have in common at the beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _parts(words: Sequence[str], same: Sequence[bool]) -> Iterable[Part]:
    """Joins neighbouring words of the same kind. The space in front of a part that differs is left outside it."""
    text, differs = "", False
    for word, alike in zip(words, same, strict=True):
        bare = word.lstrip()
        if differs == (not alike) or not bare:
            text += word
            continue
        space = word[: len(word) - len(bare)]
        if differs:
            yield Part(text, True)
            text = word
        else:
            if text + space:
                yield Part(text + space, False)
            text = bare
        differs = not alike
    if text:
        yield Part(text, differs)
