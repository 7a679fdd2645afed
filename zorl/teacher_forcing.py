"""Teacher forcing: the negative log-likelihood of the text to be generated, each token given those before it.

Generation is taught with this loss (Malladi et al. 2023, Appendix): it takes one forward per batch, where decoding takes one per
token. What was taught is then decoded greedily.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zorl import processes
from zorl.encoding import ContextTokenizer, Encoded, Options, pad_token_id
from zorl.generation import Generation, cut_at
from zorl.likelihood import Likelihood
from zorl.probe import Point
from zorl.reward_models import text_of
from zorl.suggestions import did_you_mean

_NEARBY = 64  # more than enough of a prompt's last characters to decide how the text behind it is split into tokens


class TeacherForcing:
    """The mean negative log-likelihood of the tokens of the right text and its end.

    The end is the policy's stop string, as in the published code for SQuAD and DROP, and a text that holds one is taught up to
    it; without a stop string the end is the end-of-sequence token.

    Prompts are cut as for generation, and texts to the tokens that it may generate (`max_new_tokens`). A space goes between a
    prompt and a text if neither has white space there: "Answer:" is answered " Paris". Nothing goes in front of a reply in a
    chat.

    Args:
        policy: generates; its prompt, tokenizer and limits are used here.
        column: the data set's column with the text; or with a list of right texts, of which the first is taught; or with
            SQuAD's `{"text": [...]}`; or a conversation, whose last message is taught. An empty list teaches an empty answer.
    """

    def __init__(self, policy: Generation, column: str) -> None:
        tokenizer = policy.tokenizer
        ends = [tokenizer.eos_token_id, *policy.end_ids] if policy.stop is None else []
        self._policy = policy
        self._column = column
        self._contexts = ContextTokenizer(tokenizer, policy.prompt)
        self._end = [i for i in ends if i is not None][:1]
        self._likelihood = Likelihood(policy.forwards, pad_token_id(tokenizer), average_tokens=True)
        self._has_warned = False

    def __call__(self, rows: Sequence[Mapping[str, Any]], points: Sequence[Point]) -> Tensor:
        """float64, shape `(points, rows)`, in nats per token. NaN where the model's logits are.

        Raises:
            ValueError: a row has no text, or one without tokens for a tokenizer without an end-of-sequence token.
        """
        parts = processes.share(rows, lambda mine: {"losses": self._losses(mine, points)})
        return torch.cat([part["losses"] for part in parts], dim=1)

    def _losses(self, rows: Sequence[Mapping[str, Any]], points: Sequence[Point]) -> Tensor:
        if not rows:
            return torch.empty(len(points), 0, dtype=torch.float64)
        likelihood, _ = self._likelihood(self._encoded(rows), points)  # (points, rows, 1)
        return -likelihood.squeeze(2).double().cpu()

    def _encoded(self, rows: Sequence[Mapping[str, Any]]) -> list[Encoded]:
        """Each row's prompt, with its text as the only option."""
        limit, stop = self._policy.max_new_tokens, self._policy.stop
        prompts, contexts, texts = self._policy.prompt_ids(rows), [], []
        for row in rows:
            rendered, text = self._policy.prompt.render(row), taught_text(row, self._column)
            context = self._contexts.text(rendered)[-_NEARBY:]
            joined = rendered.messages or not context or context[-1].isspace() or not text or text[0].isspace()
            contexts.append(context)
            texts.append(cut_at(text if joined else " " + text, stop) + (stop or ""))
        answers = [[*ids, *self._end] for ids in self._contexts.continuations(contexts, texts)]
        longest = max(map(len, answers), default=0)
        if longest > limit and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"texts in the column {self._column!r} have up to {longest} tokens or more, of which the first {limit} are "
                "taught: raise max_completion_length to teach all of them",
                stacklevel=2,
            )
        if not all(answers):
            raise ValueError(
                f"a text in the column {self._column!r} has no tokens, and the tokenizer has no end-of-sequence token to teach"
                " instead"
            )
        return [
            Encoded(np.array(ids, dtype=np.int32), len(ids) - 1, Options.of([answer[:limit]]))
            for ids, answer in zip(prompts, answers, strict=True)
        ]


def taught_text(row: Mapping[str, Any], column: str) -> str:
    """The text to teach: the text itself, the first of a list or of a mapping's `text`, or a conversation's last message.

    Raises:
        ValueError: the column is missing, or holds something else.
    """
    if column not in row:
        columns = ", ".join(map(repr, row))
        raise ValueError(
            f"the text to teach is in the column {column!r}, which the data does not have{did_you_mean(column, row)}"
            f" (columns: {columns})"
        )
    value = row[column]
    right = value.get("text") if isinstance(value, Mapping) else value
    if isinstance(right, Sequence) and not isinstance(right, str):
        conversation = bool(right) and all(isinstance(message, Mapping) and "content" in message for message in right)
        right = text_of(list(right)) if conversation else right[0] if right else ""
    if not isinstance(right, str):
        raise ValueError(
            f"the column {column!r} holds {value!r}; expected the text to teach, or a list of right texts, of which the first"
            " is taught"
        )
    return right
