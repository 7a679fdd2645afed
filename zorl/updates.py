"""From projected gradients to coefficients: θ ← θ + Σ cᵢ·z(seedᵢ).

A rule is a pure function of the log: its state is a few scalars, remade by reading the trajectory again, so nothing but
the trajectory has to be saved. Coefficients are rounded to bfloat16 *before* they are applied: what is written down is
what was done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Protocol

import torch

UpdateName = Literal["normalized", "sgd", "momentum", "adam"]


def measured_in_weights(update: str) -> bool:
    """Whether a rule's learning rate is a change of weights, whatever the slope; else it is times a slope."""
    return update not in ("sgd", "momentum")


class UpdateRule(Protocol):
    def coefficients(self, projected: Sequence[float], lr: float) -> list[float]:
        """Coefficients of one step's directions.

        Args:
            projected: g of each direction; NaN abstains, 0 is a tie.
            lr: the learning rate of this step.
        """

    def observe(self, projected: Sequence[float]) -> None:
        """Takes a committed step into the rule's state; called once a step, live and in replay alike."""


class SGD:
    """c = −lr·g / m with m the informative and tied directions (MeZO, Algorithms 1 and 2)."""

    def coefficients(self, projected: Sequence[float], lr: float) -> list[float]:
        m = sum(not math.isnan(g) for g in projected)
        return [0.0 if math.isnan(g) else bfloat16(-lr * g / m) for g in projected]

    def observe(self, projected: Sequence[float]) -> None:
        pass


class Normalized:
    """c = −lr·g / (√v·m): v is a bias-corrected moving average of the informative g².

    Adam's second moment without its buffer: with z = ±1 every element's squared gradient estimate is the same scalar g²
    (for one direction exactly, for several up to cross terms), so v is one number. It takes the reward's scale and the
    size of ε out of the learning rate: lr is the typical change of a weight in one step of one direction, lr/√m in one
    that averages over m. The step at hand counts in its
    own v, so that a first or a freak g moves θ by about lr and no more.

    Args:
        decay: of the moving average, per informative direction.
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
            if not math.isnan(g) and g != 0.0:  # ties say nothing of the slope's size
                total = self.decay * total + (1.0 - self.decay) * g * g
                weight = self.decay * weight + (1.0 - self.decay)
        return total, weight


class Averaged:
    """c = −lr·(1−β₁)·g / m: a step's part in a moving average of gradients. `zorl.moments` makes the averages of these.

    So the learning rate is within the average (Sutskever et al. 2013, eq. 3–4), where it was when the gradient was measured.

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
        beta1: of `"momentum"` and `"adam"`.

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
