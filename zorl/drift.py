"""How far a tuned model has drifted from where it started, from forward passes alone.

A win is cheap if the text may fall apart: whatever a person or a reward does not ask about is free to get worse. Three figures
show it. KL is what tuning has spent, on text of the tuned model alone (the penalty of Ziegler et al. 2019, eq. 2). Perplexity
under the starting model rises when answers turn odd; distinct-2 (Li et al. 2016) falls when they repeat themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from zorl.answer_logits import AnswerLogits, TokenAnswer, chosen, divergence
from zorl.generation import Generation
from zorl.parameters import ParameterSet
from zorl.perturbation import Scratch, replica
from zorl.probe import CENTRE
from zorl.prompts import Answer


def starting_evaluator(model: nn.Module, parameters: ParameterSet) -> Scratch:
    """Runs the model as it is *now*, whatever becomes of it: it copies the tuned parameters and shares everything else.

    Make it before `MeZO` resumes a trajectory, while the parameters hold the base weights.
    """
    kept = {id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for p in parameters.values()}
    module = replica(model)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in kept:
                setattr(part, name, kept[id(parameter)])
    return Scratch(module, ParameterSet((name, kept[id(tensor)]) for name, tensor in parameters.items()))


@dataclass(frozen=True, slots=True)
class Drift:
    """The drift of the current model's answers.

    Attributes:
        kl: the divergence KL(current ‖ start) between the next-token distributions, in nats, averaged over the tokens.
        perplexity: the answers' perplexity under the starting model, as a multiple of that of its own answers.
        distinct_2: the share of distinct word pairs, as a multiple of that of the starting model's own answers.
    """

    kl: float
    perplexity: float
    distinct_2: float


class DriftMeter:
    """Measures drift on fixed prompts, with sampling noise that both models share. The starting model answers once.

    Args:
        current: the policy to measure.
        start: the same policy for the starting model (see `starting_evaluator`).
        reader: reads answers in the current model.
        start_reader: reads answers in the starting model.
        rows: the rows to prompt with; the more, the steadier the figures.
        noise_seed: seeds sampling.

    Raises:
        ValueError: there are no rows, or the starting model answers none of them.
    """

    def __init__(
        self,
        current: Generation,
        start: Generation,
        reader: AnswerLogits,
        start_reader: AnswerLogits,
        rows: Sequence[Mapping[str, Any]],
        noise_seed: int = 0,
    ) -> None:
        if not rows:
            raise ValueError("drift is measured on prompts, and there are none")
        self._current, self._reader, self._start_reader = current, reader, start_reader
        self._rows, self._noise_seed = list(rows), noise_seed
        self._prompts = current.prompt_ids(self._rows)
        (answers,) = start.answers(self._rows, [CENTRE], noise_seed=noise_seed)
        tokens = self._tokens(answers)
        if not tokens:
            raise ValueError("the starting model answered none of the prompts with a single token")
        self._log_perplexity = -chosen(start_reader.log_probabilities(tokens), tokens).mean().item()
        start_reader.forget()
        self._distinct_2 = distinct_2(whole_text(answer) for answer in answers)

    def measure(self) -> Drift:
        """The drift of the current model as it is now."""
        (answers,) = self._current.answers(self._rows, [CENTRE], noise_seed=self._noise_seed)
        tokens = self._tokens(answers)
        if not tokens:  # it no longer says anything
            return Drift(math.inf, math.inf, 0.0)
        now, before = (reader.log_probabilities(tokens) for reader in (self._reader, self._start_reader))
        kl = divergence(now, before).mean().item()
        log_perplexity = -chosen(before, tokens).mean().item()
        for reader in (self._reader, self._start_reader):
            reader.forget()
        distinct = distinct_2(whole_text(answer) for answer in answers)
        return Drift(
            kl,
            math.exp(log_perplexity - self._log_perplexity),
            distinct / self._distinct_2 if self._distinct_2 else math.nan,
        )

    def _tokens(self, answers: Sequence[Answer]) -> list[TokenAnswer]:
        return [
            TokenAnswer(tuple(prompt), tuple(answer.completion_ids))
            for prompt, answer in zip(self._prompts, answers, strict=True)
            if answer.completion_ids
        ]


def distinct_2(texts: Iterable[str]) -> float:
    """The share of distinct pairs of neighbouring words (Li et al. 2016); 0 if there are none."""
    pairs = [pair for text in texts for words in [text.lower().split()] for pair in pairwise(words)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def whole_text(answer: Answer) -> str:
    """What the model wrote: a plain text, or the contents of all messages, each on its own line."""
    completion = answer.completion
    return completion if isinstance(completion, str) else "\n".join(message["content"] for message in completion)
