"""Label-word scores: how likely each label's word is, of a masked or a causal language model, at points around θ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zorl import processes
from zorl.choosing import Choosing
from zorl.encoding import Encoded, PromptEncoder, longest_input, pad_token_id
from zorl.fitting_forwards import FittingForwards
from zorl.likelihood import Likelihood
from zorl.position_logits import is_masked
from zorl.probe import CENTRE
from zorl.prompts import Answer, Prompt
from zorl.verbalizer import Verbalizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zorl.perturbation import Evaluator
    from zorl.probe import Point


class LabelWords(Choosing):
    """Answers rows with the label whose word is most likely at the prompt's `{mask}`.

    A masked language model is read at its mask token, a causal one at the end of the text before `{mask}`. Words of one
    token need one forward and only their own rows of the vocabulary (Schick & Schütze 2021, eq. 1). Words of several
    tokens, on causal models, are scored by their log-likelihood under the whole vocabulary. Text behind `{mask}`
    belongs to what a masked model reads; on a causal model it is scored as a part of each word, or dropped if it is
    punctuation alone.

    Only the positions and vocabulary rows that are needed go through the model's head.

    Args:
        evaluator: runs the model at points.
        processing_class: the model's tokenizer. Its padding side does not matter.
        prompt: with label words.
        batch_size: inputs in a forward, at most, those of all points together that it holds.
        max_length: tokens in an input, at most; by default what the model reads. The row's values are cut to fit (at
            their end for masked models, at their start for causal ones), never the template.
        average_tokens: score a word of several tokens by the mean of their log-likelihoods, not the sum.

    Raises:
        ValueError: the prompt has no label words, or a word does not suit the model; the message says why.
        TypeError: the model has no language-model head, or is an encoder-decoder.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        processing_class: PreTrainedTokenizerBase,
        prompt: Prompt,
        *,
        batch_size: int = 64,
        max_length: int | None = None,
        average_tokens: bool = False,
    ) -> None:
        if prompt.label_words is None:
            raise ValueError(f"the prompt {prompt.template!r} has no label_words; without them use Generation")
        module = evaluator.module
        self.evaluator = evaluator
        self.prompt = prompt
        self.forwards = FittingForwards(evaluator, batch_size)
        self.masked = is_masked(module)
        head = prompt.label_head
        self._bias = None if head is None else torch.tensor(head.bias)  # (L,)
        self._weight = None if head is None or head.weight is None else torch.tensor(head.weight)  # (L, H)
        verbalizer = Verbalizer(processing_class, prompt, masked=self.masked)
        self._likelihood = Likelihood(
            self.forwards,
            pad_token_id(processing_class),
            label_rows=verbalizer.single_tokens,
            average_tokens=average_tokens,
        )
        if self._weight is not None:
            self._check_head(self._weight, verbalizer.single_tokens)
        self._encode = PromptEncoder(
            prompt,
            verbalizer,
            max_length=longest_input(module, processing_class) if max_length is None else max_length,
            keep="start" if self.masked else "end",
            vocabulary=module.get_input_embeddings().weight.shape[0],
        )

    @property
    def label_names(self) -> list[str]:
        """The labels in the order of the scores' last dimension."""
        return list(self.prompt.labels)

    def scores(self, rows: Sequence[Mapping[str, Any]], points: Sequence[Point]) -> Tensor:
        """Log-probabilities of the labels, normalised over the labels.

        Returns:
            float32 of shape `(len(points), len(rows), labels)`. NaN where the logits are.
        """
        parts = processes.share(rows, lambda mine: {"scores": self._scores(mine, points)})
        return torch.cat([part["scores"] for part in parts], dim=1)

    def _scores(self, rows: Sequence[Mapping[str, Any]], points: Sequence[Point]) -> Tensor:
        words, states = self._words_and_states(self._encode(rows), points, with_states=self._weight is not None)
        if self._weight is not None and len(rows) and len(points):
            if states is None:
                raise ValueError(
                    "the prompt's label_head reads the state before the output embedding, which this model never calls"
                )
            words = words + (states @ self._weight.to(states.device).T).to(words.device)
        return words if self._bias is None else (words + self._bias.to(words.device)).log_softmax(dim=-1)

    def every_answer(self, rows: Sequence[Mapping[str, Any]]) -> list[list[Answer]]:
        """Each label as the answer to each row, as `[row][label]`."""
        names = self.prompt.labels
        return [
            [Answer(name, list(tokens)) for name, tokens in zip(names, one.choices.tokens, strict=True)]
            for one in self._encode(rows)
        ]

    def words_and_states(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor | None]:
        """What a label head is fitted to: the words' own scores at θ, without the head, and the state they are read from.

        Returns:
            Log-probabilities of shape `(rows, labels)`, and states of shape `(rows, width)`, both float32 on the CPU. No
            states where words have several tokens, which are read at several positions, or where the model's head uses the
            output embedding's weight without calling it.
        """
        parts = processes.share(rows, self._own_words_and_states)
        words, states = [part["words"] for part in parts], [part["states"] for part in parts if "states" in part]
        return torch.cat(words), torch.cat(states) if states else None

    def _own_words_and_states(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        words, states = self._words_and_states(self._encode(rows), [CENTRE], with_states=True)
        return {"words": words[0].cpu()} | ({} if states is None else {"states": states[0].cpu()})

    def _words_and_states(
        self, encoded: Sequence[Encoded], points: Sequence[Point], *, with_states: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The words' own log-probabilities `(points, rows, labels)`, and if asked for the states `(points, rows, width)`."""
        words, states = self._likelihood(encoded, points, with_states=with_states)
        if not words.numel():
            return words.new_empty(len(points), len(encoded), len(self.prompt.labels)), None
        return words.log_softmax(dim=-1), states

    def _check_head(self, weight: Tensor, label_rows: Tensor | None) -> None:
        if label_rows is None:
            raise ValueError("the prompt's label_head has weights, and these label words have several tokens: drop it")
        width = self._likelihood.logits.width
        if weight.shape[1] != width:
            raise ValueError(
                f"the prompt's label_head is for states of width {weight.shape[1]}, and this model's have {width}"
            )
