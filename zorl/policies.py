"""A policy answers prompts: with the best of some label words or of a row's own options, or with generated text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from zorl.generation import Generation
from zorl.perturbation import Evaluator
from zorl.probe import Point
from zorl.prompts import Answer, Prompt
from zorl.row_options import RowOptions
from zorl.scoring import LabelWords

if TYPE_CHECKING:
    from zorl.config import MeZOConfig

Row = Mapping[str, Any]
Choosing = LabelWords | RowOptions  # policies that score the answers they choose from


class Policy(Protocol):
    evaluator: Evaluator
    prompt: Prompt

    def answers(self, rows: Sequence[Row], points: Sequence[Point], *, noise_seed: int = 0) -> list[list[Answer]]:
        """`[point][row]`; the same `noise_seed` gives all points the same sampling noise."""


def make_policy(
    evaluator: Evaluator, processing_class: Any, prompt: Prompt, args: MeZOConfig
) -> LabelWords | RowOptions | Generation:
    """`LabelWords` for a prompt with label words, `RowOptions` for one with options, else `Generation`.

    Raises:
        ValueError: the prompt does not suit the model or its tokenizer.
    """
    if prompt.labels or prompt.options is not None:
        kind = LabelWords if prompt.labels else RowOptions
        return kind(evaluator, processing_class, prompt, batch_size=args.forward_batch_size, max_length=args.max_length)
    return Generation(
        evaluator,
        processing_class,
        prompt,
        max_new_tokens=args.max_completion_length,
        temperature=args.temperature or 1.0,
        top_k=args.top_k,
        top_p=args.top_p,
        greedy=args.temperature == 0,
        batch_size=args.forward_batch_size,
        # the policy's limit is for a prompt and its answer, the setting for the prompt
        max_length=None if args.max_length is None else args.max_length + args.max_completion_length,
    )
