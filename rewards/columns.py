"""The data set column that holds the truth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zorl.suggestions import check_columns

# Keyword arguments of a reward function that are not columns of the data set.
_NOT_COLUMNS = frozenset({"prompts", "completion_ids", "trainer_state", "log_extra", "log_metric", "label_names"})


def truth_of(columns: Mapping[str, Any], column: str, count: int) -> list[Any]:
    """The true answer for each completion.

    Args:
        columns: the keyword arguments of a reward function.
        column: which of them holds the truth.
        count: the number of completions.

    Raises:
        ValueError: there is no such column, it has another length, or a row holds no value.
    """
    check_columns("the data set", [column], [name for name in columns if name not in _NOT_COLUMNS])
    truth = list(columns[column])
    if len(truth) != count:
        raise ValueError(f"column {column!r} has {len(truth)} rows for {count} completions")
    for row, value in enumerate(truth):
        if value is None:
            raise ValueError(f"column {column!r} holds no value in row {row} of the batch")
    return truth
