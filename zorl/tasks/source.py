"""The source of a task's records: a data set on the hub, or a copy of it on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zorl.data import load_from_hub
from zorl.tables import delimited_lines, extension, read_table

SplitName = Literal["train", "validation", "test"]
Record = Mapping[str, Any]
Reader = Callable[[Path], Iterable[Record]]

# How the data sets' own archives name the file of a split, the likeliest word first.
_WORDS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "val", "dev", "dev32"),
    "test": ("test",),
}


@dataclass(frozen=True)
class Hub:
    """A data set on the hub.

    Attributes:
        path: its name.
        config: its configuration, such as `sst2` of GLUE.
        train: the name of the split to train on.
        validation: the name of the split to choose settings by; None if there is none.
        test: the name of the split to report on. Where the labels of the test split are not public, papers report on the
            validation split, and so does the task.
    """

    path: str
    config: str | None = None
    train: str = "train"
    validation: str | None = "validation"
    test: str = "test"

    @property
    def name(self) -> str:
        """`nyu-mll/glue, sst2`."""
        return self.path if self.config is None else f"{self.path}, {self.config}"

    def records(self, split: SplitName) -> Iterable[Record]:
        """The rows of a split as the hub has them.

        Raises:
            ValueError: there is no such split, or the data set cannot be loaded.
        """
        called = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        if called is None:
            raise ValueError(
                f"the data set {self.name} has no {split} split; hold out rows of its training split, as --k_shot does"
            )
        rows: Iterable[Record] = load_from_hub(self.path, called, self.config)
        return rows


def file_of(folder: Path, split: SplitName, *, unlabelled_test: bool) -> Path:
    """The file of a split in a folder: `train.tsv`, `dev_matched.tsv`, `val.jsonl`, `TREC.test.all`.

    Args:
        unlabelled_test: the test split's labels are not public, so the validation split stands for a test split without a file.

    Raises:
        ValueError: no file, or more than one, has a word for the split in its name.
    """
    words = _WORDS[split]
    if split == "test" and unlabelled_test:
        words += _WORDS["validation"]
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for word in words:
        found = [name for name in names if word in re.split(r"[._-]", name.lower())]
        if len(found) == 1:
            return folder / found[0]
        if found:
            raise ValueError(
                f"{folder} holds several files of the {split} split: {', '.join(found)}; give the path of one"
            )
    raise ValueError(
        f"{folder} has no file for the {split} split; expected {' or '.join(words)} in a name (files: "
        f"{', '.join(names) or 'none'}), or give the path of the file itself"
    )


def records_of(path: Path, bare_columns: Sequence[str], readers: Mapping[str, Reader]) -> Iterable[Record]:
    """The rows of a file.

    Args:
        bare_columns: the names of a CSV or TSV file's columns, in order, if its first line does not give them. A first line with
            any of these names is a header: its other columns may have other names, which the task accepts as well or reports.
        readers: ending → reader, for files in the data set's own format; `zorl.tables` reads the others.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged; see `zorl.tables.read_table`.
    """
    kind = extension(path)
    if kind in readers:
        return readers[kind](path)
    if bare_columns and kind in (".csv", ".tsv"):
        _, head = next(delimited_lines(path), (1, []))
        if set(bare_columns).isdisjoint(head):
            positions = [str(position) for position in range(len(bare_columns))]
            records: list[Record] = read_table(path, positions, bare_columns)[0].to_pylist()
            return records
    records = read_table(path, [], [])[0].to_pylist()
    return records
