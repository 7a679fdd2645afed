"""A model's logits at the tokens of given answers, at points around θ.

The answers of a judged pair are read again and again at other points. If only the output embedding is tuned, everything
before it is the same at every point: it is computed once per answer, and a point costs one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zorl.offload import computing_device
from zorl.parameters import ParameterSet
from zorl.perturbation import Evaluator
from zorl.probe import CENTRE, Point


@dataclass(frozen=True, slots=True)
class TokenAnswer:
    """An answer to a prompt, as tokens.

    Raises:
        ValueError: the prompt or the answer is empty.
    """

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompt_ids or not self.ids:
            raise ValueError("a prompt and an answer need at least one token each")


class AnswerLogits:
    """Logits at the tokens of answers, one answer after the other.

    Args:
        evaluator: runs a causal language model at points.
        parameters: the parameters that the points move.
        pad_id: a token to pad with; it is hidden from the model.
        temperature: divides the logits; use the one that the answers were sampled with.
        batch_size: answers per forward.

    Raises:
        ValueError: temperature or batch_size is not positive.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        parameters: ParameterSet,
        *,
        pad_id: int = 0,
        temperature: float = 1.0,
        batch_size: int = 64,
    ) -> None:
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be positive, not {temperature}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.evaluator = evaluator
        self.temperature = temperature
        self._pad_id = pad_id
        self._batch_size = batch_size
        self._head = _head_alone(evaluator.module, parameters)
        self._kept: dict[TokenAnswer, Tensor] = {}  # (tokens, width): what the output embedding is given

    @property
    def cached(self) -> bool:
        """Whether only the output embedding is run at a point."""
        return self._head is not None

    def forget(self, keep: Sequence[TokenAnswer] = ()) -> None:
        """Frees what is cached for all answers but these."""
        self._kept = {answer: self._kept[answer] for answer in keep if answer in self._kept}

    def log_probabilities(self, answers: Sequence[TokenAnswer], point: Point = CENTRE) -> Tensor:
        """The log-probability of every token at each position of the answers: float32, shape `(places, vocabulary)`."""
        return (self._logits(answers, point).float() / self.temperature).log_softmax(dim=-1)

    def _logits(self, answers: Sequence[TokenAnswer], point: Point) -> Tensor:
        if self._head is not None:
            self._keep([answer for answer in dict.fromkeys(answers) if answer not in self._kept])
        if (head := self._head) is not None:
            inputs = torch.cat([self._kept[answer] for answer in answers])
            return self.evaluator.evaluate(point, lambda: head(inputs))
        return torch.cat([self._full(batch, point)[1] for batch in self._batches(answers)])

    def _keep(self, answers: Sequence[TokenAnswer]) -> None:
        for batch in self._batches(answers):
            inputs, logits = self._full(batch, CENTRE)
            if inputs is None or not self._head_gives(inputs, logits):
                self._head, self._kept = None, {}  # the model changes its logits after the output embedding
                return
            self._kept |= zip(batch, inputs.split([len(answer.ids) for answer in batch]), strict=True)

    def _head_gives(self, inputs: Tensor, logits: Tensor) -> bool:
        head = self._head
        assert head is not None
        found: Tensor = self.evaluator.evaluate(CENTRE, lambda: head(inputs))
        tolerance = 1e-3 if logits.dtype == torch.float32 else 5e-2  # matrices of other shapes round differently
        return torch.allclose(found.to(logits.device).float(), logits.float(), rtol=tolerance, atol=tolerance)

    def _full(self, answers: Sequence[TokenAnswer], point: Point) -> tuple[Tensor | None, Tensor]:
        """The output embedding's input and the logits at the answers' positions, by a whole forward."""
        module = self.evaluator.module
        device = computing_device(module)
        inputs = [[*answer.prompt_ids, *answer.ids[:-1]] for answer in answers]
        width = max(map(len, inputs))
        tokens = torch.tensor([ids + [self._pad_id] * (width - len(ids)) for ids in inputs], device=device)
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in inputs], device=device)
        rows = [i for i, answer in enumerate(answers) for _ in answer.ids]
        places = [len(answer.prompt_ids) - 1 + t for answer in answers for t in range(len(answer.ids))]
        seen: list[Tensor] = []
        hook = None
        if self._head is not None:
            hook = self._head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            logits = self.evaluator.evaluate(
                point, lambda: module(input_ids=tokens, attention_mask=mask, use_cache=False).logits
            )
        finally:
            if hook is not None:
                hook.remove()
        return (seen[-1][rows, places] if seen else None), logits[rows, places]

    def _batches(self, answers: Sequence[TokenAnswer]) -> list[Sequence[TokenAnswer]]:
        return [answers[i : i + self._batch_size] for i in range(0, len(answers), self._batch_size)]


def answer_sums(values: Tensor, answers: Sequence[TokenAnswer]) -> Tensor:
    """Sums of `values`, shape `(places,)`, over the places of each answer: shape `(answers,)`.

    They are added on the CPU, in order: on a GPU the order, and so the last bits, would vary.
    """
    owners = torch.repeat_interleave(torch.tensor([len(answer.ids) for answer in answers]))
    return torch.zeros(len(answers), dtype=values.dtype).index_add_(0, owners, values.cpu()).to(values.device)


def chosen(log_probabilities: Tensor, answers: Sequence[TokenAnswer]) -> Tensor:
    """The log-probabilities of the answers' own tokens: shape `(places,)`."""
    ids = torch.tensor([token for answer in answers for token in answer.ids], device=log_probabilities.device)
    return log_probabilities.gather(1, ids[:, None]).squeeze(1)


def divergence(of: Tensor, reference: Tensor) -> Tensor:
    """KL(of ‖ reference) in nats at each place, from log-probabilities of shape `(places, vocabulary)`: `(places,)`."""
    return (of.exp() * (of - reference)).sum(dim=1)


def _head_alone(module: Any, parameters: ParameterSet) -> nn.Module | None:
    """The output embedding, if all the parameters are in it and nowhere else."""
    head: nn.Module | None = module.get_output_embeddings()
    if head is None:
        return None
    tuned = {id(parameter) for parameter in parameters.values()}
    inside = {id(parameter) for parameter in head.parameters()}
    within = set(head.modules())
    outside = {id(p) for other in module.modules() if other not in within for p in other._parameters.values()}
    return head if tuned <= inside and not tuned & outside else None
