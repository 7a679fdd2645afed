"""The ε at which slopes are accurate, chosen from the slopes along a few directions at many ε.

A slope [L(θ+εz) − L(θ−εz)]/2ε is off by rounding, or by the steps of a reward, if ε is small, and by the loss's third derivative
if ε is large. In between it stays the same from one ε to the next, relative to itself; that plateau is the reference for all.
(Not in units of the slope: where ε is so large that the loss has saturated, slopes shrink as 1/ε, and so do their
differences.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from zorl.curvature import Losses
from zorl.probe import Point

EPSILONS = tuple(10.0 ** (-4.0 + i / 2.0) for i in range(7))  # 1e-4 … 0.1
SLOPE_ERROR = 0.1  # the share of a slope that ε may cost: invisible beside the chance in a batch and a direction


@dataclass(frozen=True, slots=True)
class Look:
    """Slopes at one ε.

    Attributes:
        informative: the share of directions in which the two sides differ.
        slope_error: the root mean square error against the slopes of the plateau, relative to these; NaN if there is none.
    """

    epsilon: float
    informative: float
    slope_error: float


def look(losses: Losses, seeds: Sequence[int], epsilons: Sequence[float]) -> list[Look]:
    """Slopes along the same directions at each ε, against those of the plateau."""
    slopes = []
    for epsilon in epsilons:
        sides = losses([Point(seed, sign * epsilon) for seed in seeds for sign in (1.0, -1.0)]).view(-1, 2)
        slopes.append((sides[:, 0] - sides[:, 1]) / (2.0 * epsilon))
    informative = [(found != 0.0).double().mean().item() for found in slopes]
    pairs = [
        (rms(low - high) / mean, (low + high) / 2.0)
        for low, high, share in zip(slopes, slopes[1:], informative, strict=False)
        if share == 1.0 and (mean := rms((low + high) / 2.0)) > 0.0
    ]
    plateau = min(pairs, key=lambda pair: pair[0])[1] if pairs else None
    return [
        Look(epsilon, share, math.nan if plateau is None else rms(found - plateau) / rms(plateau))
        for epsilon, share, found in zip(epsilons, informative, slopes, strict=True)
    ]


def choose_epsilon(looks: Sequence[Look], target: float) -> float | None:
    """The largest ε that misjudges slopes by no more than `SLOPE_ERROR`, or else the one that misjudges them least.

    It is the largest, because the errors from rounding and from a reward's steps fall with ε.

    Args:
        target: the share of informative directions that is required.

    Returns:
        None if none of them is informative enough.
    """
    able = [found for found in looks if found.informative >= target and not math.isnan(found.slope_error)]
    good = [found for found in able if found.slope_error <= SLOPE_ERROR]
    if good:
        return max(found.epsilon for found in good)
    # Up to rounding, the two ε of the plateau are equally far from their mean.
    return max(able, key=lambda found: (-round(found.slope_error, 6), found.epsilon)).epsilon if able else None


def rms(values: Tensor) -> float:
    """Root mean square."""
    return values.square().mean().sqrt().item()
