"""SPSA: exact on quadratics, unbiased on linear functions, odd in its sides."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zorl.directions import DISTRIBUTIONS, Distribution, key
from zorl.estimators import SPSA, OnePoint, OneSided
from zorl.kernels import kernel_for, reference
from zorl.probe import CENTRE, Choice, Point, Scores, Verdict, Verdicts

SEEDS = (11, 0, 7)
spsa = SPSA()


def at(theta: Tensor, point: Point, distribution: Distribution = "rademacher") -> Tensor:
    out = torch.empty_like(theta)
    kernel_for(theta).perturb(theta, key(point.seed, "w"), point.offset, distribution, out)
    return out.double()


def z_of(seed: int, n: int, distribution: Distribution = "rademacher") -> Tensor:
    return reference.sample(torch.arange(n), key(seed, "w"), distribution).double()


def test_the_points_are_both_sides_of_each_direction():
    assert spsa.points((3, 5), 0.1) == (Point(3, 0.1), Point(3, -0.1), Point(5, 0.1), Point(5, -0.1))


def test_spsa_is_exact_on_quadratics():
    """On a grid of 2⁻¹⁰ all sums are exact in float32, so that g = z·∇f remains, to float64's rounding."""
    d, epsilon = 30, 2.0**-7
    generator = torch.Generator().manual_seed(0)
    theta = torch.randint(-1000, 1000, (d,), generator=generator) * 2.0**-10
    root = torch.randn(d, d, dtype=torch.float64, generator=generator)
    A, b = root + root.T, torch.randn(d, dtype=torch.float64, generator=generator)
    losses = [0.5 * w @ A @ w + b @ w for w in (at(theta, point) for point in spsa.points(SEEDS, epsilon))]
    gradient = A @ theta.double() + b
    found = spsa.project(Scores.of_losses(torch.stack(losses)), len(SEEDS), epsilon)
    expected = [(z_of(seed, d) @ gradient).item() for seed in SEEDS]
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_estimate_is_unbiased_on_linear_functions(distribution: Distribution):
    n, d, epsilon = 4000, 8, 2.0**-7
    gradient = torch.linspace(-1, 2, d, dtype=torch.float64)
    theta = torch.zeros(d)
    seeds = tuple(range(n))
    losses = torch.stack([gradient @ at(theta, point, distribution) for point in spsa.points(seeds, epsilon)])
    projected = torch.tensor(spsa.project(Scores.of_losses(losses), n, epsilon))
    mean = (projected[:, None] * torch.stack([z_of(seed, d, distribution) for seed in seeds])).mean(0)
    # Var(z·∇f zᵢ) ≤ ‖∇f‖² + ∂ᵢf² for both distributions.
    bound = 5 * ((gradient.square().sum() + gradient.square()) / n).sqrt()
    assert ((mean - gradient).abs() < bound).all()


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=2), st.floats(1e-4, 1.0))
def test_swapping_the_sides_negates_the_projected_gradient(losses: list[float], epsilon: float):
    (g,) = spsa.project(Scores.of_losses(losses), 1, epsilon)
    (swapped,) = spsa.project(Scores.of_losses(losses[::-1]), 1, epsilon)
    assert swapped == -g
    assert g == (losses[0] - losses[1]) / (2 * epsilon)


def test_a_reward_is_a_negative_loss():
    rewards = torch.tensor([[0.75], [0.25]])
    assert spsa.project(Scores(rewards), 1, 0.5) == [-0.5]
    assert spsa.project(Scores.of_losses(-rewards), 1, 0.5) == [-0.5]


def test_prompts_on_which_a_side_abstained_are_left_out():
    nan = math.nan
    values = torch.tensor([[1.0, nan, 3.0, 5.0], [0.0, 9.0, nan, 2.0]])
    assert spsa.project(Scores(values), 1, 0.5) == [-2.0]  # (1 + 3) / 2


def test_all_abstained_is_nan_and_a_tie_is_zero():
    nan = math.nan
    values = torch.tensor([[nan, nan], [1.0, 2.0], [1.0, 2.0], [2.0, 1.0], [4.0, nan], [nan, 4.0]])
    first, second, third = spsa.project(Scores(values), 3, 0.1)
    assert math.isnan(first)
    assert math.isnan(third)
    assert math.copysign(1.0, second) == 1.0  # 0, not −0
    assert second == 0.0


