"""A policy answers prompts: with the best of label words, a classifier's classes or a row's own options, or with text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from zorl.choosing import Choosing
from zorl.classifier_head import ClassifierHead
from zorl.generation import Generation
from zorl.perturbation import Evaluator
from zorl.probe import Point
from zorl.prompts import Answer, Prompt
from zorl.row_options import RowOptions
from zorl.scoring import LabelWords

if TYPE_CHECKING:
    from zorl.config import MeZOConfig

Row = Mapping[str, Any]


class Policy(Protocol):
    evaluator: Evaluator
    prompt: Prompt

    def answers(self, rows: Sequence[Row], points: Sequence[Point], *, noise_seed: int = 0) -> list[list[Answer]]:
        """The answers as `[point][row]`; the same `noise_seed` gives all points the same sampling noise."""


def make_policy(evaluator: Evaluator, processing_class: Any, prompt: Prompt, args: MeZOConfig) -> Choosing | Generation:
    """The policy for a prompt: with classes, with label words, with options, or with none of these.

    Raises:
        ValueError: the prompt does not suit the model or its tokenizer.
    """
    if prompt.is_pair and prompt.classes is None:
        raise ValueError(
            f"the template {prompt.template!r} has a {{sep}}, which is for sequence-classification models; "
            f"{type(evaluator.module).__name__} is not one"
        )
    if prompt.chooses:
        kind: type[ClassifierHead | LabelWords | RowOptions] = (
            ClassifierHead if prompt.classes is not None else LabelWords if prompt.labels else RowOptions
        )
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
        stop=args.stop,
        batch_size=args.forward_batch_size,
        # the policy's limit covers the prompt and its answer, the setting only the prompt
        max_length=None if args.max_length is None else args.max_length + args.max_completion_length,
    )
