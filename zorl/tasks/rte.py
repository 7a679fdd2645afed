"""RTE: does a premise entail a hypothesis? Dagan et al. 2005 and its successors, as GLUE and SuperGLUE have them."""

from __future__ import annotations

from zorl.tasks.fields import label, text
from zorl.tasks.source import Hub, Record
from zorl.tasks.task import Row, Task

LABELS = ("entailment", "not_entailment")


def rows(record: Record) -> list[Row]:
    """GLUE's columns: sentence1, sentence2, label; SuperGLUE's: premise, hypothesis, label."""
    return [
        {
            "premise": text(record, "premise", "sentence1"),
            "hypothesis": text(record, "hypothesis", "sentence2"),
            "label": label(record, LABELS, "label"),
        }
    ]


TASK = Task(
    name="rte",
    kind="classification",
    metric="accuracy",
    rows=rows,
    causal='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n{mask}',
    masked="{premise} ? {mask} , {hypothesis}",
    hub=Hub("nyu-mll/glue", "rte", test="validation"),
    label_words={"entailment": "Yes", "not_entailment": "No"},
)
