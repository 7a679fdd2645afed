"""Label-word scores: how likely each label's word is, of a masked or a causal language model, at points around θ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from zorl.encoding import Encoded, Options, PromptEncoder, length_buckets, longest_input, pad_token_id, padded
from zorl.probe import CENTRE
from zorl.prompts import Answer, Prompt
from zorl.shared_prefix import SharedPrefix, can_share
from zorl.verbalizer import Verbalizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zorl.perturbation import Evaluator
    from zorl.probe import Point


@dataclass(frozen=True, slots=True)
class _Batch:
    """Inputs of one forward, made once and used at every point. R rows give S ≥ R inputs, read at K positions each."""

    rows: Tensor  # (R,) where the results go
    inputs: dict[str, Any]  # input_ids and attention_mask (S, T)
    positions: Tensor  # (S, K)
    # The options of all rows, R·L of them, row by row; absent where all are of one token.
    input_of: Tensor | None = None  # (R·L, 1) the input that an option is read from
    tokens: Tensor | None = None  # (R·L, K) padded with 0
    weights: Tensor | None = None  # (R·L, K) 1 for a token, or 1/n for the mean over n; 0 for padding
    shared: SharedPrefix | None = None  # the same inputs, where it pays to compute their prompts once


class LabelWords:
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
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        module = evaluator.module
        _check_model(module)
        self.evaluator = evaluator
        self.prompt = prompt
        self.masked = _is_masked(module)
        self.batch_size = batch_size
        self.average_tokens = average_tokens
        self._pad_id = pad_token_id(processing_class)
        self._head = _head(module)
        self._can_share = not self.masked and can_share(module)
        self._output = module.get_output_embeddings()
        head = prompt.label_head
        self._bias = None if head is None else torch.tensor(head.bias)  # (L,)
        self._weight = None if head is None or head.weight is None else torch.tensor(head.weight)  # (L, H)
        verbalizer = Verbalizer(processing_class, prompt, masked=self.masked)
        self._label_rows = verbalizer.single_tokens
        if self._weight is not None:
            self._check_head(self._weight)
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
            float32 of shape `(len(points), len(rows), labels)`, on the model's device. NaN where the logits are.
        """
        return self._scores(self._encode(rows), points)

    def answers(
        self, rows: Sequence[Mapping[str, Any]], points: Sequence[Point], *, noise_seed: int = 0
    ) -> list[list[Answer]]:
        """The best label of each row at each point, as `[point][row]`; of equals the first in `label_words`.

        Args:
            noise_seed: unused, since nothing is sampled.

        Raises:
            FloatingPointError: the model's scores are NaN.
        """
        encoded = self._encode(rows)
        scores = self._scores(encoded, points)
        check_not_nan(scores, points)
        names = self.prompt.labels
        best = scores.argmax(dim=-1).tolist() if rows else [[]] * len(points)
        return [
            [Answer(names[i], list(_options(one).tokens[i])) for i, one in zip(chosen, encoded, strict=True)]
            for chosen in best
        ]

    def every_answer(self, rows: Sequence[Mapping[str, Any]]) -> list[list[Answer]]:
        """Each label as the answer to each row, as `[row][label]`."""
        names = self.prompt.labels
        return [
            [Answer(name, list(tokens)) for name, tokens in zip(names, _options(one).tokens, strict=True)]
            for one in self._encode(rows)
        ]

    def words_and_states(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor | None]:
        """What a label head is fitted to: the words' own scores at θ, without the head, and the state they are read from.

        Returns:
            Log-probabilities of shape `(rows, labels)`, and states of shape `(rows, width)`, both float32 on the CPU. No
            states where words have several tokens, which are read at several positions, or where the model's head uses the
            output embedding's weight without calling it.
        """
        encoded = self._encode(rows)
        words, states = self._evaluate(encoded, [CENTRE], with_states=True)
        return words[0].cpu(), None if states is None else states[0].cpu()

    def _scores(self, encoded: Sequence[Encoded], points: Sequence[Point]) -> Tensor:
        scores, states = self._evaluate(encoded, points, with_states=self._weight is not None)
        if self._weight is not None and len(encoded) and len(points):
            if states is None:
                raise ValueError(
                    "the prompt's label_head reads the state before the output embedding, which this model never calls"
                )
            scores = scores + states @ self._weight.to(scores.device).T
        return scores if self._bias is None else (scores + self._bias.to(scores.device)).log_softmax(dim=-1)

    def _evaluate(
        self, encoded: Sequence[Encoded], points: Sequence[Point], *, with_states: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The words' scores `(points, rows, labels)`, and if asked for the states `(points, rows, width)`."""
        device = next(self.evaluator.module.parameters()).device
        if not encoded or not points:
            return torch.empty(len(points), len(encoded), len(self.prompt.labels), device=device), None
        batches = self._batches(encoded, device, self.evaluator.copies(len(points)))
        label_rows = None if self._label_rows is None else self._label_rows.to(device)

        def forward(copies: int) -> list[tuple[Tensor, Tensor | None]]:
            parts = [self._forward(batch, label_rows, copies) for batch in batches]
            back = torch.cat([batch.rows for batch in batches]).argsort()  # from length buckets to the rows' own order
            states = [of_batch for _, of_batch in parts if of_batch is not None] if with_states else []
            every_state = torch.cat(states, dim=1)[:, back] if states else [None] * copies
            return list(zip(torch.cat([scores for scores, _ in parts], dim=1)[:, back], every_state, strict=True))

        found = self.evaluator.evaluate_all(points, forward, head_rows=label_rows)
        states = [of_point for _, of_point in found if of_point is not None]
        return torch.stack([scores for scores, _ in found]), torch.stack(states) if states else None

    def _forward(self, batch: _Batch, label_rows: Tensor | None, copies: int) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of a batch, `(copies, R, L)`; and the states `(copies, R, H)`, of words of one token."""
        if batch.shared is not None:
            logits, states = self._shared_logits(batch.shared, copies), None
        else:
            inputs = {name: t.repeat(copies, 1) if isinstance(t, Tensor) else t for name, t in batch.inputs.items()}
            _, logits, states = self._logits(inputs, batch.positions.repeat(copies, 1))
        if label_rows is not None:  # normalising over the vocabulary first would cancel out
            if logits.shape[-1] != len(label_rows):  # a head that does not call the output embedding computes all rows
                logits = logits[..., label_rows]
            scores = logits[:, 0].float().log_softmax(dim=-1).view(copies, len(batch.rows), -1)
            return scores, None if states is None else states[:, 0].float().view(copies, len(batch.rows), -1)
        assert batch.input_of is not None
        assert batch.tokens is not None
        assert batch.weights is not None
        logits = logits.float().view(copies, -1, *logits.shape[1:])  # (copies, S, K, vocabulary)
        step = torch.arange(batch.tokens.shape[1], device=logits.device)
        normaliser = logits.logsumexp(dim=-1)  # (copies, S, K)
        likelihood = (
            logits[:, batch.input_of, step, batch.tokens] - normaliser[:, batch.input_of, step]
        )  # (copies, R·L, K)
        return (likelihood * batch.weights).sum(dim=2).view(copies, len(batch.rows), -1).log_softmax(dim=-1), None

    def _shared_logits(self, shared: SharedPrefix, copies: int) -> Tensor:
        """Logits of options' first tokens, from the prompts, and of the others, from the cache: `(copies·S, K, vocabulary)`."""
        output, first, _ = self._logits(*shared.first(copies))
        inputs, positions, prompt_of = shared.second(copies, output.past_key_values)
        _, others, _ = self._logits(inputs, positions)
        return torch.cat([first[prompt_of], others], dim=1)

    def _logits(self, inputs: dict[str, Any], positions: Tensor) -> tuple[Any, Tensor, Tensor | None]:
        """What the model returns; and at the positions, `(N, K)`, the logits, `(N, K, vocabulary or label rows)`, and the states
        that they are made of, `(N, K, H)`."""
        size, width = inputs["input_ids"].shape
        narrowed = False
        read: list[Tensor] = []

        def at_positions(hidden: Tensor) -> Tensor:  # (S, T, H) -> (S, K, H)
            virtual = hidden.shape[1] - width  # prompt tuning puts tokens of its own in front
            index = (positions + virtual).unsqueeze(-1)
            return hidden.gather(1, index.expand(-1, -1, hidden.shape[-1]))

        def narrow(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            nonlocal narrowed
            if not args or args[0].ndim != 3 or args[0].shape[0] != size or args[0].shape[1] < width:
                return None
            narrowed = True
            return (at_positions(args[0]), *args[1:])

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read.append(args[0] if args else next(iter(kwargs.values())))

        handles = [self._output.register_forward_pre_hook(note, with_kwargs=True)]
        if self._head is not None:
            handles.append(self._head.register_forward_pre_hook(narrow, prepend=True))
        try:
            output = self.evaluator.module(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        states = read[0] if read else None  # a head may compute with the embedding's weight and never call it
        if narrowed:
            return output, output.logits, states
        return output, at_positions(output.logits), None if states is None else at_positions(states)

    def _check_head(self, weight: Tensor) -> None:
        width = self._output.weight.shape[1]
        if self._label_rows is None:
            raise ValueError("the prompt's label_head has weights, and these label words have several tokens: drop it")
        if weight.shape[1] != width:
            raise ValueError(
                f"the prompt's label_head is for states of width {weight.shape[1]}, and this model's have {width}"
            )

    def _batches(self, encoded: Sequence[Encoded], device: torch.device, copies: int) -> list[_Batch]:
        inputs_per_row = copies * max((len(_options(one).suffixes) for one in encoded), default=1)
        buckets = length_buckets([one.length for one in encoded], max(1, self.batch_size // inputs_per_row))
        return [self._batch(bucket, [encoded[i] for i in bucket], device) for bucket in buckets]

    def _batch(self, rows: list[int], encoded: Sequence[Encoded], device: torch.device) -> _Batch:
        ids = [
            np.concatenate([one.ids, np.asarray(suffix, dtype=np.int32)]) if suffix else one.ids
            for one in encoded
            for suffix in _options(one).suffixes
        ]
        input_ids, mask = padded(ids, self._pad_id, "right", device)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask}
        if not self.masked:
            inputs["use_cache"] = False
        where = torch.tensor(rows, device=device)
        if self._label_rows is not None:
            positions = torch.tensor([[one.position] for one in encoded], device=device)
            return _Batch(where, inputs, positions)
        choices = [_options(one) for one in encoded]
        steps = max(options.longest for options in choices)
        tables = {key: self._table(options, steps) for key, options in {id(o): o for o in choices}.items()}
        n_inputs = [len(options.suffixes) for options in choices]
        first = np.repeat([one.position for one in encoded], n_inputs)
        more = np.array([len(suffix) for options in choices for suffix in options.suffixes])
        read_at = first[:, None] + np.minimum(np.arange(steps), more[:, None])
        offsets = np.cumsum([0, *n_inputs[:-1]])
        input_of = np.concatenate(
            [o + np.array(options.suffix_of) for o, options in zip(offsets, choices, strict=True)]
        )
        tokens, weights = (np.concatenate([tables[id(options)][i] for options in choices]) for i in (0, 1))
        return _Batch(
            where,
            inputs,
            positions=torch.from_numpy(read_at).to(device),
            input_of=torch.from_numpy(input_of[:, None]).to(device),
            tokens=torch.from_numpy(tokens).to(device),
            weights=torch.from_numpy(weights).to(device),
            shared=SharedPrefix.of(encoded, self._pad_id, device) if self._can_share else None,
        )

    def _table(self, options: Options, steps: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Tokens and weights of the options, both of shape `(L, steps)`."""
        tokens = np.zeros((len(options.tokens), steps), dtype=np.int64)
        weights = np.zeros((len(options.tokens), steps), dtype=np.float32)
        for i, option in enumerate(options.tokens):
            tokens[i, : len(option)] = option
            weights[i, : len(option)] = 1 / len(option) if self.average_tokens else 1
        return tokens, weights


def check_not_nan(scores: Tensor, points: Sequence[Point]) -> None:
    """Raises FloatingPointError for the first point at which a label score, of `(points, rows, labels)`, is NaN."""
    for point, broken in zip(points, scores.isnan().flatten(1).any(1).tolist(), strict=True):
        if broken:
            raise FloatingPointError(
                f"the model's label scores are NaN at the point with offset {point.offset} along seed {point.seed}:"
                " its weights, or what it makes of them, are out of range"
            )


def _options(encoded: Encoded) -> Options:
    assert encoded.options is not None  # a verbalizer's always are
    return encoded.options


def _check_model(module: Any) -> None:
    if module.config.is_encoder_decoder:
        raise TypeError(
            f"label words need a masked or a causal language model; {type(module).__name__} is an encoder-decoder"
        )
    if module.get_output_embeddings() is None:
        raise TypeError(
            f"{type(module).__name__} has no language-model head to score words with;"
            " load it with AutoModelForMaskedLM or AutoModelForCausalLM"
        )


def _is_masked(module: nn.Module) -> bool:
    """Whether the model, or what an adapter wraps, is one of transformers' masked language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES  # slow, and loaded by now

    names = set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
    return any(kind.__name__ in names for inner in module.modules() for kind in type(inner).__mro__)


def _head(module: Any) -> nn.Module | None:
    """The largest module that holds the output embedding but not the input embedding.

    All it does is per position, so it can be given the needed positions alone: `cls` in BERT, `lm_head` in RoBERTa and
    causal models, whatever wraps them. None where the two embeddings are one module.
    """
    embeddings, output = module.get_input_embeddings(), module.get_output_embeddings()
    inside = [m for m in module.modules() if output in m.modules()]  # from the outside in
    return next((m for m in inside if embeddings not in m.modules()), None)
