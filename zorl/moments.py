"""Momentum and Adam (Kingma & Ba 2015), whose moving averages are recomputed from the log instead of being stored.

A gradient estimate is a few seeds and numbers, so the terms of an average can be recomputed at any time (MeZO, section 2.2
and Appendix B). With ĝₜ = Σᵢ gᵢzᵢ/m and the logged coefficients cₜ (which include lr, see `zorl.updates.Averaged`),

    mₜ = Σₖ β₁ᵏ Σᵢ cₜ₋ₖ,ᵢ zₜ₋ₖ,ᵢ      vₜ = (1−β₂) Σₖ β₂ᵏ ĝₜ₋ₖ²      k = 0 … window−1

    momentum: θ ← θ + mₜ         Adam: θ ← θ + mₜ/(1−β₁ᵏ) / (√(vₜ/(1−β₂ᵏ)) + 1e-8) with k the steps in the sums

*Recomputed*: the sums are computed for one parameter after another, in float32 buffers of that parameter's size (one, or
three for Adam's elementwise v) that are freed before the next. A step draws window · n directions and leaves out βʷⁱⁿᵈᵒʷ of an
average's weight: 0.1% of m with β₁ = 0.9 and 64 steps, 4% of v with β₂ = 0.95. *Stored*: the classical recursions, with one
float32 copy of the parameters for momentum and two for Adam, n directions per step and nothing left out. Both can be rebuilt
from the log.

What the window w costs θ follows from the log alone. With momentum, ĝ of step s has moved θ after a = T − s steps by lr·ĝ times
(1−β₁) + (1−β₁)β₁ + … = 1 − β₁ᵃ, and by 1 − β₁ʷ at most if recomputed. So, with equality before the triangle inequality,

    ‖θ_recomputed − θ_stored‖ = ‖Σₛ lr ĝₛ max(0, β₁ʷ − β₁ᵃ)‖ ≤ β₁ʷ Σₛ lr Σᵢ |gₛᵢ|/m ‖zₛᵢ‖      s = 0 … T−w−1

and ‖z‖ = √d for ±1. With Adam and a scalar v, whose weights in m̂ sum to 1 in both, the terms that were left out had the share
q = (β₁ʷ − β₁ᵗ)/(1 − β₁ᵗ) ≤ β₁ʷ after t steps: a step is off by at most 2q·lr·maxₛ ‖ĝₛ‖/√v̂ₜ, and θ by the sum of these over
t > w. With Adam's elementwise v there is no such bound: an element may have had almost no gradient within the window.

With a single direction of ±1 (rademacher and rank1, n_spsa=1) every element of ĝ² is the same number g²: v is a scalar that
covers the whole log at no cost.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from zorl.directions import Distribution, Key, Step, key
from zorl.kernels import kernel_for
from zorl.parameters import ParameterSet

Keeping = Literal["recomputed", "stored"]
_DELTA = 1e-8  # Kingma & Ba's ε


@dataclass(frozen=True, slots=True)
class Averaging:
    """Settings of the moving averages.

    Args:
        beta1: decay of the first moment, per step.
        beta2: decay of Adam's second moment, per step; None for momentum.
        moment_window: past steps in a recomputed average.
        moments: "recomputed" or "stored".

    Raises:
        ValueError: a setting is out of range.
    """

    beta1: float = 0.9
    beta2: float | None = None
    moment_window: int = 64
    moments: Keeping = "recomputed"

    def __post_init__(self) -> None:
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if beta is not None and not 0.0 <= beta < 1.0:
                raise ValueError(f"{name} must be at least 0 and below 1, got {beta}")
        if self.moment_window < 1:
            raise ValueError(f"moment_window must be at least 1, got {self.moment_window}")
        if self.moments not in get_args(Keeping):
            raise ValueError(f"moments={self.moments!r}; choose 'recomputed' or 'stored'")

    @classmethod
    def of_header(cls, header: Mapping[str, Any]) -> Averaging:
        return cls(header["beta1"], header["beta2"], header["moment_window"], header["moments"])


class Move(NamedTuple):
    """A committed step: its directions with the coefficients c, and the same directions with those of the gradient, gᵢ/m."""

    steps: Sequence[Step]
    gradient: Sequence[Step]


class Writable(Protocol):
    """What takes changes: a `ParameterSet`, or an `InPlace` on its grid."""

    def change(self, name: str, amount: Tensor, stream: Key) -> None: ...


class Moments:
    """Applies committed steps through moving averages.

    Args:
        averaging: the settings.
        parameters: what is tuned.
        distribution: the distribution of z.
        unit_squares: whether each step has one direction of ±1, so that v is a single number.
        target: what writes the parameters.
    """

    def __init__(
        self,
        averaging: Averaging,
        parameters: ParameterSet,
        distribution: Distribution,
        *,
        unit_squares: bool,
        target: Writable,
    ) -> None:
        self._parameters, self._target = parameters, target
        adam, elementwise = averaging.beta2 is not None, averaging.beta2 is not None and not unit_squares
        self._scalar = _ScalarMoment(averaging.beta2) if averaging.beta2 is not None and unit_squares else None
        kind = _Stored if averaging.moments == "stored" else _Recomputed
        self._averages: dict[str, _Stored | _Recomputed] = {
            name: kind(tensor, averaging, distribution, correct=adam, squares=elementwise)
            for name, tensor in parameters.items()
        }

    @torch.no_grad()
    def apply(self, moves: Sequence[Move]) -> None:
        """Moves θ by these steps, which follow those applied before."""
        roots = [None if self._scalar is None else self._scalar.after(move) for move in moves]
        for name, averages in self._averages.items():
            for move, root in zip(moves, roots, strict=True):
                keys = [key(step.seed, name) for step in move.steps]
                change = averages.after(
                    keys,
                    [step.coefficient_of(name) for step in move.steps],
                    [step.coefficient_of(name) for step in move.gradient],
                    root,
                )
                self._target.change(name, change, keys[0])


class _ScalarMoment:
    """Adam's second moment where it is a single number."""

    def __init__(self, beta2: float) -> None:
        self._beta2, self._v, self._left = beta2, 0.0, 1.0

    def after(self, move: Move) -> float:
        """√v̂ + δ including this step."""
        g = sum(step.coefficient for step in move.gradient)
        self._v = self._beta2 * self._v + (1.0 - self._beta2) * g * g
        self._left *= self._beta2
        return math.sqrt(self._v / (1.0 - self._left)) + _DELTA


