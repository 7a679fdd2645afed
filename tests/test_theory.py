"""Lemma 2, Theorem 1 and Corollary 1 of the paper, checked by numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zorl import MeZO
from zorl.directions import Distribution, key
from zorl.kernels import kernel_for
from zorl.probe import Point, Scores
from zorl.theory import corollary_1, lemma_2


def directions(distribution: str, count: int, shape: tuple[int, int]) -> Tensor:
    """Shape (count, d): zorl's own, or the paper's on the sphere of radius √d."""
    kind: Distribution = "gaussian" if distribution == "sphere" else distribution  # type: ignore[assignment]
    zero, z = torch.zeros(shape), torch.empty(count, *shape)
    for seed in range(count):
        kernel_for(zero).perturb(zero, key(seed, "w"), 1.0, kind, z[seed])
    flat = z.flatten(1).double()
    return flat * math.sqrt(flat.shape[1]) / flat.norm(dim=1, keepdim=True) if distribution == "sphere" else flat


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("distribution", ["sphere", "rademacher", "rank1", "gaussian"])
def test_the_estimate_is_as_long_as_lemma_2_says(distribution: str, n: int) -> None:
    """(d + n − 1)/n on the sphere, for ±1 and for rank one; (d + n + 1)/n for Gaussian z. With d = 10 the two are 20% apart."""
    z = directions(distribution, 9000, (2, 5)).view(-1, n, 10)
    gradient = torch.tensor([3.0, -1.0, 0.5, 2.0, 0.0, 1.0, -0.2, 0.7, -2.0, 1.5], dtype=torch.float64)
    estimates = ((z @ gradient).unsqueeze(2) * z).mean(dim=1)
    ratios = estimates.square().sum(dim=1) / gradient.square().sum()
    error = ratios.std().item() / math.sqrt(len(ratios))
    expected = lemma_2(10, n, "gaussian" if distribution == "gaussian" else "rademacher")
    assert ratios.mean().item() == pytest.approx(expected, abs=4 * error)
    assert expected == (10 + n + (1 if distribution == "gaussian" else -1)) / n
    assert error < 0.05 * expected, "the comparison means something"


@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("distribution", ["rademacher", "rank1", "gaussian"])
def test_points_that_are_compared_with_each_other_make_a_longer_estimate(distribution: str, n: int) -> None:
    z = directions(distribution, 3000 * n, (2, 5)).view(-1, n, 10)
    gradient = torch.tensor([3.0, -1.0, 0.5, 2.0, 0.0, 1.0, -0.2, 0.7, -2.0, 1.5], dtype=torch.float64)
    values = z @ gradient
    others = (values.sum(dim=1, keepdim=True) - values) / (n - 1)
    estimates = ((values - others).unsqueeze(2) * z).mean(dim=1)
    ratios = estimates.square().sum(dim=1) / gradient.square().sum()
    error = ratios.std().item() / math.sqrt(len(ratios))
    kind: Distribution = distribution  # type: ignore[assignment]
    assert ratios.mean().item() == pytest.approx(lemma_2(10, n, kind, one_sided=True), abs=4 * error)
    assert abs(lemma_2(10, n, kind, one_sided=True) - lemma_2(10, n, kind)) > 4 * error, (
        "the comparison means something"
    )
    curvature = torch.diag(torch.arange(10, dtype=torch.float64))
    bent = ((estimates @ curvature) * estimates).sum(dim=1)
    if distribution == "gaussian":
        along = gradient @ curvature @ gradient
        expected = gradient.square().sum() / corollary_1(
            45.0, (along / gradient.square().sum()).item(), n, one_sided=True
        )
        assert bent.mean().item() == pytest.approx(expected.item(), abs=4 * bent.std().item() / math.sqrt(len(bent)))


@pytest.mark.parametrize("n", [1, 4])
def test_no_rate_lets_the_loss_fall_farther_in_a_step_than_corollary_1s(n: int) -> None:
    eigenvalues = torch.tensor([5.0, *[1.0] * 15, *[0.0] * 14], dtype=torch.float64)  # r = 4
    theta = torch.zeros(30, dtype=torch.float64)
    theta[:16] = torch.linspace(-1.0, 1.0, 16)
    theta[0] = 0.5
    gradient = eigenvalues * theta
    z = directions("gaussian", 12000, (5, 6)).view(-1, n, 30)
    steps = ((z @ gradient).unsqueeze(2) * z).mean(dim=1)

    def change(rate: float) -> float:
        return (-rate * steps @ gradient + 0.5 * rate**2 * (steps.square() @ eigenvalues)).mean().item()

    rate = corollary_1(eigenvalues.sum().item(), eigenvalues.max().item(), n)
    # ∇LᵀH∇L is ‖H‖‖∇L‖² at most: the rate is the best one or, by a little, a smaller one.
    assert change(rate) < min(change(0.0), change(rate / 2), change(rate * 3))
    best = min((change(rate * 2.0 ** (i / 8)), i) for i in range(-16, 17))
    assert 0 <= best[1] <= 8
    assert change(rate) < 0.8 * best[0]


def steps_to_a_tenth(quadratic: Callable[..., Any], rank: int, dimension: int) -> float:
    """Steps of MeZO until the loss is a tenth of what it was, the mean of several runs, with Corollary 1's rate."""
    taken = []
    for seed in range(4):
        problem = quadratic([1.0] * rank, "rademacher", dimension)
        problem.linear.zero_()
        start = problem.basis @ torch.ones(rank, dtype=torch.float64)
        problem.parameters["w"].copy_(start.view(-1, 20).float())
        mezo = MeZO(problem.parameters.items(), lr=corollary_1(float(rank), 1.0, 1), epsilon=1e-3, seed=seed)
        goal = 0.1 * problem.at(Point(0, 0.0))
        for step in itertools.count():
            if problem.at(Point(0, 0.0)) <= goal:
                taken.append(step)
                break
            probe = mezo.ask()
            mezo.tell(probe.id, Scores.of_losses(problem.losses(probe.points)))
            mezo.step()
    return sum(taken) / len(taken)


def test_the_number_of_steps_grows_with_the_effective_rank_and_not_with_the_dimension(
    quadratic: Callable[..., Any],
) -> None:
    """Theorem 1: E L falls by 1 − 1/(r + 2) a step, so that it takes about 2.3·(r + 2), whatever d is."""
    steps = {(r, d): steps_to_a_tenth(quadratic, r, d) for r in (8, 32) for d in (80, 1280)}
    for (r, _), taken in steps.items():
        assert 0.5 < taken / (2.3 * (r + 2)) < 1.5, steps
    assert steps[8, 1280] / steps[8, 80] < 2, f"sixteen times the dimension: {steps}"
    assert steps[32, 1280] / steps[32, 80] < 1.5, steps
    assert steps[32, 80] / steps[8, 80] > 2, f"four times the rank: {steps}"
