"""Rows to train and score on: loaded from a file or the hub, counted by label, held out.

`load_rows` tells a file from the name of a data set; `zorl.tables` reads the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import torch
from datasets import Dataset

from zorl.prompts import Prompt
from zorl.suggestions import check_columns, did_you_mean
from zorl.tables import EXTENSIONS, extension, read_table

TEXT, LABEL = "text", "label"  # the names of columns that are given by position
_A_SCRIPT = "scripts are no longer supported"  # what datasets says about code in place of rows
_IN_PARQUET = "refs/convert/parquet"


class Rows(NamedTuple):
    """A data set, and the names of the requested columns in it.

    Attributes:
        dataset: the rows, with all of their columns.
        text_column: the name of the text column; None if none was asked for.
        label_column: the name of the label column; None if none was asked for.
    """

    dataset: Dataset
    text_column: str | None
    label_column: str | None


class Split(NamedTuple):
    """Attributes:
    train: the rows that are left.
    held_out: the rows set aside.
    """

    train: Dataset
    held_out: Dataset


def load_rows(
    source: str | os.PathLike[str],
    *,
    text_column: str | int | None = None,
    label_column: str | int | None = None,
    split: str | None = None,
    config: str | None = None,
) -> Rows:
    """Loads a CSV, TSV, JSON Lines, JSON or Parquet file (or one of these with `.gz`), or a data set of the hub.

        load_rows("train.csv", text_column="sentence", label_column="label")
        load_rows("train.tsv", text_column=0, label_column=1)            # no header: the columns become "text", "label"
        load_rows("nyu-mll/glue", config="sst2", split="validation")

    CSV and TSV values are text, the others keep their types: compare labels as `str(label)`. A CSV or TSV file has a
    header if its first line holds the columns asked for; if not, they must be positions. With no column asked for, the
    first line is taken for a header. A folder is loaded as `datasets.load_dataset` loads it.

    Args:
        source: the file, or the name of the data set.
        text_column: a column that must exist.
        label_column: another one.
        split: the split of a data set. The default is `train`, or the only one.
        config: the configuration of a data set that has several, such as `sst2` of GLUE.

    Raises:
        FileNotFoundError: there is no such file; the message lists the closest names in its folder.
        ValueError: the file is damaged, empty or ragged, a column is missing or null in some row, or the hub does not
            have the data set. The message names the file and the line.
    """
    asked = [(str(c), called) for c, called in ((text_column, TEXT), (label_column, LABEL)) if c is not None]
    wanted, names = [column for column, _ in asked], [called for _, called in asked]
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"text_column and label_column are both {wanted[0]!r}; expected two columns")
    if _is_file(source):
        if split is not None or config is not None:
            raise ValueError(f"split and config belong to data sets of the hub, but {str(source)!r} is a file")
        table, found = read_table(Path(source).expanduser(), wanted, names)
        try:
            dataset = Dataset(table)
        except pa.ArrowException as error:
            raise ValueError(f"{source}: cannot be stored: {error}") from None
    else:
        dataset, found = load_from_hub(str(source), split, config), wanted
        check_columns(f"the data set {str(source)!r}", wanted, dataset.column_names)
    if not len(dataset):
        raise ValueError(f"{source} holds no rows")
    for column in found:
        values = dataset.data.column(column)
        if values.null_count:
            row = values.is_null().index(True).as_py() + 1
            raise ValueError(f"{source}, row {row}: the column {column!r} has no value")
    called = iter(found)
    return Rows(
        dataset,
        None if text_column is None else next(called),
        None if label_column is None else next(called),
    )


def hold_out(
    dataset: Dataset, label_column: str | None, *, fraction: float = 0.2, at_most: int = 1000, seed: int = 0
) -> Split:
    """Sets a part of the rows aside for evaluation, the same part for the same seed. Both parts keep the rows' order.

    With a label column every label keeps its share, as exactly as whole rows allow: a label of two rows or more is in
    both parts, one of a single row stays in training.

    Args:
        dataset: N rows.
        label_column: the labels; None holds out any rows.
        fraction: of the N rows, between 0 and 1.
        at_most: rows to hold out, however many there are (and one more for each label that would get none).
        seed: decides which rows.

    Raises:
        ValueError: fraction or at_most is out of range, the column is missing, or there are too few rows for two parts.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    if at_most < 1:
        raise ValueError(f"at_most must be at least 1, got {at_most}")
    groups: dict[str, list[int]] = {}
    if label_column is None:
        groups[""] = list(range(len(dataset)))
    else:
        check_columns("the data set", [label_column], dataset.column_names)
        for index, label in enumerate(dataset[label_column]):
            groups.setdefault(str(label), []).append(index)
    total = max(1, min(round(fraction * len(dataset)), at_most))
    labels = sorted(groups)
    generator = random.Random(seed)
    held: set[int] = set()
    for label, share in zip(labels, apportioned(total, [len(groups[label]) for label in labels]), strict=True):
        indices = groups[label]
        held.update(generator.sample(indices, min(max(share, 1), len(indices) - 1) if indices else 0))
    if not held:
        raise ValueError(
            f"no row of {len(dataset)} can be held out: a label has to occur twice; give an evaluation set"
            if label_column is not None
            else f"a data set of {len(dataset)} rows cannot be split; give an evaluation set"
        )
    kept = [index for index in range(len(dataset)) if index not in held]
    return Split(dataset.select(kept), dataset.select(sorted(held)))


