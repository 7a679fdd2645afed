"""CB: is the writer committed to a clause? Three classes, very unbalanced. de Marneffe et al. 2019."""

from __future__ import annotations

from zorl.tasks.fields import label, text
from zorl.tasks.source import Hub, Record
from zorl.tasks.task import Row, Task

LABELS = ("entailment", "contradiction", "neutral")


def rows(record: Record) -> list[Row]:
    """SuperGLUE's columns: premise, hypothesis, label."""
    return [
        {
            "premise": text(record, "premise"),
            "hypothesis": text(record, "hypothesis"),
            "label": label(record, LABELS, "label"),
        }
    ]


TASK = Task(
    name="cb",
    kind="classification",
    metric="accuracy",
    rows=rows,
    causal='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n{mask}',
    masked="{premise} ? {mask} , {hypothesis}",  # as RTE's and MNLI's
    hub=Hub("aps/super_glue", "cb", test="validation"),
    label_words={"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"},
)
