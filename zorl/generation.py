"""Text at points around θ: the only caller of `generate`.

The points of a probe are compared, so only θ should differ between them. All of them see the same prompts and the same
sampling noise (common random numbers; Glasserman & Yao 1992). Sampling uses the Gumbel-max trick (Gumbel 1954): the token
with the largest log p + Gumbel noise is a sample from p. The noise is a hash of (seed, prompt, position, token), so it
depends neither on the batch and its padding nor on the order of calls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from zorl import processes
from zorl.encoding import (
    FORWARD_TOKENS,
    ContextTokenizer,
    Encoded,
    PromptEncoder,
    length_buckets,
    longest_input,
    pad_token_id,
    padded,
)
from zorl.fitting_forwards import FittingForwards
from zorl.offload import computing_device
from zorl.prompts import Answer, Prompt, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zorl.perturbation import Evaluator
    from zorl.probe import Point

_BLOCK = 1 << 18  # noise is computed for this many (row, token) pairs at once, so that it stays in cache
_GPU_BLOCK = 1 << 24  # GPUs prefer few large operations


class Generation:
    """Answers rows with generated text.

    Args:
        evaluator: runs the model at points.
        processing_class: the model's tokenizer. Its padding side does not matter.
        prompt: without label words and options. Rows whose prompt is a conversation get conversational completions.
        max_new_tokens: maximum tokens per answer.
        temperature: divides the logits; sampling at 1 follows the model's own probabilities.
        top_k: sample among this many of the most likely tokens.
        top_p: sample among the most likely tokens that together have this probability.
        greedy: take the most likely token; temperature, top_k and top_p then have no effect.
        stop: answers end before this text, as well as at an end-of-sequence token; None for no such text.
        batch_size: maximum prompts per batch, counting those of all points that it evaluates.
        max_length: maximum tokens of a prompt and its answer; by default the most that the model reads. The start of the
            row's values is cut to fit, never the template.

    Raises:
        ValueError: an argument is out of its range, or the prompt has answers to choose from.
        TypeError: the model is not a causal language model.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        processing_class: PreTrainedTokenizerBase,
        prompt: Prompt,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        greedy: bool = False,
        stop: str | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
    ) -> None:
        module = evaluator.module
        if prompt.chooses:
            raise ValueError(
                f"the prompt {prompt.template!r} has label_words, options or classes to choose from; generated text needs none"
            )
        if module.config.is_encoder_decoder or not module.can_generate():
            raise TypeError(f"text needs a causal language model, which {type(module).__name__} is not")
        for name, count in (("max_new_tokens", max_new_tokens), ("top_k", top_k)):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, not {count}")
        if not 0 < temperature < float("inf"):
            raise ValueError(
                f"temperature must be positive, not {temperature}; for the most likely tokens set greedy=True"
            )
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {top_p}")
        if stop == "":
            raise ValueError(
                "stop must not be empty: every answer would end before it begins; for no such text set stop=None"
            )
        limit = longest_input(module, processing_class) if max_length is None else max_length
        if limit <= max_new_tokens:
            raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for a prompt in {limit} tokens")
        self.evaluator = evaluator
        self.prompt = prompt
        self.forwards = FittingForwards(evaluator, batch_size)
        self.max_new_tokens = max_new_tokens
        self.stop = stop
        self.tokenizer = processing_class
        self._contexts = ContextTokenizer(processing_class, prompt)
        self._greedy = greedy
        self._warpers: list[LogitsProcessor] = []
        if not greedy:
            self._warpers += [] if temperature == 1.0 else [TemperatureLogitsWarper(float(temperature))]
            self._warpers += [] if top_k is None else [TopKLogitsWarper(top_k)]
            self._warpers += [] if top_p is None else [TopPLogitsWarper(top_p)]
        own = module.generation_config.eos_token_id  # one id, several, or none
        special = dict(zip(processing_class.all_special_tokens, processing_class.all_special_ids, strict=True))
        # A stop string that is a special token is none of the text.
        ends = {*(own if isinstance(own, list) else [own]), processing_class.eos_token_id, special.get(stop or "")}
        self.end_ids = sorted(ends - {None})
        self._pad_id = pad_token_id(processing_class)
        # Everything else, such as a repetition penalty, comes from the model's own generation_config.
        self._settings: dict[str, Any] = {
            "do_sample": False,  # sampling, with the next three settings, is done by the logits processors
            "temperature": 1.0,
            "top_k": 50,  # the value that means nothing without do_sample
            "top_p": 1.0,
            "num_beams": 1,
            "eos_token_id": self.end_ids or None,
            "pad_token_id": self._pad_id,
            "use_cache": True,
            "cache_implementation": "dynamic",  # a new one in every call: none is read at another θ than it was filled at
            "return_dict_in_generate": False,
        }
        self._encode = PromptEncoder(
            prompt,
            self._tokenise,
            max_length=limit - max_new_tokens,
            keep="end",
            vocabulary=module.get_input_embeddings().weight.shape[0],
        )

    def answers(
        self, rows: Sequence[Mapping[str, Any]], points: Sequence[Point], *, noise_seed: int = 0
    ) -> list[list[Answer]]:
        """The answer to each row at each point, as `[point][row]`.

        Args:
            noise_seed: any integer; the same one gives every point, and every call, the same noise for a prompt.

        Raises:
            FloatingPointError: the model's logits are NaN.
        """
        parts = processes.share(rows, lambda mine: _packed(self._completions(mine, points, noise_seed)))
        shares = [_unpacked(part, len(points)) for part in parts]
        conversational = [self.prompt.render(row).conversational for row in rows]
        answers = []
        for i in range(len(points)):
            completions = [ids for of_share in shares for ids in of_share[i]]
            answers.append(
                [
                    Answer([{"role": "assistant", "content": text}] if chat else text, ids)
                    for text, ids, chat in zip(self._texts(completions), completions, conversational, strict=True)
                ]
            )
        return answers

    def _completions(
        self, rows: Sequence[Mapping[str, Any]], points: Sequence[Point], noise_seed: int
    ) -> list[list[list[int]]]:
        """The tokens of the answer to each row at each point, as `[point][row]`."""
        if not rows:
            return [[] for _ in points]
        encoded = self._encode(rows)
        overhead = FORWARD_TOKENS * self.max_new_tokens  # a batch takes one forward pass per token

        def prepare(inputs: int) -> Callable[[int], list[list[list[int]]]]:
            buckets = length_buckets([one.length for one in encoded], inputs, overhead)

            def forward(copies: int) -> list[list[list[int]]]:
                completions: list[list[list[int]]] = [[[]] * len(encoded) for _ in range(copies)]
                for bucket in buckets:
                    found = iter(self._generate([encoded[i] for i in bucket] * copies, noise_seed))
                    for of_copy in completions:
                        for i in bucket:
                            of_copy[i] = next(found)
                return completions

            return forward

        return self.forwards(points, prepare, inputs=len(encoded))

    def _texts(self, completions: list[list[int]]) -> list[str]:
        """What the tokens say, without special tokens and up to the stop string."""
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True) if completions else []
        return [cut_at(text, self.stop) for text in texts]

    def prompt_ids(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """The tokens of each row's prompt, as the model is given them to continue."""
        return [encoded.ids.tolist() for encoded in self._encode(rows)]

    def _generate(self, prompts: Sequence[Encoded], noise_seed: int) -> list[list[int]]:
        """Token ids of the answers, each up to and including its end-of-sequence token or the end of the stop string."""
        module = self.evaluator.module
        device = computing_device(module)
        tokens, mask = padded([one.ids for one in prompts], self._pad_id, "left", device)
        check = _NanCheck(device)
        processors: list[LogitsProcessor] = [check, *self._warpers]
        if not self._greedy:
            processors.append(GumbelNoise([one.ids for one in prompts], noise_seed, tokens.shape[1]))
        criteria = [] if self.stop is None else [_Stopped(self.stop, self.tokenizer, tokens.shape[1])]
        output = module.generate(
            input_ids=tokens,
            attention_mask=mask,
            generation_config=GenerationConfig(**self._settings, **self._length(tokens.shape[1])),
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList(criteria),
        )
        if bool(check.found):
            raise FloatingPointError(
                "the model's logits are NaN while it generates: its weights, or what it makes of them, are out of range"
            )
        return [self._until_end(ids) for ids in output[:, tokens.shape[1] :].tolist()]

    def _length(self, width: int) -> dict[str, int]:
        """The limit in the unit of the model's own limit, if it has one: transformers warns about limits in different units."""
        if self.evaluator.module.generation_config.max_new_tokens is not None:
            return {"max_new_tokens": self.max_new_tokens}
        return {"max_length": width + self.max_new_tokens}

    def _until_end(self, ids: list[int]) -> list[int]:
        ids = ids[: next((i + 1 for i, token in enumerate(ids) if token in self.end_ids), len(ids))]
        if self.stop is None or self.stop not in self.tokenizer.decode(ids, skip_special_tokens=True):
            return ids
        starts = (ids[:n] for n in range(1, len(ids) + 1))
        return next(start for start in starts if self.stop in self.tokenizer.decode(start, skip_special_tokens=True))

    def _tokenise(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        texts = [self._contexts.text(prompt) for prompt in rendered]
        return [Encoded(np.array(ids, dtype=np.int32), len(ids) - 1) for ids in self._contexts.ids(rendered, texts)]


def cut_at(text: str, stop: str | None) -> str:
    """The text before the stop string; all of it where the string is None or does not occur."""
    return text if stop is None else text.partition(stop)[0]


class GumbelNoise(LogitsProcessor):
    """Adds standard Gumbel noise to scores, so that the largest is a sample from their softmax.

    Args:
        prompts: token ids of each row's prompt, without padding: rows with the same prompt get the same noise.
        seed: any integer.
        width: tokens before the first generated one, padding included.
    """

    def __init__(self, prompts: Sequence[Sequence[int] | np.ndarray], seed: int, width: int) -> None:
        self._streams = [_stream(prompt, seed) for prompt in prompts]
        self._width = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores with noise, both of shape `(rows, vocabulary)`."""
        position = (input_ids.shape[1] - self._width).to_bytes(8, "little")
        digests = b"".join(hashlib.blake2b(stream + position, digest_size=8).digest() for stream in self._streams)
        keys = torch.from_numpy(np.frombuffer(digests, dtype="<i4").reshape(-1, 2).copy()).to(scores.device)
        noisy = torch.empty_like(scores)
        rows = max(1, (_BLOCK if scores.device.type == "cpu" else _GPU_BLOCK) // scores.shape[1])
        for start in range(0, len(scores), rows):
            block = slice(start, start + rows)
            torch.add(scores[block], gumbel(keys[block], scores.shape[1]), out=noisy[block])
        return noisy


class _NanCheck(LogitsProcessor):
    """Remembers whether any score was NaN, without waiting for the device at each token."""

    def __init__(self, device: torch.device) -> None:
        self.found = torch.zeros((), dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.found |= scores.isnan().any()
        return scores


class _Stopped(StoppingCriteria):
    """Which rows have generated the stop string.

    Texts are looked at, because a stop string may be part of a token or of several. transformers' own criterion would also find
    one that begins in the prompt.

    Args:
        width: tokens before the first generated one, padding included.
    """

    def __init__(self, stop: str, tokenizer: PreTrainedTokenizerBase, width: int) -> None:
        self._stop = stop
        self._tokenizer = tokenizer
        self._width = width

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """A truth value per row."""
        texts = self._tokenizer.batch_decode(input_ids[:, self._width :], skip_special_tokens=True)
        return torch.tensor([self._stop in text for text in texts], device=input_ids.device)


def _packed(completions: list[list[list[int]]]) -> dict[str, Tensor]:
    """Tokens `[point][row]` as two tensors, whatever their lengths."""
    flat = [ids for of_point in completions for ids in of_point]
    return {"ids": torch.tensor([i for ids in flat for i in ids], dtype=torch.int64),
            "lengths": torch.tensor([len(ids) for ids in flat], dtype=torch.int64)}  # fmt: skip


def _unpacked(packed: Mapping[str, Tensor], points: int) -> list[list[list[int]]]:
    """The tokens that were packed, as `[point][row]`."""
    ids = [part.tolist() for part in packed["ids"].split(packed["lengths"].tolist())] if len(packed["lengths"]) else []
    rows = len(ids) // points if points else 0
    return [ids[i * rows : (i + 1) * rows] for i in range(points)]


def gumbel(keys: Tensor, n: int) -> Tensor:
    """Standard Gumbel noise, −log(−log u), for n tokens under each key: a pure function of (key, token).

    Args:
        keys: int32, shape `(rows, 2)`.

    Returns:
        float32, shape `(rows, n)`, between −2.82 and 16.64: u has 23 bits, and is neither 0 nor 1.
    """
    token = torch.arange(n, dtype=torch.int32, device=keys.device)
    x = _mix_(token ^ keys[:, :1])
    x = _mix_(x.add_(keys[:, 1:]))
    u = x.bitwise_right_shift_(9).bitwise_and_((1 << 23) - 1).float()
    return u.add_(0.5).mul_(2.0**-23).log_().neg_().log_().neg_()


def _mix_(x: Tensor) -> Tensor:
    """A bijection of 32-bit words with low bias (C. Wellons' lowbias32), in place; int32 arithmetic wraps around."""
    part = torch.empty_like(x)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)), (16, 1)):
        torch.bitwise_right_shift(x, shift, out=part)
        x ^= part.bitwise_and_((1 << (32 - shift)) - 1)  # int32 shifts copy the sign into the gap
        x *= factor
    return x


def _stream(prompt: Sequence[int] | np.ndarray, seed: int) -> bytes:
    """Identifies the noise of a prompt under a seed, for all positions."""
    ids = np.asarray(prompt, dtype="<i4")
    return hashlib.blake2b(f"{seed}:".encode() + ids.tobytes(), digest_size=16).digest()