def apportioned(total: int, sizes: list[int]) -> list[int]:
    """Shares of `total` in proportion to `sizes`, by largest remainder; equal remainders go to the earlier one."""
    everything = sum(sizes)
    if not everything:
        return [0] * len(sizes)
    shares = [total * size // everything for size in sizes]
    remainders = [total * size % everything for size in sizes]
    for i in sorted(range(len(sizes)), key=lambda i: -remainders[i])[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _is_file(source: str | os.PathLike[str]) -> bool:
    """Whether a source means a file, existing or not, rather than the name of a data set (or a folder of one)."""
    path = Path(source).expanduser()
    if path.is_dir():
        return False
    text = str(source)
    looks_like_a_path = text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text
    return path.exists() or extension(path) in EXTENSIONS or path.suffix == ".gz" or looks_like_a_path


def load_from_hub(name: str, split: str | None, config: str | None) -> Dataset:
    """A data set of the hub or a folder; without `split`, its training split or its only one.

    A data set that comes as a script is loaded from the hub's own copy in Parquet files, so that no script is run.

    Raises:
        ValueError: it cannot be loaded, or has several splits and none is called `train`.
    """
    try:
        try:
            loaded = datasets.load_dataset(name, config, split=split)
        except RuntimeError as error:
            if _A_SCRIPT not in str(error):
                raise
            # That copy has a folder for each configuration, and does not know them by name.
            loaded = datasets.load_dataset(name, data_dir=config, split=split, revision=_IN_PARQUET)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        here = did_you_mean(name, sorted(path.name for path in Path().iterdir()))
        raise ValueError(
            f"could not load the data set {name!r}: {error} (no file here has that name either{here})"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded and len(loaded) > 1:
            raise ValueError(f"the data set {name!r} has the splits {', '.join(loaded)}; choose one with split")
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    return loaded


def as_rows(dataset: Any, name: str) -> list[dict[str, Any]]:
    """A data set, a table of pandas or any iterable of dictionaries as a list of rows.

    Raises:
        ValueError: it is something else; `name` is that of the argument.
    """
    if isinstance(dataset, str | Path | Mapping):
        what = "one row" if isinstance(dataset, Mapping) else f"the text {str(dataset)!r}"
        load = "put it into a list" if isinstance(dataset, Mapping) else "datasets.load_dataset reads files and the hub"
        raise ValueError(f"{name} takes rows, as a list of dictionaries or a data set, and got {what}: {load}")
    if isinstance(dataset, Dataset):
        return dataset.to_list()
    if hasattr(dataset, "columns") and hasattr(dataset, "to_dict"):  # of pandas, which need not be imported for this
        return list(dataset.to_dict("records"))
    rows = list(dataset)
    wrong = next((number for number, row in enumerate(rows, 1) if not isinstance(row, Mapping)), None)
    if wrong is not None:
        raise ValueError(
            f"{name}, row {wrong}: expected a dictionary from columns to values, got {type(rows[wrong - 1]).__name__}"
        )
    return rows


def rows_sha256(rows: Sequence[Mapping[str, Any]]) -> str:
    """The SHA-256 of rows in their order. Of a value that JSON does not know, an image say, only the type counts."""
    digest = hashlib.sha256()
    for row in rows:
        line = json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def checked_rows(dataset: Any, name: str, prompt: Prompt, label_column: str, *, training: bool = False) -> Any:
    """A data set as a list of rows that suit the prompt, a dictionary of data sets as one of lists.

    Iterable data sets and None stay as they are.

    Args:
        name: that of the argument, for messages.
        training: whether the rows are to be trained on, which takes two classes or more.

    Raises:
        ValueError: it is empty, lacks a column, has a label without a label word or one that is not among the row's options, or
            has a single class to train on.
    """
    if isinstance(dataset, dict) and training:
        splits = [repr(split) for split in dataset]
        raise ValueError(f"{name} is a dictionary, of {', '.join(splits) or 'nothing'}: give the rows of one split")
    if isinstance(dataset, dict):
        return {key: checked_rows(part, f"{name}[{key!r}]", prompt, label_column) for key, part in dataset.items()}
    if dataset is None or isinstance(dataset, datasets.IterableDataset | torch.utils.data.IterableDataset):
        return dataset
    rows = as_rows(dataset, name)
    if not rows:
        raise ValueError(f"{name} is empty")
    prompt.check_columns(rows[0])
    for number, row in enumerate(rows if prompt.options is not None else (), 1):
        options = prompt.options_of(row)
        if label_column in row and row[label_column] not in options:
            raise ValueError(
                f"{name}, row {number}: {label_column}={row[label_column]!r} is not among the options in {prompt.options!r}, "
                f"{list(options)}; it must be the text of the right one"
            )
    if prompt.labels and label_column in rows[0]:
        bare = next((number for number, row in enumerate(rows, 1) if label_column not in row), None)
        if bare is not None:
            raise ValueError(f"{name}, row {bare}: there is no column {label_column!r}, which the first row has")
        labels = [row[label_column] for row in rows]
        prompt.check_labels(labels, label_column)
        if training and len(set(map(str, labels))) == 1:
            raise ValueError(
                f"{name} has one class only: all {len(rows)} rows have {label_column}={labels[0]!r}, so there is nothing "
                "to learn to tell apart"
            )
    return rows
