"""How the loss curves at θ, from forward passes alone: trace, norms and effective rank of its Hessian H.

m random directions with E[z zᵀ] = I are compared with each other by second differences of the loss. Whatever their
distribution, for i ≠ j

    E[(zᵢ·∇L)²] = ‖∇L‖²,    E[zᵢᵀHzᵢ] = tr H  (Hutchinson 1989),    E[(zᵢᵀHzⱼ)²] = tr H² = ‖H‖_F²,

so these three need no assumption. The largest eigenvalue does: M = ZᵀHZ has, but for zeros, the spectrum of H^½ZZᵀH^½, and
ZZᵀ/m is close to the identity where H acts once m is well above H's effective rank (Koltchinskii and Lounici 2017). What the
rest of the spectrum adds to each eigenvalue of M, tr H at first order, is taken off again (Yata and Aoshima 2012). With fewer
directions than the effective rank r of a flat spectrum the norm comes out too large by at most 1 + 2√(r/m), and the rank too
small by as much; ‖H‖_F then bounds the rank from above. The intervals of both reach as far as this factor allows.

Power iteration would need products Hv. Values of the loss give only quadratic forms, and by polarisation vᵀHw: one coordinate
of Hv for a few forwards, so that all of Hv costs as many times d. Restricted to the span of Z, the iteration converges to the
largest eigenvalue of M, which is computed here from the same values. No gradient is taken: a
reward that has none is measured like a loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from scipy.stats import t as students_t
from torch import Tensor

from zorl.directions import Distribution, Step
from zorl.parameters import ParameterSet
from zorl.probe import CENTRE, Point

# The mean loss at each point around θ as it is now: float64 of shape `(points,)`, on the CPU.
Losses = Callable[[Sequence[Point]], Tensor]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its confidence interval over the choice of directions: nominally 95%, and less where one
    eigenvalue dominates."""

    value: float
    low: float
    high: float


_UNKNOWN = Estimate(math.nan, math.nan, math.nan)


@dataclass(frozen=True, slots=True)
class Curvature:
    """The slopes and curvature of the loss at θ along m directions.

    Attributes:
        slopes: zᵢ·∇L, float64 of shape `(m,)`.
        matrix: M, zᵢᵀHzⱼ, float64 of shape `(m, m)`, symmetric.
    """

    slopes: Tensor
    matrix: Tensor

    @property
    def gradient_squared(self) -> Estimate:
        """‖∇L‖², unbiased."""
        return _positive(lambda i: self.slopes[i].square().mean().item(), len(self.slopes))

    @property
    def trace(self) -> Estimate:
        """tr H, unbiased."""
        return jackknife(lambda i: _trace(self._of(i)), len(self.slopes))

    @property
    def frobenius(self) -> Estimate:
        """‖H‖_F; its square is unbiased."""
        return _positive(lambda i: math.sqrt(_frobenius_squared(self._of(i))), len(self.slopes))

    @property
    def norm(self) -> Estimate:
        """H's largest eigenvalue, which is ‖H‖_op where H is positive semidefinite.

        The lower end allows for the sketch's bias.
        """
        found = jackknife(lambda i: _norm(self._of(i)), len(self.slopes))
        if not found.low > 0.0 or not self.trace.value > 0.0:
            return found
        return replace(found, low=found.low / _most_bias(self.trace.value / found.low, len(self.slopes)))

    @property
    def effective_rank(self) -> Estimate:
        """r = tr H / ‖H‖_op (Malladi et al. 2023, Assumption 1). NaN where the trace's interval holds 0: a loss that is not known
        to curve upwards has none.

        The upper end allows for the sketch's bias; no figure exceeds that of `effective_rank_bound`.
        """
        if not self.trace.low > 0.0:
            return _UNKNOWN
        m, most = len(self.slopes), self.effective_rank_bound
        found = _positive(lambda i: _rank(self._of(i)), m)
        value = min(found.value, most.value)
        return Estimate(value, min(found.low, value), min(found.high * _most_bias(found.high, m), most.high))

    @property
    def effective_rank_bound(self) -> Estimate:
        """(tr H)² / ‖H‖_F², which r does not exceed, since ‖H‖_F² ≤ ‖H‖_op · tr H for H positive semidefinite. NaN likewise."""
        return _positive(lambda i: _rank_bound(self._of(i)), len(self.slopes)) if self.trace.low > 0.0 else _UNKNOWN

    def _of(self, chosen: Tensor) -> Tensor:
        return self.matrix[chosen][:, chosen]


def forwards_of(directions: int) -> int:
    """The evaluations that `measure_curvature` makes: θ, both sides of m directions, and both sides of each pair."""
    return 1 + 2 * directions + directions * (directions - 1)


