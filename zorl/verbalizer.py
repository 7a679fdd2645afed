"""Label words and options as tokens: where a prompt is read, and which tokens are compared there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from zorl.encoding import ContextTokenizer, Encoded, Options
from zorl.prompts import Prompt, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Verbalizer:
    """Tokenises prompts together with the label words, or the rows' own options, that may complete them.

    A word's tokens are those it has in the place of `{mask}`: behind a space they often differ from those at the start of
    a text (RoBERTa, GPT-2 and Llama have a token for " great", and another for "great").

    Args:
        tokenizer: the model's tokenizer.
        prompt: with label words or options.
        masked: the model reads a mask token in the text; otherwise it continues the text before `{mask}`.

    Attributes:
        options: the tokens of the label words, with the template's text behind them if that is scored and is the same for all
            rows. Empty if rows bring their own.

    Raises:
        ValueError: a word is unknown to the tokenizer, is the same token as another, or has several tokens where the
            model fills one mask; or the tokenizer lacks what the prompt needs.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, masked: bool) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._masked = masked
        self._contexts = ContextTokenizer(tokenizer, prompt)
        if masked and tokenizer.mask_token_id is None:
            raise ValueError(f"the model fills masks, but the tokenizer {type(tokenizer).__name__} has no mask token")
        if masked and prompt.chat:
            raise ValueError("a chat needs a causal language model, and this one fills masks")
        literal = prompt.literal_before_mask
        # The spaces before the word belong to its tokens, not to the text that the model continues.
        self._gap = "" if prompt.chat else literal[len(literal.rstrip(" ")) :]
        after = prompt.literal_after_mask
        self._scores_after = not masked and (prompt.fields_after_mask != () or any(map(str.isalnum, after)))
        self._per_row = prompt.options is not None or (not masked and prompt.fields_after_mask != ())
        words = list((prompt.label_words or {}).values())
        self._words = [self._gap + word for word in words]
        alone = self._in_template(self._words)
        self._check(words, alone)
        whole = [word + after for word in self._words] if self._scores_after else self._words
        self.options = Options.of(alone if whole == self._words else self._in_template(whole))

    @property
    def single_tokens(self) -> Tensor | None:
        """The label words as one token each, int64, shape `(labels,)`; None if more than that is compared."""
        if self._per_row or self.options.longest > 1:
            return None
        return torch.tensor([option[0] for option in self.options.tokens])

    def __call__(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """Tokens, position and options of each prompt."""
        return self._masked_prompts(rendered) if self._masked else self._causal_prompts(rendered)

    def _masked_prompts(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        mask = str(self._tokenizer.mask_token)
        if any(prompt.messages for prompt in rendered):
            raise ValueError(
                "a row holds a conversation, which needs a causal language model, and this one fills masks"
            )
        texts = [prompt.before + mask + prompt.after for prompt in rendered]
        encoded = []
        for prompt, ids in zip(rendered, self._contexts.plain(texts, special=True), strict=True):
            tokens = np.array(ids, dtype=np.int32)
            masks = np.flatnonzero(tokens == self._tokenizer.mask_token_id)
            ours = masks[prompt.before.count(mask)]  # the data may hold mask tokens, too
            encoded.append(Encoded(tokens, int(ours), self.options))
        return encoded

    def _causal_prompts(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        texts = [self._contexts.text(prompt, strip=self._gap != "") for prompt in rendered]
        contexts = [np.array(ids, dtype=np.int32) for ids in self._contexts.ids(rendered, texts)]
        options = self._row_options(rendered, texts) if self._per_row else [self.options] * len(contexts)
        return [Encoded(ids, len(ids) - 1, choice) for ids, choice in zip(contexts, options, strict=True)]

    def _row_options(self, rendered: Sequence[Rendered], texts: Sequence[str]) -> list[Options]:
        """Each word, or each of the row's own options, with the row's text behind it."""
        words = [[self._gap + word for word in prompt.options] or self._words for prompt in rendered]
        whole = [
            word + (prompt.after if self._scores_after else "")
            for prompt, of_row in zip(rendered, words, strict=True)
            for word in of_row
        ]
        contexts = [text for text, of_row in zip(texts, words, strict=True) for _ in of_row]
        tokens = self._contexts.plain(whole) if self._prompt.chat else self._contexts.continuations(contexts, whole)
        if not all(tokens):
            raise ValueError(f"the tokenizer makes no tokens of the option {whole[tokens.index([])]!r}")
        ends = np.cumsum([len(of_row) for of_row in words]).tolist()
        return [Options.of(tokens[end - len(of_row) : end]) for end, of_row in zip(ends, words, strict=True)]

    def _in_template(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts in the place of `{mask}`, whatever the row.

        The template's own text before the mask tells how they are split. If there is none (a column comes right
        before, or the word opens a reply), they are tokenised alone.
        """
        literal = self._prompt.literal_before_mask
        if literal == "" or self._prompt.chat:
            return self._contexts.plain(texts)
        context = ("" if self._prompt.opens_with_mask else "a") + literal.rstrip(" ")
        return self._contexts.continuations([context] * len(texts), texts)

    def _check(self, words: Sequence[str], tokens: Sequence[Sequence[int]]) -> None:
        seen: dict[tuple[int, ...], str] = {}
        for word, ids in zip(words, tokens, strict=True):
            pieces = [str(piece) for piece in self._tokenizer.convert_ids_to_tokens(list(ids))]
            if not ids or self._tokenizer.unk_token_id in ids:
                raise ValueError(f"the tokenizer does not know the label word {word!r}: it becomes {pieces}")
            if self._masked and len(ids) > 1:
                raise ValueError(
                    f"the label word {word!r} is {len(ids)} tokens ({', '.join(map(repr, pieces))}), and a masked"
                    " language model fills one mask; choose a word that is one token"
                )
            twin = seen.setdefault(tuple(ids), word)
            if twin != word:
                raise ValueError(f"the label words {twin!r} and {word!r} are the same to the tokenizer: {pieces}")
