"""SST-5: how good is a film, in five steps, by a sentence of its review? Socher et al. 2013."""

from __future__ import annotations

from zorl.tasks.fields import label, text
from zorl.tasks.source import Hub, Record
from zorl.tasks.task import Row, Task

LABELS = ("very negative", "negative", "neutral", "positive", "very positive")
WORDS = ("terrible", "bad", "okay", "good", "great")


def rows(record: Record) -> list[Row]:
    """Columns: text, label."""
    return [{"text": text(record, "text", "sentence"), "label": label(record, LABELS, "label")}]


TASK = Task(
    name="sst5",
    kind="classification",
    metric="accuracy",
    rows=rows,
    causal="{text} It was {mask}",
    masked="{text} It was {mask}.",
    hub=Hub("SetFit/sst5"),
    label_words=dict(zip(LABELS, WORDS, strict=True)),
    bare_columns=("label", "text"),
)
