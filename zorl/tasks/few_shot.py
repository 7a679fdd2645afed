"""Few-shot samples, in the paper's sizes and with its seeds (appendix E.1): the same seed draws the same rows on every machine.

They are not the paper's very rows: its draws depend on numpy and on the order of its files.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from zorl.data import apportioned
from zorl.suggestions import check_columns

SEEDS = (13, 21, 42, 87, 100)  # the paper's
OPT_SIZES = (1000, 500, 1000)  # rows to train on, to choose settings by and to report, for the OPT models

R = TypeVar("R", bound=Mapping[str, Any])


class Shots(NamedTuple):
    """Attributes:
    train: rows to train on.
    validation: as many other rows, to choose settings by.
    """

    train: list[Any]
    validation: list[Any]


class Sample(NamedTuple):
    """Attributes:
    train: rows to train on.
    validation: other rows, to choose settings by.
    test: yet others, to report on.
    """

    train: list[Any]
    validation: list[Any]
    test: list[Any]


def k_shot(
    rows: Sequence[R], k: int, *, seed: int, label_column: str | None = "label", validation: bool = True
) -> Shots:
    """k rows of each class to train on and k others to validate on, in the order of `rows`.

    Args:
        label_column: None draws k rows in all, whatever they are: for generation and multiple choice.
        seed: one of `SEEDS`, for results to compare with the paper's.
        validation: False draws the same rows to train on, and none to validate on.

    Raises:
        ValueError: k is not positive, a row lacks the column, or a class has fewer than 2k rows (k without validation).
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    groups, parts = _groups(rows, label_column), 1 + validation
    for label, group in groups.items():
        if len(group) < parts * k:
            what = "there are" if label_column is None else f"the label {label!r} has"
            wanted = f"{k} to train on with {k} to validate on make {2 * k}" if validation else f"{k} are to be drawn"
            raise ValueError(f"{what} {len(group)} rows, and {wanted}; take k = {len(group) // parts} at most")
    return Shots(*_drawn(rows, groups, [[k] * len(groups), [k * validation] * len(groups)], seed))


def sample(
    rows: Sequence[R], sizes: tuple[int, int, int] = OPT_SIZES, *, seed: int, label_column: str | None = "label"
) -> Sample:
    """Rows to train on, to validate on and to test on. Each part has the proportions of the labels in `rows`.

    Args:
        sizes: the rows of the three parts.
        label_column: None draws any rows: for generation and multiple choice.

    Raises:
        ValueError: a size is negative, a row lacks the column, or there are fewer rows than the sizes add up to.
    """
    if min(sizes) < 0 or sum(sizes) > len(rows):
        raise ValueError(f"sizes must be 0 or more and add up to {len(rows)} at most, the number of rows, got {sizes}")
    groups = _groups(rows, label_column)
    left = [len(group) for group in groups.values()]
    shares = []
    for size in sizes:
        shares.append(apportioned(size, left))
        left = [have - share for have, share in zip(left, shares[-1], strict=True)]
    return Sample(*_drawn(rows, groups, shares, seed))


def _groups(rows: Sequence[R], label_column: str | None) -> dict[str, list[int]]:
    """The indices of each label's rows, sorted by label."""
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        if label_column is not None:
            check_columns(f"row {index + 1}", [label_column], list(row))
        groups.setdefault("" if label_column is None else str(row[label_column]), []).append(index)
    return dict(sorted(groups.items()))


def _drawn(
    rows: Sequence[R], groups: Mapping[str, Sequence[int]], shares: Iterable[Sequence[int]], seed: int
) -> list[list[R]]:
    """The parts: shares[p][g] rows of group g for part p, no row twice."""
    generator = random.Random(seed)
    shuffled = [iter(generator.sample(group, len(group))) for group in groups.values()]
    parts = []
    for sizes in shares:
        indices = [next(group) for group, size in zip(shuffled, sizes, strict=True) for _ in range(size)]
        parts.append([rows[index] for index in sorted(indices)])
    return parts