class _Recomputed:
    """One parameter's averages, from the keys and coefficients of the last steps."""

    def __init__(
        self, like: Tensor, averaging: Averaging, distribution: Distribution, *, correct: bool, squares: bool
    ) -> None:
        self._like, self._averaging, self._distribution = like, averaging, distribution
        self._correct, self._squares = correct, squares
        self._window: deque[tuple[list[Key], list[float], list[float]]] = deque(maxlen=averaging.moment_window)

    def after(self, keys: list[Key], c: list[float], g: list[float], root: float | None) -> Tensor:
        self._window.append((keys, c, g))
        every, coefficients, weight = [], [], 1.0
        for of_step, cs, _ in reversed(self._window):
            every += of_step
            coefficients += [weight * x for x in cs]
            weight *= self._averaging.beta1  # a product is rounded identically everywhere, a power is not
        m = _total(_zeros(self._like), every, coefficients, self._distribution)
        return _change(m, self._second() if self._squares else None, weight if self._correct else 0.0, root)

    def _second(self) -> Tensor:
        beta2 = self._averaging.beta2
        assert beta2 is not None
        v, left = _zeros(self._like), 1.0
        buffer = torch.empty_like(v)
        for keys, _, g in reversed(self._window):
            v.add_(_total(buffer.zero_(), keys, g, self._distribution).square_().mul_((1.0 - beta2) * left))
            left *= beta2
        return v.mul_(1.0 / (1.0 - left))


class _Stored:
    """One parameter's averages, stored."""

    def __init__(
        self, like: Tensor, averaging: Averaging, distribution: Distribution, *, correct: bool, squares: bool
    ) -> None:
        self._averaging, self._distribution, self._correct = averaging, distribution, correct
        self._m = _zeros(like)
        self._v = _zeros(like) if squares else None
        self._left1 = self._left2 = 1.0

    def after(self, keys: list[Key], c: list[float], g: list[float], root: float | None) -> Tensor:
        beta1, beta2 = self._averaging.beta1, self._averaging.beta2
        _total(self._m.mul_(beta1), keys, c, self._distribution)
        self._left1 *= beta1
        second = None
        if self._v is not None and beta2 is not None:
            gradient = _total(_zeros(self._m), keys, g, self._distribution)
            self._v.mul_(beta2).add_(gradient.square_().mul_(1.0 - beta2))
            self._left2 *= beta2
            second = self._v * (1.0 / (1.0 - self._left2))
        return _change(self._m.clone(), second, self._left1 if self._correct else 0.0, root)


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=torch.float32, device=like.device)


def _total(out: Tensor, keys: list[Key], coefficients: list[float], distribution: Distribution) -> Tensor:
    """out + Σ cᵢzᵢ, block by block, in `out`."""
    kernel_for(out).add(out, keys, torch.tensor(coefficients, dtype=torch.float32).tolist(), distribution)
    return out


def _change(m: Tensor, v: Tensor | None, left: float, root: float | None) -> Tensor:
    """What a step adds to θ, written into m.

    Args:
        v: the second moment, bias-corrected.
        left: the share of m's weight that lies before the first step, which is its bias.
        root: √v̂ + δ where it is a single number.
    """
    if v is not None:
        m.div_(v.sqrt_().add_(_DELTA))
    scale = (1.0 - left) * (root if root is not None else 1.0)
    return m.mul_(1.0 / scale)  # division by a number is not rounded identically on every device
