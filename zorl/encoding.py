"""From prompts to batches of token ids: tokenised once, shortened if too long, batched by length."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray
from torch import Tensor, nn

from zorl.prompts import Prompt, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Prompts whose tokens are cached. At 64 tokens each they take some 30 MB.
CACHED_PROMPTS = 1 << 16
# The cost of one more forward, in tokens: a batch is split if that saves more padding. Measured on two CPU cores with
# a BERT of 22M parameters; results depend on it only in rounding.
FORWARD_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Options:
    """The answers to choose from, as tokens that continue a prompt.

    Scoring an option of tokens t₁ … tₙ needs the logits behind the prompt, behind t₁, … and behind tₙ₋₁. So options
    that begin alike share an input, and options of one token need none of their own.

    Attributes:
        tokens: for each of the L options its tokens.
        suffixes: what to append to the prompt, for as few inputs as cover all the options.
        suffix_of: for each option the index of a suffix that begins with tokens[:-1].
    """

    tokens: tuple[tuple[int, ...], ...]
    suffixes: tuple[tuple[int, ...], ...]
    suffix_of: tuple[int, ...]

    @classmethod
    def of(cls, tokens: Sequence[Sequence[int]]) -> Options:
        options = tuple(tuple(option) for option in tokens)
        prefixes = sorted({option[:-1] for option in options})  # sorted: whatever begins with p follows it directly
        suffixes = [p for p, q in zip_longest(prefixes, prefixes[1:]) if q is None or q[: len(p)] != p]
        covers = tuple(next(i for i, s in enumerate(suffixes) if s[: len(o) - 1] == o[:-1]) for o in options)
        return cls(options, tuple(suffixes), covers)

    @property
    def longest(self) -> int:
        """The tokens of the longest option."""
        return max(map(len, self.tokens))


@dataclass(frozen=True, slots=True)
class Encoded:
    """One prompt's tokens.

    Attributes:
        ids: int32, shape `(T,)`.
        position: the index in `ids` whose logits predict the answer's first token.
        options: the answers to choose from; None if the answer is generated.
    """

    ids: NDArray[np.int32]
    position: int
    options: Options | None = None

    @property
    def length(self) -> int:
        """The number of tokens of the longest input made from this prompt."""
        return len(self.ids) + (self.options.longest - 1 if self.options is not None else 0)

    @property
    def choices(self) -> Options:
        """The options, for a prompt that has some."""
        assert self.options is not None
        return self.options


class ContextTokenizer:
    """Tokenises text for a model to continue: with the special tokens that the tokenizer puts in front, without those behind.

    Args:
        tokenizer: any of transformers' tokenizers.
        prompt: gives the options of its chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> None:
        self.tokenizer = tokenizer
        self._chat_options = dict(prompt.chat_template_kwargs or {})
        plain, full = self.plain(["a"])[0], self.plain(["a"], special=True)[0]
        starts = [i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain]
        self._leading = full[: starts[0]] if starts else []

    def plain(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Token ids of texts, with the tokenizer's own special tokens or without."""
        if not texts:
            return []
        encoding = self.tokenizer(
            list(texts),
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # over-long texts are handled here
        )
        return encoding["input_ids"]

    def text(self, rendered: Rendered, *, strip: bool = False) -> str:
        """The text to continue: through the chat template for a chat; `strip` drops spaces at the end of plain text."""
        if rendered.messages:
            return self._chat_text(rendered.messages)
        return rendered.before.rstrip(" ") if strip else rendered.before

    def ids(self, rendered: Sequence[Rendered], texts: Sequence[str]) -> list[list[int]]:
        """Token ids of `texts`, which `text` made from `rendered`. Never empty."""
        contexts = [
            ids if prompt.messages else [*self._leading, *ids]  # a chat template writes the special tokens itself
            for prompt, ids in zip(rendered, self.plain(texts), strict=True)
        ]
        start = [i for i in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if i is not None][:1]
        if not all(contexts) and not start:
            raise ValueError(
                "a prompt has no tokens, and the tokenizer has neither a bos nor an eos token to start with"
            )
        return [ids or start for ids in contexts]

    def continuations(self, contexts: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text as it is tokenised behind its context, or alone if a token spans both."""
        before = self.plain(contexts)
        both = self.plain([context + text for context, text in zip(contexts, texts, strict=True)])
        alone = self.plain(texts)
        return [
            ids[len(start) :] if ids[: len(start)] == start else single
            for start, ids, single in zip(before, both, alone, strict=True)
        ]

    def _chat_text(self, messages: Sequence[tuple[str, str]]) -> str:
        """The conversation as the model was trained to see it.

        Raises:
            ValueError: the tokenizer has no chat template, or the template refuses the conversation, as some do a system message.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"the prompt is a chat, but the tokenizer {type(self.tokenizer).__name__} has no chat_template;"
                " use an instruct model's tokenizer, or a plain text prompt"
            )
        open_reply = messages[-1][0] == "assistant"  # the reply has begun and is continued
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages],
                tokenize=False,
                add_generation_prompt=not open_reply,
                continue_final_message=open_reply,
                **self._chat_options,
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        return str(text)


