"""BoolQ: a passage answers a question with yes or no. Clark et al. 2019."""

from __future__ import annotations

from zorl.tasks.fields import YES_NO, YES_NO_WORDS, label, text
from zorl.tasks.source import Hub, Record
from zorl.tasks.task import Row, Task


def rows(record: Record) -> list[Row]:
    """SuperGLUE's columns: passage, question, label. The prompt adds the question mark."""
    question = text(record, "question").rstrip("? ")
    return [{"passage": text(record, "passage"), "question": question, "label": label(record, YES_NO, "label")}]


TASK = Task(
    name="boolq",
    kind="classification",
    metric="accuracy",
    rows=rows,
    causal="{passage} {question}?\n{mask}",
    masked="{passage} Question: {question}? Answer: {mask}.",  # PET's (Schick and Schütze 2021)
    hub=Hub("aps/super_glue", "boolq", test="validation"),
    label_words=YES_NO_WORDS,
)
