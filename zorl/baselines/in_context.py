"""In-context learning: answered training rows before each prompt (Brown et al. 2020)."""

from __future__ import annotations

import bisect
from dataclasses import replace
from functools import partial
from typing import Any

from zorl.baselines.problem import Fitted, NotApplicable, Problem, Report, answers_of, target_text
from zorl.encoding import longest_input
from zorl.scoring import LabelWords

DEMONSTRATIONS = 32  # as in Malladi et al. 2023
_MARGIN = 16  # tokens for the answer and for special tokens


def fit(problem: Problem, report: Report | None = None) -> Fitted:
    """Puts demonstrations before the prompt: `DEMONSTRATIONS`, in the proportions of the labels, or as many as fit.

    They share the context with the longest prompt of the development rows, which gets half of it at most; longer prompts are cut
    as always. If fewer demonstrations fit than there are labels, their values are cut. Generated answers end where a
    demonstration would, if the problem does not say where they end. Learning costs nothing, but every later forward reads the
    demonstrations too.

    Raises:
        NotApplicable: rows hold conversations or no labels, or the template leaves no room for a demonstration.
    """
    model, tokenizer = problem.load()
    prompt = problem.prompt
    policy = problem.policy(model, tokenizer)
    if any(prompt.render(row).conversational for row in (problem.train[0], problem.dev[0])):
        raise NotApplicable(
            f"demonstrations are text before the template {prompt.template!r}, and its column holds conversations"
        )
    if problem.label_column not in problem.train[0]:
        raise NotApplicable(f"the training rows have no column {problem.label_column!r} to demonstrate")
    masked = isinstance(policy, LabelWords) and policy.masked
    gap = " " if masked else "\n\n"

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def demonstrations(count: int, limit: int | None = None) -> str:
        return "".join(_answered(problem, row, limit) + gap for row in problem.sample(count))

    room = longest_input(model, tokenizer) if problem.max_length is None else problem.max_length
    if not prompt.labels and problem.max_length is None:
        room -= problem.max_completion_length
    asked = max(tokens(rendered.before + rendered.after) for rendered in map(prompt.render, problem.dev))
    room -= min(room // 2, asked + _MARGIN)
    fewest = min(max(1, len(prompt.labels)), len(problem.train))
    most = min(DEMONSTRATIONS, len(problem.train))
    counts = range(max(most, fewest), fewest - 1, -1)
    count = next((count for count in counts if tokens(demonstrations(count)) <= room), fewest)
    limit = None
    if tokens(demonstrations(count)) > room:
        lengths = range(max(len(str(value)) for row in problem.train for value in row.values()) + 1)
        fits = bisect.bisect_left(lengths, True, key=lambda limit: tokens(demonstrations(count, limit)) > room)
        if fits == 0:
            raise NotApplicable(
                f"{count} demonstrations of the template {prompt.template!r} do not fit into the {room} tokens that the"
                " model has left for them, even with their values cut to nothing"
            )
        limit = fits - 1
    # Braces in the data are literal.
    literal = demonstrations(count, limit).replace("{", "{{").replace("}", "}}")
    # Text that imitates the demonstrations goes on with one of its own, unless it ends where they do.
    asking = problem if prompt.chooses or problem.stop is not None else replace(problem, stop=gap)
    answering = asking.policy(model, tokenizer, replace(prompt, template=literal + prompt.template))
    chosen = {"demonstrations": count, "cut_to_characters": limit}
    return Fitted(partial(answers_of, answering), forwards=0, chosen=chosen)


def _answered(problem: Problem, row: dict[str, Any], limit: int | None) -> str:
    """A row's prompt with the true answer filled in, and each value cut to the given number of characters."""
    rendered = problem.prompt.render(row, limit=limit)
    return rendered.before + target_text(problem.prompt, row, problem.label_column) + rendered.after