def measure_curvature(
    losses: Losses, parameters: ParameterSet, distribution: Distribution, seeds: Sequence[int], epsilon: float
) -> Curvature:
    """Slopes and curvature along directions and between them, by central differences; errors are of order ε².

    θ is moved to θ ± εzᵢ, evaluated from there along the other directions, and restored from a copy. In half precision rounding,
    which ε² divides, outweighs the curvature unless ε is about 1e-2 or more.

    Args:
        losses: evaluates `parameters` in place, at any point around them.
        seeds: the seeds of the m directions, at least 3.

    Raises:
        ValueError: there are fewer than 3.
    """
    m = len(seeds)
    if m < 3:
        raise ValueError(f"curvature is estimated from at least 3 directions, got {m}")
    centre = losses([CENTRE]).item()
    sides = losses([Point(seed, sign * epsilon) for seed in seeds for sign in (1.0, -1.0)]).view(m, 2)
    along = (sides.sum(dim=1) - 2.0 * centre) / epsilon**2
    matrix = torch.diag(along)
    both = torch.zeros(m, m, dtype=torch.float64)  # L(θ + εzᵢ + εzⱼ) + L(θ − εzᵢ − εzⱼ)
    with restored(parameters) as restore:
        for i in range(m - 1):
            for sign in (1.0, -1.0):
                parameters.add([Step(seeds[i], sign * epsilon)], distribution)
                both[i, i + 1 :] += losses([Point(seed, sign * epsilon) for seed in seeds[i + 1 :]])
                restore()
    for i in range(m):
        for j in range(i + 1, m):
            # (zᵢ+zⱼ)ᵀH(zᵢ+zⱼ) = zᵢᵀHzᵢ + zⱼᵀHzⱼ + 2 zᵢᵀHzⱼ
            mixed = (both[i, j] - 2.0 * centre) / epsilon**2 - along[i] - along[j]
            matrix[i, j] = matrix[j, i] = mixed / 2.0
    return Curvature((sides[:, 0] - sides[:, 1]) / (2.0 * epsilon), matrix)


@contextmanager
def restored(parameters: ParameterSet) -> Iterator[Callable[[], None]]:
    """Keeps a copy of θ for the block. The given function restores it, bit for bit, and so does the end of the block."""
    kept = {name: tensor.detach().clone() for name, tensor in parameters.items()}

    def restore() -> None:
        with torch.no_grad():
            for name, tensor in parameters.items():
                tensor.copy_(kept[name])

    try:
        yield restore
    finally:
        restore()


def jackknife(statistic: Callable[[Tensor], float], size: int) -> Estimate:
    """A statistic of `size` items and its 95% interval, from the scatter when each is left out (jackknife; Tukey 1958).

    The quantile is Student's t with `size` − 1 degrees of freedom.

    Args:
        statistic: computes it from the items with the given indices, int64 of shape `(n,)`.
    """
    everything = torch.arange(size)
    value = statistic(everything)
    without = torch.tensor([statistic(everything[everything != i]) for i in range(size)], dtype=torch.float64)
    deviation = math.sqrt((size - 1) * without.var(correction=0).item())
    margin = float(students_t.ppf(0.975, size - 1)) * deviation
    return Estimate(value, value - margin, value + margin)


def _positive(statistic: Callable[[Tensor], float], size: int) -> Estimate:
    """A positive statistic that scatters by factors, with the interval of its logarithm. NaN where it is not positive."""
    log = jackknife(lambda i: math.log(value) if (value := statistic(i)) > 0.0 else math.nan, size)
    return Estimate(math.exp(log.value), math.exp(min(log.low, 700.0)), math.exp(min(log.high, 700.0)))


def _trace(matrix: Tensor) -> float:
    return matrix.diagonal().mean().item()


def _frobenius_squared(matrix: Tensor) -> float:
    m = len(matrix)
    return ((matrix.square().sum() - matrix.diagonal().square().sum()) / (m * (m - 1))).item()


def _norm(matrix: Tensor) -> float:
    return (torch.linalg.eigvalsh(matrix)[-1].item() - _trace(matrix)) / (len(matrix) - 1)


def _most_bias(rank: float, m: int) -> float:
    """The factor 1 + 2√(r/m) by which m directions misjudge a flat spectrum of rank r, given `rank`, the r that they show."""
    return (math.sqrt(rank / m) + math.sqrt(1.0 + rank / m)) ** 2


def _rank_bound(matrix: Tensor) -> float:
    trace, squared = _trace(matrix), _frobenius_squared(matrix)
    return trace**2 / squared if trace > 0.0 and squared > 0.0 else math.nan


def _rank(matrix: Tensor) -> float:
    trace, norm = _trace(matrix), _norm(matrix)
    return trace / norm if trace > 0.0 and norm > 0.0 else math.nan