def test_one_number_for_the_whole_batch_is_enough():
    assert spsa.project(Scores(torch.tensor([[0.5], [0.25], [0.0], [1.0]])), 2, 0.125) == [-1.0, 4.0]


def test_scores_of_too_few_points_are_refused():
    with pytest.raises(ValueError, match="expected scores of 4 points, got 2"):
        spsa.project(Scores(torch.zeros(2, 1)), 2, 0.1)


@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
def test_infinite_scores_are_refused(infinity: float):
    with pytest.raises(ValueError, match="scores hold an infinity; return NaN"):
        Scores(torch.tensor([[0.0], [infinity]]))


def test_scores_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \(points, prompts\), got \(3,\)"):
        Scores(torch.zeros(3))


def verdicts(*items: tuple[int, int, Choice]) -> Verdicts:
    return Verdicts(tuple(Verdict(a, b, prompt, choice) for prompt, (a, b, choice) in enumerate(items)))


def test_a_verdict_for_the_plus_side_is_a_gradient_towards_it():
    assert spsa.project(verdicts((0, 1, Choice.FIRST)), 1, 0.5) == [-1.0]
    assert spsa.project(verdicts((0, 1, Choice.SECOND)), 1, 0.5) == [1.0]


def test_the_order_in_which_points_are_compared_does_not_matter():
    for choice in (Choice.FIRST, Choice.SECOND, Choice.TIE, Choice.BOTH_BAD):
        one = spsa.project(verdicts((2, 3, choice)), 2, 0.5)[1]
        other = spsa.project(verdicts((3, 2, choice.flipped)), 2, 0.5)[1]
        assert one == other


def test_ties_and_both_bad_count_and_abstentions_do_not():
    def mean(*choices: Choice) -> float:
        return -spsa.project(verdicts(*((0, 1, choice) for choice in choices)), 1, 0.5)[0]

    assert mean(Choice.FIRST, Choice.TIE) == 0.5
    assert mean(Choice.FIRST, Choice.BOTH_BAD) == 0.5
    assert mean(Choice.FIRST, Choice.ABSTAIN) == 1.0
    assert mean(Choice.FIRST, Choice.SECOND) == 0.0
    assert mean(Choice.TIE) == 0.0
    assert math.isnan(mean(Choice.ABSTAIN))
    assert math.isnan(mean())


@pytest.mark.parametrize(("a", "b"), [(0, 2), (0, 0), (1, 2), (2, 3), (-1, 0), (-2, -1)])
def test_a_verdict_on_anything_but_two_sides_is_refused(a: int, b: int):
    with pytest.raises(ValueError, match=f"points {a} and {b}, not two sides of a direction"):
        spsa.project(verdicts((a, b, Choice.FIRST)), 1, 0.1)


def test_abstaining_and_ties_survive_a_flip():
    flipped = {choice: choice.flipped for choice in Choice}
    assert flipped[Choice.FIRST] == Choice.SECOND
    assert flipped[Choice.SECOND] == Choice.FIRST
    assert all(flipped[choice] == choice for choice in (Choice.TIE, Choice.BOTH_BAD, Choice.ABSTAIN))
    assert [choice.preference for choice in (Choice.FIRST, Choice.SECOND, Choice.TIE, Choice.BOTH_BAD)] == [1, -1, 0, 0]
    assert math.isnan(Choice.ABSTAIN.preference)
    assert Choice("both bad") is Choice.BOTH_BAD


def test_the_centre_is_theta_itself():
    theta = torch.randn(5)
    assert torch.equal(at(theta, CENTRE), theta.double())


def test_one_point_is_the_residual_of_the_step_before():
    one = OnePoint()
    assert one.points((3, 5), 0.5) == (Point(3, 0.5), Point(5, 0.5))
    answers = [Scores.of_losses(values) for values in ([2.0], [3.0], [1.0, 5.0], [math.nan], [4.5], [math.nan, 4.0])]
    found = []
    for of_step in answers:
        found.append(one.project(of_step, len(of_step.values), 0.5))
        one.observe(one.losses(of_step))
    assert math.isnan(found[0][0])
    assert found[1:3] == [[2.0], [-4.0, 4.0]]
    assert math.isnan(found[3][0])
    assert found[4] == [3.0]  # against the mean of 1 and 5: the step that abstained is passed over
    assert math.isnan(found[5][0])
    assert found[5][1] == -1.0


