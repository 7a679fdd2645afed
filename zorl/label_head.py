"""A linear layer for the labels, W h + b, added to their words' log-probabilities.

h is the model's last state, the input of its output embedding. That embedding scores a label by its word alone, and how much of
what h knows about the task reaches those few rows is a matter of luck. Without W it is one bias per label, a threshold.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class LabelHead:
    """The linear layer W h + b, added to the label words' log-probabilities.

    Args:
        bias: b, one number per label, in the order of the prompt's label words.
        weight: W, one row per label, as wide as the model's last state; None where only biases were fitted.

    Raises:
        ValueError: W does not have one row per label, or its rows differ in width.
    """

    bias: tuple[float, ...]
    weight: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.weight is not None and len({len(row) for row in self.weight}) != 1:
            raise ValueError("the rows of a label head's weight differ in width")
        if self.weight is not None and len(self.weight) != len(self.bias):
            raise ValueError(f"a label head has {len(self.bias)} biases and {len(self.weight)} rows of weights")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values: the weights, bfloat16 already, as base64."""
        if self.weight is None:
            return {"bias": list(self.bias)}
        data = torch.tensor(self.weight).bfloat16().view(torch.int16).numpy().astype("<i2").tobytes()
        return {"bias": list(self.bias), "weight_bfloat16": base64.b64encode(data).decode("ascii")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LabelHead:
        bias = tuple(float(value) for value in values["bias"])
        if "weight_bfloat16" not in values:
            return cls(bias)
        data = bytearray(base64.b64decode(values["weight_bfloat16"], validate=True))
        words = torch.frombuffer(data, dtype=torch.uint8).view(len(bias), -1, 2).int()
        weight = ((words[..., 1] << 24) | (words[..., 0] << 16)).view(torch.float32)
        return cls(bias, tuple(map(tuple, weight.tolist())))
