"""SST-2: is a sentence of a film review positive? Socher et al. 2013."""

from __future__ import annotations

from zorl.tasks.fields import label, text
from zorl.tasks.source import Hub, Record
from zorl.tasks.task import Row, Task

LABELS = ("negative", "positive")


def rows(record: Record) -> list[Row]:
    """GLUE's columns: sentence, label."""
    return [{"text": text(record, "sentence", "text"), "label": label(record, LABELS, "label")}]


TASK = Task(
    name="sst2",
    kind="classification",
    metric="accuracy",
    rows=rows,
    causal="{text} It was {mask}",
    masked="{text} It was {mask}.",
    hub=Hub("nyu-mll/glue", "sst2", test="validation"),
    label_words={"negative": "terrible", "positive": "great"},
    bare_columns=("sentence", "label"),
)
