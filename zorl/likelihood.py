"""The likelihood of given continuations of prompts under a language model, at points around θ.

Label words, a row's own options and the text of teacher forcing are all scored here. Each prompt and its continuations become as
few inputs as cover them, and only the positions that predict a continuation's tokens go through the model's head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from zorl.encoding import Encoded, Options, length_buckets, padded
from zorl.fitting_forwards import FittingForwards
from zorl.offload import computing_device
from zorl.position_logits import PositionLogits, is_masked
from zorl.probe import Point
from zorl.shared_prefix import SharedPrefix, can_share


@dataclass(frozen=True, slots=True)
class _Batch:
    """The inputs of one forward, made once and used at every point: S ≥ R inputs for R prompts, read at K positions each."""

    rows: Tensor  # (R,) the prompts' rows
    inputs: dict[str, Any]  # input_ids and attention_mask (S, T)
    positions: Tensor  # (S, K)
    row_of: Tensor  # where the results go: (N,) for the N options of all prompts, (R, 1) for label rows
    option_of: Tensor  # likewise: (N,) or (1, L)
    # None with label rows.
    input_of: Tensor | None = None  # (N, 1) the input that each option is read from
    tokens: Tensor | None = None  # (N, K) padded with 0
    weights: Tensor | None = None  # (N, K) 1 per token, or 1/n for the mean over n tokens; 0 for padding
    shared: SharedPrefix | None = None  # the same inputs, if computing each prompt once pays


class Likelihood:
    """Log-likelihoods of the options of encoded prompts.

    Args:
        forwards: runs the model. Its `batch_size` counts inputs, of which a prompt has one per suffix of its
            `zorl.encoding.Options`.
        pad_id: the token to pad with; the attention mask hides it from the model.
        label_rows: the options, if those of all prompts are the same L single tokens; int64, shape `(L,)`. Then only these
            rows of the vocabulary are computed.
        average_tokens: whether an option of several tokens scores the mean of their log-likelihoods rather than the sum.

    Raises:
        TypeError: the model has no language-model head, or is an encoder-decoder.
    """

    def __init__(
        self,
        forwards: FittingForwards,
        pad_id: int,
        *,
        label_rows: Tensor | None = None,
        average_tokens: bool = False,
    ) -> None:
        module = forwards.evaluator.module
        self.forwards = forwards
        self.logits = PositionLogits(module)
        self._masked = is_masked(module)
        self._can_share = not self._masked and can_share(module)
        self._pad_id = pad_id
        self._label_rows = label_rows
        self._average_tokens = average_tokens

    def __call__(
        self, encoded: Sequence[Encoded], points: Sequence[Point], *, with_states: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The log-likelihood of each option of each prompt at each point.

        Returns:
            The log-likelihoods, float32 of shape `(points, prompts, options)`, on the model's device: −inf where a prompt has
            fewer options than others, NaN where the logits are NaN. With `label_rows` these are logits, which differ from
            log-likelihoods by a constant per prompt.
            With `with_states`, the states that the logits are computed from, `(points, prompts, width)`. Otherwise None, as
            without `label_rows` or if the model's head does not call its output embedding.
        """
        device = computing_device(self.forwards.evaluator.module)
        width = max((len(one.choices.tokens) for one in encoded), default=0)
        if not encoded or not points:
            return torch.empty(len(points), len(encoded), width, device=device), None
        label_rows = None if self._label_rows is None else self._label_rows.to(device)

        def prepare(inputs: int) -> Any:
            batches = self.batches(encoded, device, inputs)

            def forward(copies: int) -> list[tuple[Tensor, Tensor | None]]:
                scores = torch.full((copies, len(encoded), width), -torch.inf, device=device)
                states: list[Tensor] = []
                for batch in batches:
                    found, read = self._forward(batch, label_rows, copies)
                    scores[:, batch.row_of, batch.option_of] = found
                    states += [read] if with_states and read is not None else []
                if not states:
                    return [(of_copy, None) for of_copy in scores]
                # From length buckets back to the order of the rows.
                back = torch.cat([batch.rows for batch in batches]).argsort().to(states[0].device)  # the head's device
                return list(zip(scores, torch.cat(states, dim=1)[:, back], strict=True))

            return forward

        counts = [len(one.choices.suffixes) for one in encoded]
        found = self.forwards(points, prepare, inputs=sum(counts), inputs_per_row=max(counts), head_rows=label_rows)
        states = [of_point for _, of_point in found if of_point is not None]
        return torch.stack([scores for scores, _ in found]), torch.stack(states) if states else None

    def batches(self, encoded: Sequence[Encoded], device: torch.device, inputs: int) -> list[_Batch]:
        """The prompts in batches of similar length, of at most the given number of inputs."""
        parts = [(row, which, one) for row, whole in enumerate(encoded) for which, one in _parts(whole, inputs)]
        inputs_per_part = max(len(one.choices.suffixes) for _, _, one in parts)
        buckets = length_buckets([one.length for _, _, one in parts], max(1, inputs // inputs_per_part))
        return [self._batch([parts[i] for i in bucket], device) for bucket in buckets]

    def _forward(self, batch: _Batch, label_rows: Tensor | None, copies: int) -> tuple[Tensor, Tensor | None]:
        """The log-likelihoods of a batch, `(copies, N)`; or logits, `(copies, R, L)`, and states, `(copies, R, H)`."""
        shared = None if batch.shared is None else self._shared_logits(batch.shared, copies)
        if shared is not None:
            logits, states = shared, None
        else:
            inputs = {name: t.repeat(copies, 1) if isinstance(t, Tensor) else t for name, t in batch.inputs.items()}
            _, logits, states = self.logits(inputs, batch.positions.repeat(copies, 1))
        if label_rows is not None:  # a normaliser would only add a constant
            if logits.shape[-1] != len(label_rows):  # a head that never calls the output embedding computes all rows
                logits = logits[..., label_rows]
            scores = logits[:, 0].float().view(copies, len(batch.rows), -1)
            return scores, None if states is None else states[:, 0].float().view(copies, len(batch.rows), -1)
        assert batch.input_of is not None
        assert batch.tokens is not None
        assert batch.weights is not None
        logits = logits.float().view(copies, -1, *logits.shape[1:])  # (copies, S, K, vocabulary)
        step = torch.arange(batch.tokens.shape[1], device=logits.device)
        normaliser = logits.logsumexp(dim=-1)  # (copies, S, K)
        likelihood = (
            logits[:, batch.input_of, step, batch.tokens] - normaliser[:, batch.input_of, step]
        )  # (copies, N, K)
        return (likelihood * batch.weights).sum(dim=2), None

    def _shared_logits(self, shared: SharedPrefix, copies: int) -> Tensor | None:
        """Logits of the options' first tokens, from the prompts, and of the rest, from the cache: `(copies·S, K, vocabulary)`.

        None if the model keeps no cache that can be continued, as only a forward shows; it is not asked again.
        """
        if not self._can_share:
            return None
        output, first, _ = self.logits(*shared.first(copies))
        cache = getattr(output, "past_key_values", None)
        if not isinstance(cache, DynamicCache):  # the first GPT has none, RemBERT's decoder one of another kind
            self._can_share = False
            return None
        inputs, positions, prompt_of = shared.second(copies, cache)
        _, others, _ = self.logits(inputs, positions)
        return torch.cat([first[prompt_of], others], dim=1)

    def _batch(self, parts: Sequence[tuple[int, Sequence[int], Encoded]], device: torch.device) -> _Batch:
        encoded = [one for _, _, one in parts]
        ids = [
            np.concatenate([one.ids, np.asarray(suffix, dtype=np.int32)]) if suffix else one.ids
            for one in encoded
            for suffix in one.choices.suffixes
        ]
        input_ids, mask = padded(ids, self._pad_id, "right", device)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask}
        if not self._masked:
            inputs["use_cache"] = False
        rows = torch.tensor([row for row, _, _ in parts], device=device)
        if self._label_rows is not None:
            positions = torch.tensor([[one.position] for one in encoded], device=device)
            return _Batch(
                rows, inputs, positions, rows[:, None], torch.arange(len(self._label_rows), device=device)[None]
            )
        choices = [one.choices for one in encoded]
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
            rows,
            inputs,
            positions=torch.from_numpy(read_at).to(device),
            row_of=torch.tensor([row for row, which, _ in parts for _ in which], device=device),
            option_of=torch.tensor([option for _, which, _ in parts for option in which], device=device),
            input_of=torch.from_numpy(input_of[:, None]).to(device),
            tokens=torch.from_numpy(tokens).to(device),
            weights=torch.from_numpy(weights).to(device),
            shared=SharedPrefix.of(encoded, self._pad_id, device) if self._can_share else None,
        )

    def _table(self, options: Options, steps: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The options' tokens and weights, both of shape `(L, steps)`."""
        tokens = np.zeros((len(options.tokens), steps), dtype=np.int64)
        weights = np.zeros((len(options.tokens), steps), dtype=np.float32)
        for i, option in enumerate(options.tokens):
            tokens[i, : len(option)] = option
            weights[i, : len(option)] = 1 / len(option) if self._average_tokens else 1
        return tokens, weights


def _parts(encoded: Encoded, inputs: int) -> Iterator[tuple[Sequence[int], Encoded]]:
    """A prompt with its options, in several parts if they need more inputs than a forward holds; with the options' indices."""
    options = encoded.choices
    if len(options.suffixes) <= inputs:
        yield range(len(options.tokens)), encoded
        return
    for start in range(0, len(options.suffixes), inputs):
        which = [i for i, suffix in enumerate(options.suffix_of) if start <= suffix < start + inputs]
        yield which, replace(encoded, options=Options.of([options.tokens[i] for i in which]))
