"""A task is a data set, a prompt and a metric. Each task of the paper has a file beside this one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from zorl.prompts import Prompt
from zorl.suggestions import did_you_mean
from zorl.tasks.fields import UnlabelledError
from zorl.tasks.source import Hub, Reader, Record, SplitName, file_of, records_of

Kind = Literal["classification", "multiple_choice", "generation"]
Row = dict[str, Any]
OPTIONS = "options"  # the column with each row's own candidates


@dataclass(frozen=True)
class Task:
    """A task as the paper poses it (Malladi et al. 2023, appendix E).

    Attributes:
        name: its file's name.
        kind: a classification has label words; in a multiple choice, each row has its own candidates in the column
            `options`, and `label` is the text of the right one; generated text is compared with a list of acceptable answers
            in `label`.
        metric: the reward that is reported, by its name in `zorl.rewards`.
        rows: turns a record of the hub or of a file into any number of rows, with the columns of the prompts and `label`. A
            ValueError says what is wrong with the record; a KeyError, a TypeError or the like is reported by its name.
        causal: the template for autoregressive models.
        masked: the template for masked models; None if the task is not for them.
        hub: the data set on the hub; None if it exists in files alone.
        label_words: a word for each label of a classification.
        stop: the text before which generated answers end.
        bare_columns: the names of the columns of CSV and TSV files, in order, where no header gives them.
        readers: ending → reader, for files in the data set's own format.
        label_column: the column with the truth.
    """

    name: str
    kind: Kind
    metric: str
    rows: Callable[[Record], Iterable[Row]] = field(repr=False)
    causal: str
    masked: str | None = None
    hub: Hub | None = None
    label_words: Mapping[str, str] | None = None
    stop: str | None = None
    bare_columns: tuple[str, ...] = ()
    readers: Mapping[str, Reader] = field(default_factory=dict, repr=False)
    label_column: str = "label"

    def prompt(self, masked: bool) -> Prompt:
        """The prompt for masked models, or for autoregressive ones: the paper's where it has one (see `docs/tasks.md`).

        Raises:
            ValueError: a prompt for masked models is asked for, and the task has none.
        """
        template = self.masked if masked else self.causal
        if template is None:
            raise ValueError(
                f"the task {self.name!r} has a prompt for causal language models alone, and this model is a masked one; "
                "use another model, or give a prompt of your own"
            )
        options = OPTIONS if self.kind == "multiple_choice" else None
        return Prompt(template, self.label_words, options=options)

    def load(self, split: SplitName, source: str | Path | None = None) -> list[Row]:
        """The rows of a split, the same whether they come from the hub or from a file.

        Args:
            split: train, validation or test. Where the labels of the test split are not public, test is the validation
                split, unless a folder has a test file with labels.
            source: a file, whatever its split, or a folder with a file for each; None for the hub.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: there is no such split, or a row is malformed; the message names the file and the row.
        """
        if split not in get_args(SplitName):
            raise ValueError(
                f"split must be train, validation or test, got {split!r}{did_you_mean(split, get_args(SplitName))}"
            )
        if source is None:
            if self.hub is None:
                raise ValueError(f"the task {self.name!r} has no data set on the hub; give a file or a folder")
            name, records = f"{self.hub.name}, {split}", self.hub.records(split)
        else:
            path = Path(source).expanduser()
            if path.is_dir():
                path = self._file(path, split)
            name, records = str(path), records_of(path, self.bare_columns, self.readers)
        rows: list[Row] = []
        for number, record in enumerate(records, 1):
            try:
                rows.extend(self.rows(record))
            except ValueError as error:
                raise ValueError(f"{name}, row {number}: {error}") from None
            except (
                LookupError,
                TypeError,
                AttributeError,
            ) as error:  # from a user's own task: the text alone says little
                raise ValueError(f"{name}, row {number}: {type(error).__name__}: {error}") from error
        if not rows:
            raise ValueError(f"{name} holds no rows of the task {self.name!r}")
        return rows

    def _file(self, folder: Path, split: SplitName) -> Path:
        """The file of a split in a folder. GLUE and SuperGLUE publish their test files without labels, k-shot folders with."""
        unlabelled_test = self.hub is not None and self.hub.test == self.hub.validation
        path = file_of(folder, split, unlabelled_test=unlabelled_test)
        if split == "test" and unlabelled_test and not self._has_labels(path):
            return file_of(folder, "validation", unlabelled_test=True)
        return path

    def _has_labels(self, path: Path) -> bool:
        """Whether any record of a file is labelled; one that is wrong in another way counts, for loading the file to report."""
        for record in records_of(path, self.bare_columns, self.readers):
            try:
                list(self.rows(record))
            except UnlabelledError:
                continue
            except (ValueError, LookupError, TypeError, AttributeError):
                pass
            return True
        return False
