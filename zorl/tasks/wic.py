"""WiC: does a word mean the same in two sentences? Pilehvar and Camacho-Collados 2019."""

from __future__ import annotations

from zorl.tasks.fields import YES_NO, YES_NO_WORDS, label, text
from zorl.tasks.source import Hub, Record
from zorl.tasks.task import Row, Task


def rows(record: Record) -> list[Row]:
    """SuperGLUE's columns: word, sentence1, sentence2, label."""
    texts = {column: text(record, column) for column in ("word", "sentence1", "sentence2")}
    return [{**texts, "label": label(record, YES_NO, "label")}]


TASK = Task(
    name="wic",
    kind="classification",
    metric="accuracy",
    rows=rows,
    causal='Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
    "{sentence1}\n{sentence2}\n{mask}",
    masked='"{sentence1}" / "{sentence2}" Similar sense of "{word}"? {mask}.',  # PET's (Schick and Schütze 2021)
    hub=Hub("aps/super_glue", "wic", test="validation"),
    label_words=YES_NO_WORDS,
)
