"""TREC: what kind of thing a question asks for. Voorhees and Tice 2000; Li and Roth 2002."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from zorl.tasks.fields import label, text
from zorl.tasks.source import Hub, Record
from zorl.tasks.task import Row, Task

WORDS = {
    "DESC": "Description",
    "ENTY": "Entity",
    "ABBR": "Expression",
    "HUM": "Human",
    "LOC": "Location",
    "NUM": "Number",
}
# Label numbers differ between files (Kim 2014, and k-shot splits derived from it) and the hub.
FILE_ORDER = tuple(WORDS)
HUB_ORDER = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")


def rows(record: Record) -> list[Row]:
    """The hub's columns: text, coarse_label; the files' columns: label, text."""
    order, column = (HUB_ORDER, "coarse_label") if "coarse_label" in record else (FILE_ORDER, "label")
    return [{"text": text(record, "text"), "label": label(record, order, column)}]


def read(path: Path) -> Iterator[Record]:
    """Lines such as `HUM:ind Who was Galileo ?`, or `3 Who was Galileo ?`, in Latin-1, as published."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    for line in path.read_text(encoding="latin-1").rstrip("\n").split("\n"):
        name, _, question = line.partition(" ")
        yield {"label": name.partition(":")[0], "text": question}


TASK = Task(
    name="trec",
    kind="classification",
    metric="accuracy",
    rows=rows,
    causal="{text}\nDescription, Entity, Expression, Human, Location, or Number?\n{mask}",
    masked=" {mask}: {text}",  # behind a space, so that RoBERTa's word is " Description", as in LM-BFF's code
    hub=Hub("CogComp/trec", validation=None),
    label_words=WORDS,
    bare_columns=("label", "text"),
    readers=dict.fromkeys((".label", ".all", ".train", ".test", ".txt"), read),
)
