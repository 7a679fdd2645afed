"""MNLI: does a premise entail a hypothesis, in ten genres of text? Williams et al. 2018."""

from __future__ import annotations

from zorl.tasks.fields import label, text
from zorl.tasks.source import Hub, Record
from zorl.tasks.task import Row, Task

LABELS = ("entailment", "neutral", "contradiction")


def rows(record: Record) -> list[Row]:
    """The hub's columns: premise, hypothesis, label; GLUE's files: sentence1, sentence2, gold_label."""
    return [
        {
            "premise": text(record, "premise", "sentence1"),
            "hypothesis": text(record, "hypothesis", "sentence2"),
            "label": label(record, LABELS, "label", "gold_label"),
        }
    ]


TASK = Task(
    name="mnli",
    kind="classification",
    metric="accuracy",
    rows=rows,
    causal='Suppose {premise} Can we infer that "{hypothesis}"? Yes, Maybe, or No?\n{mask}',
    masked="{premise} ? {mask} , {hypothesis}",
    hub=Hub("nyu-mll/glue", "mnli", validation="validation_matched", test="validation_matched"),
    label_words={"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"},
)
