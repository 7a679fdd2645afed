"""COPA: which of two sentences is the cause, or the effect, of a premise? Roemmele et al. 2011."""

from __future__ import annotations

import re

from zorl.tasks.fields import label, text
from zorl.tasks.source import Hub, Record
from zorl.tasks.task import Row, Task

CHOICES = ("choice1", "choice2")


def rows(record: Record) -> list[Row]:
    """SuperGLUE's columns: premise, choice1, choice2, question ("cause" or "effect"), label."""
    options = {choice: _continuing(text(record, choice)) for choice in CHOICES}
    return [
        {
            "premise": text(record, "premise").removesuffix("."),
            "connective": {"cause": "because", "effect": "so"}[label(record, ("cause", "effect"), "question")],
            "options": list(options.values()),
            "label": options[label(record, CHOICES, "label")],
        }
    ]


def _continuing(sentence: str) -> str:
    """The text with a lower-case first letter, as in the middle of a sentence. "I" stays."""
    return sentence if re.match(r"I\b", sentence) else sentence[0].lower() + sentence[1:]


TASK = Task(
    name="copa",
    kind="multiple_choice",
    metric="accuracy",
    rows=rows,
    causal="{premise} {connective} {mask}",
    hub=Hub("aps/super_glue", "copa", test="validation"),
)
