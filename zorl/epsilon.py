"""The size ε of a perturbation, fixed or adapted so that probes are informative.

Accuracy and F1 are flat at small scales: at the published ε = 1e-3 most probes on SST-2 in batches of 16 find the same score on
both sides, and a classifier that has collapsed onto one class never finds another (a zero-signal trap). The automatic
ε widens after a tie and narrows after an informative probe. It is a pure function of the log.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch

# Below this a perturbation of ±ε is lost to rounding in most weights (|w| around 0.05) of the dtype. Larger ones lose it sooner:
# in bfloat16 ε = 1e-3 is rounded away from |w| = 0.5 on, so that a norm's gains are not perturbed, though they are moved.
FLOOR = {torch.float32: 1e-7, torch.float16: 1e-4, torch.bfloat16: 1e-3}


class Epsilon:
    """ε of the next probe.

    A tie multiplies ε by `growth`; an informative direction divides it by growth^((1−a)/a), so that ε rests where a share
    a of the directions is informative (a stochastic approximation after Robbins and Monro 1951). The share found in a run
    scatters around a; a lies a quarter of the way from `target` to 1, so that it stays above the target where `cap` allows. What
    counts is g ≠ 0: one-sided directions are compared with each other, so that a single one that differs makes all of a
    step informative, and one-point directions with the step before, whose batch was another one, so that nearly all are.
    ε stays between its start and `cap` times its start; abstentions do not move it.

    Args:
        value: a number keeps ε fixed there; "auto" starts at `start`.
        dtypes: the parameters' dtypes; half precision has a floor.
        start: the first and smallest automatic ε.
        target: the share of informative directions to keep, in (0, 1).
        cap: how many times its start the automatic ε may grow.

    Raises:
        ValueError: ε is not a positive number, or is below the floor of a dtype.
    """

    def __init__(
        self,
        value: float | Literal["auto"],
        dtypes: Iterable[torch.dtype] = (torch.float32,),
        *,
        start: float = 5e-3,
        target: float = 0.8,
        cap: float = 16.0,
        growth: float = 1.25,
    ) -> None:
        if not 0.0 < target < 1.0:
            raise ValueError(f"informative_target must be between 0 and 1, got {target}")
        self.adaptive = value == "auto"
        first = start if self.adaptive else value
        if isinstance(first, str) or not (math.isfinite(first) and first > 0.0):
            raise ValueError(f"epsilon must be a positive number or 'auto', got {value!r}")
        for dtype in dtypes:
            if first < FLOOR[dtype]:
                raise ValueError(
                    f"epsilon={first:g} is below {FLOOR[dtype]:g}, under which {dtype} rounds most perturbations away"
                )
        self._start = float(first)
        self._log, self._largest_log = 0.0, math.log(cap)  # ε as a multiple of its start
        self._up = math.log(growth)
        aim = target + (1.0 - target) / 4.0
        self._down = self._up * (1.0 - aim) / aim
        self.value = self._start

    @property
    def largest(self) -> float:
        """The largest ε of any probe."""
        return self._start * math.exp(self._largest_log) if self.adaptive else self.value

    def observe(self, projected: Sequence[float]) -> None:
        """Takes a committed step's projected gradients into account."""
        if not self.adaptive:
            return
        for g in projected:
            if g == 0.0:
                self._log += self._up
            elif not math.isnan(g):
                self._log -= self._down
            self._log = min(max(self._log, 0.0), self._largest_log)
        self.value = self._start * math.exp(self._log)
