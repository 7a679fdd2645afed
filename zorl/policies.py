"""A policy answers prompts: with the best of some label words or of a classifier's labels, or with generated text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from zorl.classifier_head import ClassifierHead
from zorl.generation import Generation
from zorl.perturbation import Evaluator
from zorl.probe import Point
from zorl.prompts import Answer, Prompt
from zorl.scoring import LabelWords

if TYPE_CHECKING:
    from zorl.config import MeZOConfig

Row = Mapping[str, Any]


class Policy(Protocol):
    evaluator: Evaluator
    prompt: Prompt

    def answers(self, rows: Sequence[Row], points: Sequence[Point], *, noise_seed: int = 0) -> list[list[Answer]]:
        """`[point][row]`; the same `noise_seed` gives all points the same sampling noise."""


@runtime_checkable
class LabelPolicy(Policy, Protocol):
    """A policy that gives every label a probability: `LabelWords` and `ClassifierHead`."""

    @property
    def label_names(self) -> list[str]:
        """The labels in the order of the scores' last dimension."""

    def scores(self, rows: Sequence[Row], points: Sequence[Point]) -> Tensor:
        """Log-probabilities of the labels, `(points, rows, labels)`."""

    def every_answer(self, rows: Sequence[Row]) -> list[list[Answer]]:
        """Each label as the answer to each row, as `[row][label]`."""

    def words_and_states(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities `(rows, labels)` at θ, and the states `(rows, width)` that a last layer makes them of, if any."""


def make_policy(
    evaluator: Evaluator, processing_class: Any, prompt: Prompt, args: MeZOConfig
) -> ClassifierHead | LabelWords | Generation:
    """`ClassifierHead` for a prompt with classes, `LabelWords` for one with label words, else `Generation`.

    Raises:
        ValueError: the prompt does not suit the model or its tokenizer.
    """
    if prompt.classes is not None:
        return ClassifierHead(
            evaluator, processing_class, prompt, batch_size=args.forward_batch_size, max_length=args.max_length
        )
    if prompt.is_pair:
        raise ValueError(
            f"the template {prompt.template!r} has a {{sep}}, which is for sequence-classification models, and "
            f"{type(evaluator.module).__name__} is none"
        )
    if prompt.labels:
        return LabelWords(
            evaluator, processing_class, prompt, batch_size=args.forward_batch_size, max_length=args.max_length
        )
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
