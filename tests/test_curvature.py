"""Trace, norms and effective rank of quadratics that are known, from values of them alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zorl.curvature import Curvature, forwards_of, jackknife, measure_curvature, restored
from zorl.directions import DISTRIBUTIONS, Distribution, Step

SEEDS = range(24)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    "eigenvalues",
    [[10.0, *[0.5] * 20], [4.0, 3.0, 2.0, 1.0], [1.0] * 300, [8.0, -1.0, -2.0, 4.0] * 3],
    ids=["a spike and a bulk", "few", "flat and of full rank", "indefinite"],
)
def test_trace_and_norms_of_a_known_hessian_lie_within_the_stated_errors(
    quadratic: Callable[..., Any], distribution: Distribution, eigenvalues: list[float]
) -> None:
    problem = quadratic(eigenvalues, distribution)
    found = measure_curvature(problem.losses, problem.parameters, distribution, SEEDS, 1e-2)
    assert problem.asked == forwards_of(len(SEEDS))
    known = problem.eigenvalues
    for estimate, truth in (
        (found.gradient_squared, problem.gradient.square().sum().item()),
        (found.trace, known.sum().item()),
        (found.frobenius, known.square().sum().sqrt().item()),
    ):
        # Twice the 95% interval: of sixteen cases times three, two or three should fall out of the interval itself.
        assert 2 * (estimate.low - estimate.value) < truth - estimate.value < 2 * (estimate.high - estimate.value)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_effective_rank_is_found_where_there_are_more_directions_than_it_is_large(
    quadratic: Callable[..., Any], distribution: Distribution
) -> None:
    problem = quadratic([10.0, *[0.5] * 40], distribution)  # tr H = 30, ‖H‖ = 10: r = 3
    found = measure_curvature(problem.losses, problem.parameters, distribution, SEEDS, 1e-2)
    assert found.norm.value == pytest.approx(10.0, rel=0.5)
    assert found.effective_rank.value == pytest.approx(3.0, rel=0.5)
    assert found.effective_rank.low < 3.0 < found.effective_rank.high
    assert found.effective_rank_bound.high > 30.0**2 / 110.0 > found.effective_rank_bound.low


def test_of_a_flat_spectrum_above_the_number_of_directions_the_rank_is_too_small_and_the_bound_holds(
    quadratic: Callable[..., Any],
) -> None:
    problem = quadratic([1.0] * 300, "rademacher")
    found = measure_curvature(problem.losses, problem.parameters, "rademacher", SEEDS, 1e-2)
    most = 1.0 + 2.0 * math.sqrt(300 / len(SEEDS))
    assert 300 / most * 0.8 < found.effective_rank.value < 300
    assert found.effective_rank_bound.low < 300 < found.effective_rank_bound.high


def sketches(eigenvalues: Tensor, m: int, count: int) -> Tensor:
    """ZᵀHZ of an exact quadratic in its eigenbasis, for Gaussian Z: float64 of shape `(count, m, m)`."""
    generator = torch.Generator().manual_seed(m)
    z = torch.randn(count, len(eigenvalues), m, generator=generator, dtype=torch.float64)
    return z.mT @ (eigenvalues.unsqueeze(1) * z)


SPECTRA = {
    "flat": torch.ones(300, dtype=torch.float64),
    "a spike and a bulk": torch.tensor([10.0, *[0.05] * 300], dtype=torch.float64),
    "power law": 1.0 / torch.arange(1, 301, dtype=torch.float64),
}


@pytest.mark.parametrize("m", [6, 9, 16])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_intervals_hold_the_effective_rank_whatever_the_spectrum(spectrum: str, m: int) -> None:
    eigenvalues, count = SPECTRA[spectrum], 100
    norm = eigenvalues.max().item()
    rank, bound = eigenvalues.sum().item() / norm, (eigenvalues.sum() ** 2 / eigenvalues.square().sum()).item()
    held, norms, bounds, none = 0, 0, 0, 0
    for matrix in sketches(eigenvalues, m, count):
        found = Curvature(torch.zeros(m, dtype=torch.float64), matrix)
        of, most = found.effective_rank, found.effective_rank_bound
        none += math.isnan(of.high)
        held += of.low <= rank <= of.high
        norms += found.norm.low <= norm <= found.norm.high
        bounds += most.low <= bound <= most.high
        assert math.isnan(of.low) or of.low <= of.value <= of.high <= most.high
        assert math.isnan(of.value) or of.value <= most.value
    assert none <= 5
    assert held >= 0.9 * (count - none)
    # Student's interval of a norm or a bound is too short where few directions meet one large eigenvalue.
    assert min(norms, bounds) >= 0.75 * count


@pytest.mark.parametrize("sign", [0.0, -1.0])
def test_a_loss_that_does_not_curve_upwards_has_no_effective_rank(quadratic: Callable[..., Any], sign: float) -> None:
    problem = quadratic([sign] * 20, "rademacher")
    found = measure_curvature(problem.losses, problem.parameters, "rademacher", range(6), 2.0**-6)
    assert found.trace.value <= 0.1
    if sign:
        assert math.isnan(found.effective_rank.value)
        assert math.isnan(found.effective_rank_bound.value)


def test_measuring_leaves_every_bit_in_place(quadratic: Callable[..., Any]) -> None:
    problem = quadratic([1.0] * 10, "rank1")
    before = problem.parameters.sha256()
    measure_curvature(problem.losses, problem.parameters, "rank1", range(4), 1e-3)
    assert problem.parameters.sha256() == before
    with restored(problem.parameters):
        problem.parameters.add([Step(1, 0.1)], "rank1")
        assert problem.parameters.sha256() != before
    assert problem.parameters.sha256() == before
    with pytest.raises(ValueError, match="at least 3 directions, got 2"):
        measure_curvature(problem.losses, problem.parameters, "rank1", range(2), 1e-3)


def _mean_of(sample: Tensor) -> Callable[[Tensor], float]:
    return lambda chosen: sample[chosen].mean().item()


def test_the_interval_of_a_mean_is_students() -> None:
    """The jackknife of a mean is its standard error; 95 of 100 intervals hold the truth."""
    samples = torch.randn(400, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for size, quantile in ((3, 4.302653), (8, 2.364624)):  # Student's t at 97.5%, with two and seven degrees of freedom
        first = jackknife(_mean_of(samples[0]), size)
        error = samples[0, :size].std().item() / math.sqrt(size)
        assert first.high - first.value == pytest.approx(quantile * error, rel=1e-6)
    intervals = [jackknife(_mean_of(sample), 8) for sample in samples]
    assert sum(i.low < 0.0 < i.high for i in intervals) / 400 == pytest.approx(0.95, abs=0.03)
