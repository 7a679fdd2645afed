"""What a misspelt name was probably meant to be."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_LONGEST = 40  # characters of a column's name in a message


def did_you_mean(name: str, candidates: Iterable[str], *, most: int = 3) -> str:
    """`; did you mean 'label'?`, or nothing if no candidate comes close.

    A candidate is close if it is spelt alike, or else if it is a word of the name, as f1 is of macro_f1.

    Args:
        most: how many candidates to suggest.
    """
    known = list(candidates)
    words = set(re.split(r"[\W_]+", name))
    close = difflib.get_close_matches(name, known, n=most) or [one for one in known if len(one) > 1 and one in words]
    return f"; did you mean {' or '.join(map(repr, close[:most]))}?" if close else ""


def check_columns(source: str, wanted: Iterable[str], columns: Iterable[str]) -> None:
    """Raises ValueError if a wanted column is not among `columns`, with the closest name and a list of them."""
    known = list(columns)
    for name in wanted:
        if name not in known:
            listed = ", ".join(repr(c if len(c) <= _LONGEST else f"{c[: _LONGEST - 1]}…") for c in known) or "none"
            raise ValueError(f"{source} has no column {name!r}{did_you_mean(name, known)} (columns: {listed})")