class PromptEncoder:
    """Tokenises rows, each distinct prompt once.

    Args:
        prompt: the template.
        tokenise: turns rendered prompts into tokens.
        max_length: no input gets longer than this many tokens: the row's values are cut, longest first, never the
            template, the chat's own text or the mask.
        keep: which end of a value is kept when it is cut.
        vocabulary: the number of rows of the model's input embedding.

    Raises:
        ValueError: when called, for a row whose prompt is too long even with all its values cut to nothing, or holds a
            token that the model does not have.
    """

    def __init__(
        self,
        prompt: Prompt,
        tokenise: Callable[[Sequence[Rendered]], list[Encoded]],
        *,
        max_length: int,
        keep: Literal["start", "end"],
        vocabulary: int,
    ) -> None:
        if max_length < 1:
            raise ValueError(f"prompts need room for at least one token, but max_length leaves {max_length}")
        self._prompt = prompt
        self._tokenise = tokenise
        self._max_length = max_length
        self._keep: Literal["start", "end"] = keep
        self._vocabulary = vocabulary
        self._cache: dict[Rendered, Encoded] = {}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[Encoded]:
        rendered = [self._prompt.render(row) for row in rows]
        cache = self._cache
        missing = {key: row for key, row in zip(rendered, rows, strict=True) if key not in cache}
        for (key, row), encoded in zip(missing.items(), self._tokenise(list(missing)) if missing else (), strict=True):
            cache[key] = encoded if encoded.length <= self._max_length else self._shortened(row)
            if cache[key].ids.max() >= self._vocabulary:
                raise ValueError(
                    f"the tokenizer gives the token {cache.pop(key).ids.max()}, and the model's vocabulary has"
                    f" {self._vocabulary} tokens: they do not belong together"
                )
        result = [cache[key] for key in rendered]
        while len(cache) > CACHED_PROMPTS:
            del cache[next(iter(cache))]  # the oldest
        return result

    def _shortened(self, row: Mapping[str, Any]) -> Encoded:
        """The row with its values cut to the largest number of characters that fits, found by bisection."""

        def cut(limit: int) -> Encoded:
            return self._tokenise([self._prompt.render(row, limit=limit, keep=self._keep)])[0]

        best = cut(0)
        if best.length > self._max_length:
            longest = "" if self._prompt.options is None else " and the row's longest option"
            raise ValueError(
                f"the template {self._prompt.template!r}{longest} alone takes {best.length} tokens, and there is room for"
                f" {self._max_length}; shorten it, or raise max_length"
            )
        fits, too_long = 0, max(len(str(value)) for value in row.values()) + 1
        while too_long - fits > 1:
            limit = (fits + too_long) // 2
            encoded = cut(limit)
            if encoded.length <= self._max_length:
                fits, best = limit, encoded
            else:
                too_long = limit
        return best


def longest_input(module: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest input, in tokens, by the model's position embeddings and its tokenizer (`sys.maxsize`: no limit)."""
    config: Any = module.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)  # rotary or none: may be absent
    limits = [sys.maxsize, tokenizer.model_max_length]
    if positions is not None and positions > 0:
        # peft's prompt and prefix tuning put tokens of their own in front.
        virtual = getattr(getattr(module, "active_peft_config", None), "num_virtual_tokens", 0)
        limits.append(positions - first_position(module) - virtual)
    return int(min(limits))


def first_position(module: nn.Module) -> int:
    """The position of an input's first token in the model's table: 0, but padding_idx + 1 in RoBERTa and its kin."""
    config: Any = module.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    tables = [m for m in module.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == positions]
    return max((t.padding_idx + 1 for t in tables if t.padding_idx is not None), default=0)


def length_buckets(lengths: Sequence[int], batch_size: int, overhead: int = FORWARD_TOKENS) -> list[list[int]]:
    """Splits prompts, longest first, into the batches that are cheapest to run, padding included.

    Args:
        lengths: in tokens.
        batch_size: the most prompts per batch.
        overhead: the cost of one more batch, in tokens.

    Returns:
        Indices into `lengths`, batch by batch.
    """
    n = len(lengths)
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    width = np.asarray(lengths, dtype=np.int64)[order]
    # cost[j]: the cost of the first j prompts, whose last batch starts at start[j] and is as wide as its first prompt.
    cost, start = np.zeros(n + 1, dtype=np.int64), np.zeros(n + 1, dtype=np.int64)
    size = np.arange(min(batch_size, n), 0, -1)
    for j in range(1, n + 1):
        first = max(0, j - batch_size)
        totals = cost[first:j] + width[first:j] * size[first - j :]
        start[j] = first + totals.argmin()
        cost[j] = totals[start[j] - first] + overhead
    buckets: list[list[int]] = []
    while n:
        buckets.append(order[start[n] : n].tolist())
        n = int(start[n])
    return buckets[::-1]


def padded(
    ids: Sequence[NDArray[np.int32]], pad_id: int, side: Literal["left", "right"], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both int64 of shape `(len(ids), T)`."""
    width = max(map(len, ids))
    tokens = np.full((len(ids), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(ids), width), dtype=np.int64)
    for i, row in enumerate(ids):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[i, where] = row
        mask[i, where] = 1
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with: the attention mask hides it, so any will do if the tokenizer has none."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(i for i in candidates if i is not None))
