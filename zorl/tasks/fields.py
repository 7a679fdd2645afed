"""Values of a record from any source: the hub, SuperGLUE's JSON Lines and GLUE's tables name their columns differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

YES_NO = ("no", "yes")  # in the order of 0 and 1, or False and True
YES_NO_WORDS = {"yes": "Yes", "no": "No"}


class UnlabelledError(ValueError):
    """A record without its label or answers, such as those of GLUE's and SuperGLUE's published test files."""


def text(record: Mapping[str, Any], *columns: str) -> str:
    """The text in the first of these columns that the record has, without surrounding white space.

    Raises:
        ValueError: it has none of them, or no text in it.
    """
    column = _found(record, columns)
    value = record[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected text in {column!r}, found {value!r}")
    return value.strip()


def label(record: Mapping[str, Any], names: Sequence[str], *columns: str) -> str:
    """The name of the label in the first of these columns that the record has.

    Args:
        names: the labels' names, in the order of their numbers. A record gives a label by name, by number or as a truth value.

    Raises:
        UnlabelledError: the record has none of the columns, or no label there; unlabelled rows are marked with −1.
        ValueError: it has something else there.
    """
    try:
        column = _found(record, columns)
    except ValueError as error:
        raise UnlabelledError(str(error)) from None
    value = record[column]
    if value in names:
        return str(value)
    digits = {"false": "0", "true": "1"}.get(str(value).lower(), str(value))
    if digits.isdecimal() and int(digits) < len(names):
        return names[int(digits)]
    missing = str(value) in ("-1", "None", "-")
    hint = " (the row has no label: use a labelled split)" if missing else ""
    raise (UnlabelledError if missing else ValueError)(
        f"{column!r} holds {value!r}{hint}; expected one of {', '.join(map(repr, names))}, or 0 to {len(names) - 1}"
    )


def texts(value: Any, what: str) -> list[str]:
    """A list of texts, each once, in order.

    Raises:
        UnlabelledError: there is none, or it is empty.
        ValueError: it is not a list of texts.
    """
    if value is None:
        raise UnlabelledError(f"{what}: expected a list of texts, found None")
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(v, str) and v for v in value):
        raise ValueError(f"{what}: expected a list of texts, found {value!r}")
    if not value:
        raise UnlabelledError(f"{what}: the list is empty; use a split that has answers")
    return list(dict.fromkeys(value))


def _found(record: Mapping[str, Any], columns: Sequence[str]) -> str:
    for column in columns:
        if column in record:
            return column
    raise ValueError(f"no column {' or '.join(map(repr, columns))} (columns: {', '.join(map(repr, record))})")
