"""WSC: does a pronoun refer to a given noun? Levesque et al. 2012, as SuperGLUE has it."""

from __future__ import annotations

from zorl.tasks.fields import YES_NO, YES_NO_WORDS, label, text
from zorl.tasks.source import Hub, Record
from zorl.tasks.task import Row, Task


def rows(record: Record) -> list[Row]:
    """SuperGLUE's columns: text, span1_text, span2_text, label. In its files the spans are in an object, target."""
    spans = record.get("target") or record
    return [
        {
            "text": text(record, "text"),
            "span1": text(spans, "span1_text"),
            "span2": text(spans, "span2_text"),
            "label": label(record, YES_NO, "label"),
        }
    ]


TASK = Task(
    name="wsc",
    kind="classification",
    metric="accuracy",
    rows=rows,
    causal='{text}\nIn the previous sentence, does the pronoun "{span2}" refer to {span1}? Yes or No?\n{mask}',
    hub=Hub("aps/super_glue", "wsc.fixed", test="validation"),
    label_words=YES_NO_WORDS,
)
