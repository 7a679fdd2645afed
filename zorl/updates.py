"""From projected gradients to coefficients: θ ← θ + Σ cᵢ·z(seedᵢ).

A rule is a pure function of the log: its state is a few scalars, recomputed by reading the trajectory again, so only the
trajectory has to be saved. Coefficients are rounded to bfloat16 *before* they are applied: what is logged is exactly what
was done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Protocol

import torch

UpdateName = Literal["normalized", "sgd", "momentum", "adam"]


def measured_in_weights(update: str) -> bool:
    """Whether a rule's learning rate is a change of weights whatever the slope; otherwise it is multiplied by the slope."""
    return update not in ("sgd", "momentum")


class UpdateRule(Protocol):
    def coefficients(self, projected: Sequence[float], lr: float) -> list[float]:
        """Coefficients of one step's directions.

        Args:
            projected: the g of each direction; NaN abstains, 0 is a tie.
            lr: the learning rate of this step.
        """

    def observe(self, projected: Sequence[float]) -> None:
        """Adds a committed step to the rule's state; called once per step, live and in replay."""


class SGD:
    """c = −lr·g / m with m the informative and tied directions (MeZO, Algorithms 1 and 2)."""

    def coefficients(self, projected: Sequence[float], lr: float) -> list[float]:
        m = sum(not math.isnan(g) for g in projected)
        return [0.0 if math.isnan(g) else bfloat16(-lr * g / m) for g in projected]

    def observe(self, projected: Sequence[float]) -> None:
        pass


class Normalized:
    """c = −lr·g / (√v·m): v is a bias-corrected moving average of the informative g².

    This is Adam's second moment without its buffer: with z = ±1 the squared gradient estimate of every element is the same
    scalar g² (exactly for one direction, up to cross terms for several), so v is one number. It makes the learning rate
    independent of the reward's scale and of ε: lr is the typical change of a weight in a step of one direction, lr/√m in a
    step that averages over m. Each step is included in its own v, so that a first g moves θ by lr, and an outlier by at most
    lr/√(1 − decay): 4.5 lr with the default.

    Args:
        decay: decay of the moving average, per informative direction.
    """

    def __init__(self, decay: float = 0.95) -> None:
        self.decay = decay
        self._sum = 0.0
        self._weight = 0.0

    def coefficients(self, projected: Sequence[float], lr: float) -> list[float]:
        total, weight = self._after(projected)
        scale = lr / math.sqrt(total / weight) if total > 0.0 else 0.0
        return SGD().coefficients(projected, scale)

    def observe(self, projected: Sequence[float]) -> None:
        self._sum, self._weight = self._after(projected)

    def _after(self, projected: Sequence[float]) -> tuple[float, float]:
        total, weight = self._sum, self._weight
        for g in projected:
            if not math.isnan(g) and g != 0.0:  # ties say nothing about the size of the slope
                total = self.decay * total + (1.0 - self.decay) * g * g
                weight = self.decay * weight + (1.0 - self.decay)
        return total, weight


class Averaged:
    """c = −lr·(1−β₁)·g / m: a step's contribution to a moving average of gradients, which `zorl.moments` computes.

    Each gradient thus keeps the learning rate of the step in which it was measured (Sutskever et al. 2013, eq. 1–2).

    Args:
        beta1: decay of the average, per step.
    """

    def __init__(self, beta1: float = 0.9) -> None:
        self.beta1 = beta1

    def coefficients(self, projected: Sequence[float], lr: float) -> list[float]:
        return SGD().coefficients(projected, lr * (1.0 - self.beta1))

    def observe(self, projected: Sequence[float]) -> None:
        pass


def update_rule(name: UpdateName, beta1: float = 0.9) -> UpdateRule:
    """A fresh rule by name.

    Args:
        beta1: the decay of `"momentum"` and `"adam"`, per step.

    Raises:
        ValueError: there is no such rule.
    """
    rules: dict[str, Callable[[], UpdateRule]] = {
        "normalized": Normalized,
        "sgd": SGD,
        "momentum": partial(Averaged, beta1),
        "adam": partial(Averaged, beta1),
    }
    if name not in rules:
        raise ValueError(f"update={name!r} is not an update rule; choose one of {', '.join(map(repr, rules))}")
    return rules[name]()


def bfloat16(value: float) -> float:
    """The nearest bfloat16, as a float."""
    return torch.tensor(value, dtype=torch.float32).bfloat16().item()
