"""MultiRC: is this a right answer to a question about a paragraph? There may be several. Khashabi et al. 2018."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from zorl.tasks.fields import YES_NO, YES_NO_WORDS, label, text
from zorl.tasks.source import Hub, Record
from zorl.tasks.task import Row, Task


def rows(record: Record) -> Iterator[Row]:
    """The hub's columns: paragraph, question, answer, label. A line of SuperGLUE's files is a paragraph with all its
    questions, and their answers."""
    passage = record.get("passage")
    if not isinstance(passage, Mapping):
        yield _row(text(record, "paragraph"), record, record)
        return
    for question in passage.get("questions") or ():
        for answer in question.get("answers") or ():
            yield _row(text(passage, "text"), question, {"answer": answer.get("text"), "label": answer.get("label")})


def _row(paragraph: str, question: Record, answer: Record) -> Row:
    return {
        "paragraph": paragraph,
        "question": text(question, "question"),
        "answer": text(answer, "answer"),
        "label": label(answer, YES_NO, "label"),
    }


TASK = Task(
    name="multirc",
    kind="classification",
    metric="accuracy",
    rows=rows,
    causal='{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n{mask}',
    hub=Hub("aps/super_glue", "multirc", test="validation"),
    label_words=YES_NO_WORDS,
)
