"""Options of several tokens that share a prompt: the prompt is computed once, whatever the number of options.

A first forward fills a cache with the prompts and scores each option's first token. A second continues from the cache with the
options' other tokens, one row per input. The cache is made and used within one evaluation, so it is never read at weights other
than those it was computed with.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from zorl.encoding import FORWARD_TOKENS, Encoded, first_position, padded


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """R prompts and the S suffixes that continue them, all padded on the right."""

    prefixes: Tensor  # (R, T) ids
    prefix_mask: Tensor  # (R, T)
    positions: Tensor  # (R, 1) the position of each prompt's last token
    suffixes: Tensor  # (S, K) ids
    suffix_mask: Tensor  # (S, K)
    prompt_of: Tensor  # (S,) the row of the prompt that each suffix continues

    @classmethod
    def of(cls, encoded: Sequence[Encoded], pad_id: int, device: torch.device) -> SharedPrefix | None:
        """The prompts and suffixes of encoded options; None if a second forward would cost more than it saves."""
        suffixes = [list(suffix) for one in encoded if one.options is not None for suffix in one.options.suffixes]
        counts = [len(one.options.suffixes) for one in encoded if one.options is not None]
        longest, more = max(len(one.ids) for one in encoded), max(map(len, suffixes))
        whole, shared = len(suffixes) * (longest + more), len(encoded) * longest + len(suffixes) * more
        if not more or whole - shared <= FORWARD_TOKENS:
            return None
        prefixes, prefix_mask = padded([one.ids for one in encoded], pad_id, "right", device)
        # An empty suffix is one unmasked padding token: its logits have weight 0, but must not be NaN.
        ids, mask = padded([np.array(s or [pad_id], dtype=np.int32) for s in suffixes], pad_id, "right", device)
        positions = torch.tensor([[one.position] for one in encoded], device=device)
        prompt_of = torch.from_numpy(np.repeat(np.arange(len(encoded)), counts)).to(device)
        return cls(prefixes, prefix_mask, positions, ids, mask, prompt_of)

    def first(self, copies: int) -> tuple[dict[str, Any], Tensor]:
        """The inputs of the first forward, the batch repeated `copies` times, and the positions to read, `(copies·R, 1)`."""
        inputs = {"input_ids": self.prefixes.repeat(copies, 1), "attention_mask": self.prefix_mask.repeat(copies, 1)}
        return {**inputs, "use_cache": True}, self.positions.repeat(copies, 1)

    def second(self, copies: int, cache: DynamicCache) -> tuple[dict[str, Any], Tensor, Tensor]:
        """The inputs of the second forward, which consume the cache; the positions to read, `(copies·S, K)`; and prompt_of."""
        starts = torch.arange(copies, device=self.prompt_of.device) * len(self.prefixes)
        prompt_of = (starts[:, None] + self.prompt_of).reshape(-1)  # (copies·S,)
        layers: Any = cache.layers
        for layer in layers:  # each is on the device of its own layer of the model
            layer.batch_select_indices(prompt_of.to(layer.keys.device))
        n, k = len(prompt_of), self.suffixes.shape[1]
        steps = torch.arange(k, device=prompt_of.device).expand(n, -1)
        inputs = {
            "input_ids": self.suffixes.repeat(copies, 1),
            "attention_mask": torch.cat(
                [self.prefix_mask.repeat(copies, 1)[prompt_of], self.suffix_mask.repeat(copies, 1)], dim=1
            ),
            "position_ids": self.positions.repeat(copies, 1)[prompt_of] + 1 + steps,
            "past_key_values": cache,
            "use_cache": True,
        }
        return inputs, steps, prompt_of


def can_share(module: Any) -> bool:
    """Whether a model can continue from a cache of padded prompts: from transformers, takes positions that are numbered from 0,
    uses full attention."""
    if not isinstance(module, PreTrainedModel) or "position_ids" not in inspect.signature(module.forward).parameters:
        return False
    if first_position(module) > 0:
        return False
    config = module.config.get_text_config()
    kinds = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "attention_layers", None) or ())}
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return kinds <= {"full_attention", "global"} and windows == [None, None]
