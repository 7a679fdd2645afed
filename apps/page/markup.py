"""HTML that is safe to show: everything that comes from a model, a file or a rater passes through `text`."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence

from zorl.apps.page.difference import Part, difference


def text(value: object) -> str:
    """A value as plain characters: no tag, attribute or entity survives."""
    return html.escape(str(value), quote=True)


def prompt_html(prompt: str) -> str:
    """A prompt. A conversation is shown turn by turn."""
    turns = _turns(prompt)
    if turns is None:
        return f'<div class="z-text" dir="auto">{text(prompt)}</div>'
    said = "".join(
        f'<dt>{text(role)}</dt><dd class="z-text" dir="auto">{text(content)}</dd>' for role, content in turns
    )
    return f'<dl class="z-turns">{said}</dl>'


def answers_html(first: str, second: str, titles: tuple[str, str], letters: tuple[str, str] = ("", "")) -> str:
    """Two answers side by side. Words that the other answer does not have are marked.

    Args:
        titles: the headings of the two answers.
        letters: badges in front of the headings.
    """
    cards = []
    answers = [_plain(answer) for answer in (first, second)]
    for side, title, letter, answer, parts in zip("ab", titles, letters, answers, difference(*answers), strict=True):
        body = "".join(map(_part, parts)) if answer.strip() else '<em class="z-empty">(an empty answer)</em>'
        badge = f'<span class="z-letter" aria-hidden="true">{text(letter)}</span>' if letter else ""
        cards.append(
            f'<section class="z-card z-answer z-{side}" aria-label="{text(title)}"><h2>{badge}{text(title)}</h2>'
            f'<div class="z-text" dir="auto">{body}</div></section>'
        )
    return f'<div class="z-answers">{"".join(cards)}</div>'


def notice_html(message: str) -> str:
    """One sentence for the person, or nothing."""
    return f'<p class="z-notice">{text(message)}</p>' if message else ""


def table_html(caption: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table. The first cell of each row is its heading."""
    head = "".join(f'<th scope="col">{text(heading)}</th>' for heading in headings)
    body = "".join(
        f'<tr><th scope="row">{text(name)}</th>{"".join(f"<td>{text(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )
    return (
        f'<div class="z-scroll" tabindex="0" role="region" aria-label="{text(caption)}"><table>'
        f"<caption>{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _part(part: Part) -> str:
    return f"<mark>{text(part.text)}</mark>" if part.differs else text(part.text)


def _plain(answer: str) -> str:
    """An answer as text; of a conversation, the contents of its messages."""
    turns = _turns(answer)
    return answer if turns is None else "\n\n".join(content for _, content in turns)


def _turns(value: str) -> list[tuple[str, str]] | None:
    """Role and content of each message, if the text is a conversation in JSON; else None."""
    if not value.startswith("[{"):
        return None
    try:
        messages = json.loads(value)
        return [(str(message["role"]), str(message["content"])) for message in messages]
    except (ValueError, TypeError, KeyError):
        return None
