"""ReCoRD: which of the entities in a news article completes a sentence about it? Zhang et al. 2018."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from zorl.tasks.fields import text, texts
from zorl.tasks.source import Hub, Record
from zorl.tasks.task import Row, Task

PLACEHOLDER = "@placeholder"


def rows(record: Record) -> Iterator[Row]:
    """The hub's columns: passage, query, entities, answers. A line of SuperGLUE's files is an article with all its
    queries, in which entities are given by their first and last character."""
    passage = record.get("passage")
    if not isinstance(passage, Mapping):
        answers = texts(record.get("answers"), "answers")
        entities = texts(record.get("entities"), "entities")
        yield from _rows(text(record, "passage"), text(record, "query"), entities, answers)
        return
    article = str(passage.get("text"))
    spans = passage.get("entities") or ()
    entities = texts([article[span["start"] : span["end"] + 1] for span in spans], "entities")
    for query in record.get("qas") or ():
        answers = texts([answer.get("text") for answer in query.get("answers") or ()], "answers")
        yield from _rows(text(passage, "text"), text(query, "query"), entities, answers)


def _rows(article: str, query: str, entities: list[str], answers: list[str]) -> Iterator[Row]:
    """The article may name an answer in several ways. The first is the right option, and the others are left out; a query with
    nothing left to choose from gives no row."""
    if PLACEHOLDER not in query:
        raise ValueError(f"the query {query!r} has no {PLACEHOLDER}")
    named = sorted({answers[0], *entities} - {*answers[1:]})  # the hub's order is arbitrary
    if len(named) > 1:
        yield {
            "passage": article.replace("@highlight\n", "- "),
            "options": [query.replace(PLACEHOLDER, name) for name in named],
            "label": query.replace(PLACEHOLDER, answers[0]),
        }


TASK = Task(
    name="record",
    kind="multiple_choice",
    metric="accuracy",
    rows=rows,
    causal="{passage}\n{mask}",
    hub=Hub("aps/super_glue", "record", test="validation"),
)
