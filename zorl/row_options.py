"""Multiple choice: each row brings its own answers to choose from (COPA, ReCoRD), which a causal language model scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zorl import processes
from zorl.choosing import Choosing
from zorl.encoding import PromptEncoder, longest_input, pad_token_id
from zorl.fitting_forwards import FittingForwards
from zorl.likelihood import Likelihood
from zorl.position_logits import is_masked
from zorl.prompts import Answer, Prompt
from zorl.verbalizer import Verbalizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zorl.perturbation import Evaluator
    from zorl.probe import Point


class RowOptions(Choosing):
    """Answers rows with the likeliest of the texts in their own list of options.

    An option is read behind the text before `{mask}`, and its score is the mean of its tokens' log-likelihoods (Malladi et al.
    2023, Appendix): the sum would prefer short ones. Text behind `{mask}` is scored as a part of each option, or dropped if
    it is punctuation alone.

    Args:
        evaluator: runs the model at points.
        processing_class: the model's tokenizer. Its padding side does not matter.
        prompt: with `options`.
        batch_size: inputs in a forward, at most, those of all points together that it holds. A row has about one for each
            option.
        max_length: tokens in an input, at most; by default what the model reads. The start of the row's values is cut to fit,
            never the template or an option.
        average_tokens: score by the mean; False takes the sum.

    Raises:
        ValueError: the prompt names no options, or the model fills masks.
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
        average_tokens: bool = True,
    ) -> None:
        module = evaluator.module
        if prompt.options is None:
            raise ValueError(f"the prompt {prompt.template!r} names no column of options; label words go to LabelWords")
        if is_masked(module):
            raise ValueError(
                f"a row's own options are texts, which a causal language model scores; {type(module).__name__} fills one mask: "
                "load a causal model, or use label_words"
            )
        self.evaluator = evaluator
        self.prompt = prompt
        self.forwards = FittingForwards(evaluator, batch_size)
        self._likelihood = Likelihood(self.forwards, pad_token_id(processing_class), average_tokens=average_tokens)
        self._encode = PromptEncoder(
            prompt,
            Verbalizer(processing_class, prompt, masked=False),
            max_length=longest_input(module, processing_class) if max_length is None else max_length,
            keep="end",
            vocabulary=module.get_input_embeddings().weight.shape[0],
        )

    def scores(self, rows: Sequence[Mapping[str, Any]], points: Sequence[Point]) -> Tensor:
        """Log-probabilities of the options: their scores, normalised over the row's options.

        Returns:
            float32 of shape `(len(points), len(rows), most options of a row)`: −inf where a row has fewer options. NaN where
            the logits are.
        """
        parts = processes.share(rows, lambda mine: {"likelihood": self._likelihood(self._encode(mine), points)[0]})
        parts = [part for part in parts if part["likelihood"].numel()] or parts[:1]
        widest = max(part["likelihood"].shape[2] for part in parts)
        likelihood = torch.cat(
            [F.pad(part["likelihood"], (0, widest - part["likelihood"].shape[2]), value=-torch.inf) for part in parts],
            dim=1,
        )
        # A row of NaN would spread it to options that are not there.
        return likelihood.log_softmax(dim=-1).masked_fill(likelihood == -torch.inf, -torch.inf)

    def every_answer(self, rows: Sequence[Mapping[str, Any]]) -> list[list[Answer]]:
        """Each option as the answer to its row, as `[row][option]`."""
        return [
            [Answer(text, list(ids)) for text, ids in zip(self.prompt.options_of(row), one.choices.tokens, strict=True)]
            for row, one in zip(rows, self._encode(rows), strict=True)
        ]
