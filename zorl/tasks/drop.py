"""DROP: a question that takes counting, sorting or sums over a paragraph. Dua et al. 2019."""

from __future__ import annotations

from collections.abc import Mapping

from zorl.tasks.fields import text, texts
from zorl.tasks.source import Hub, Record
from zorl.tasks.task import Row, Task


def rows(record: Record) -> list[Row]:
    """The hub's columns: passage, question, answers_spans."""
    answers = record.get("answers_spans")
    spans = answers.get("spans") if isinstance(answers, Mapping) else answers
    return [
        {
            "passage": text(record, "passage"),
            "question": text(record, "question"),
            "label": texts(spans, "answers_spans"),
        }
    ]


TASK = Task(
    name="drop",
    kind="generation",
    metric="squad_f1",
    rows=rows,
    causal="Passage: {passage}\nQuestion: {question}\nAnswer:",
    stop="\n",
    hub=Hub("ucinlp/drop", test="validation"),
)