def test_one_sided_compares_each_direction_with_the_others():
    one = OneSided()
    assert one.points((3, 5), 0.5) == (Point(3, 0.5), Point(5, 0.5))
    assert one.project(Scores.of_losses([2.0, 3.0, 7.0]), 3, 0.5) == [-6.0, -3.0, 9.0]
    assert one.project(Scores.of_losses([0.1] * 7), 7, 0.5) == [0.0] * 7, "a tie is exact"
    assert one.losses(Scores.of_losses([2.0, 3.0])) == ()


def test_one_sided_compares_prompt_by_prompt_what_was_scored():
    nan = math.nan
    rewards = torch.tensor([[1.0, 5.0, nan], [2.0, nan, 4.0], [6.0, 3.0, nan]])
    found = OneSided().project(Scores(rewards), 3, 1.0)
    # The first prompt has three points, the second two, and the third only one, which says nothing.
    assert found == pytest.approx([(3.0 - 2.0) / 2, 1.5, (-4.5 + 2.0) / 2])
    abstained = OneSided().project(Scores(torch.tensor([[1.0], [nan], [3.0]])), 3, 1.0)
    assert [abstained[0], abstained[2]] == [2.0, -2.0]
    assert math.isnan(abstained[1])
    assert all(math.isnan(g) for g in OneSided().project(Scores(torch.tensor([[1.0, nan], [nan, 2.0]])), 2, 1.0))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_one_sided_is_unbiased_where_all_points_share_a_constant_and_a_curvature(distribution: Distribution):
    """‖z‖² is that of every direction, but for Gaussian and rank-four ones; those differ, and independently of z's sign."""
    steps, n, d, epsilon = 1500, 4, 8, 2.0**-3
    gradient = torch.linspace(-1, 2, d, dtype=torch.float64)
    total = torch.zeros(d, dtype=torch.float64)
    for step in range(steps):
        seeds = tuple(n * step + i for i in range(n))
        points = OneSided().points(seeds, epsilon)
        thetas = [at(torch.zeros(d), point, distribution) for point in points]
        losses = [(gradient @ theta + theta @ theta).item() + 3.0 for theta in thetas]
        for seed, g in zip(seeds, OneSided().project(Scores.of_losses(losses), n, epsilon), strict=True):
            total += g * z_of(seed, d, distribution)
    bound = 5 * (3 * gradient.square().sum() / (steps * n)).sqrt()
    assert ((total / (steps * n) - gradient).abs() < bound).all()


def test_one_sided_refuses_a_single_direction_verdicts_and_scores_of_too_few_points():
    with pytest.raises(ValueError, match="compares directions with each other and needs n_spsa of 2 or more"):
        OneSided().points((3,), 0.5)
    with pytest.raises(ValueError, match="estimator='one_sided' compares scores, and verdicts have none"):
        OneSided().project(verdicts((0, 1, Choice.FIRST)), 2, 0.1)
    with pytest.raises(ValueError, match="expected scores of 3 points, got 2"):
        OneSided().project(Scores.of_losses([1.0, 2.0]), 3, 0.1)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_one_point_is_unbiased_on_linear_functions(distribution: Distribution):
    n, d, epsilon = 6000, 8, 2.0**-3
    gradient = torch.linspace(-1, 2, d, dtype=torch.float64)
    one, total = OnePoint(), torch.zeros(d, dtype=torch.float64)
    for seed in range(n):
        (point,) = one.points((seed,), epsilon)
        answers = Scores.of_losses([(gradient @ at(torch.zeros(d), point, distribution)).item() + 3.0])
        (g,) = one.project(answers, 1, epsilon)
        one.observe(one.losses(answers))
        if seed:
            total += g * z_of(seed, d, distribution)
    bound = 5 * (3 * gradient.square().sum() / n).sqrt()  # two residuals' variance, and one of z
    assert ((total / (n - 1) - gradient).abs() < bound).all()


def test_one_point_refuses_verdicts_and_scores_of_too_few_points():
    with pytest.raises(
        ValueError, match="estimator='one_point' compares the scores of one step with those of the step before"
    ):
        OnePoint().project(verdicts((0, 1, Choice.FIRST)), 1, 0.1)
    with pytest.raises(ValueError, match="expected scores of 2 points, got 1"):
        OnePoint().project(Scores(torch.zeros(1, 1)), 2, 0.1)
