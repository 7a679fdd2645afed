"""SNLI: does the caption of a photograph entail a hypothesis? Bowman et al. 2015. The prompts are MNLI's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from zorl.tables import delimited_lines
from zorl.tasks import mnli
from zorl.tasks.source import Hub, Record
from zorl.tasks.task import Row


def rows(record: Record) -> list[Row]:
    """MNLI's columns. Pairs on which the annotators did not agree have no label, and are left out, as is usual."""
    if record.get("label", record.get("gold_label")) in (-1, "-1", "-"):
        return []
    return mnli.rows(record)


def read(path: Path) -> Iterator[Record]:
    """The published tables. In GLUE's the last column is the gold label, and pairs judged by five people have four more columns
    before it than the header has. In SNLI's own it is the first column."""
    lines = delimited_lines(path)
    _, header = next(lines)
    for _, fields in lines:
        record = dict(zip(header, fields, strict=False))
        yield {**record, "gold_label": fields[-1]} if header[-1] == "gold_label" else record


TASK = replace(mnli.TASK, name="snli", hub=Hub("stanfordnlp/snli"), rows=rows, readers={".tsv": read})
