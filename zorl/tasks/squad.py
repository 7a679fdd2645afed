"""SQuAD: a question about a paragraph, answered in its words. Rajpurkar et al. 2016."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from zorl.tasks.fields import text, texts
from zorl.tasks.source import Hub, Record
from zorl.tasks.task import Row, Task


def rows(record: Record) -> Iterator[Row]:
    """The hub's columns: title, context, question, answers. The published file is one object with all its articles."""
    if "data" not in record:
        answers = record.get("answers")
        yield _row(record, record, record, answers.get("text") if isinstance(answers, Mapping) else answers)
        return
    for article in record["data"] or ():
        for paragraph in article.get("paragraphs") or ():
            for question in paragraph.get("qas") or ():
                yield _row(article, paragraph, question, [a.get("text") for a in question.get("answers") or ()])


def _row(article: Record, paragraph: Record, question: Record, answers: Any) -> Row:
    return {
        "title": text(article, "title"),
        "context": text(paragraph, "context"),
        "question": text(question, "question"),
        "label": texts(answers, f"answers of the question {question.get('id', '')!r}"),
    }


TASK = Task(
    name="squad",
    kind="generation",
    metric="squad_f1",
    rows=rows,
    causal="Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
    stop="\n",
    hub=Hub("rajpurkar/squad", test="validation"),
)
