"""Evaluating a closure that sees θ itself: θ is moved, and put back to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zorl.directions import DISTRIBUTIONS, Distribution, Step, key
from zorl.in_place import InPlace
from zorl.kernels import DTYPES, reference
from zorl.parameters import ParameterSet
from zorl.probe import CENTRE, Point

REACH = 0.01
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


def weights(n: int = 2000, dtype: torch.dtype = torch.float32, scale: float = 0.1, seed: int = 0) -> Tensor:
    return (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.clone().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def z_of(seed: int, name: str, n: int, distribution: Distribution = "rademacher") -> Tensor:
    return reference.sample(torch.arange(n), key(seed, name), distribution)


@each_dtype
@each_distribution
def test_a_thousand_rounds_leave_every_bit(dtype: torch.dtype, distribution: Distribution):
    theta = weights(500, dtype)
    in_place = InPlace(ParameterSet([("w", theta)]), distribution, REACH)
    before = bits(theta)
    for i in range(1000):
        in_place.evaluate(Point(i // 2, 1e-3 * (-1) ** i), lambda: None)
    assert torch.equal(bits(theta), before)


@each_dtype
@each_distribution
def test_the_closure_sees_the_point(dtype: torch.dtype, distribution: Distribution):
    theta = weights(dtype=dtype)
    in_place = InPlace(ParameterSet([("w", theta)]), distribution, REACH)
    for offset in (REACH, -REACH, 1e-3):
        seen = in_place.evaluate(Point(3, offset), theta.clone).double()
        expected = theta.double() + offset * z_of(3, "w", len(theta), distribution).double()
        rounding = {torch.float32: 1e-7, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}[dtype]
        torch.testing.assert_close(seen, expected, rtol=0, atol=rounding)
    assert torch.equal(in_place.evaluate(CENTRE, theta.clone), theta)


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40),
    st.floats(1e-5, 0.1),
    st.floats(1e-3, 1.0),
    st.integers(0, 1 << 40),
)
@settings(max_examples=60, deadline=None)
def test_any_weights_come_back_from_any_offset(values: list[float], reach: float, share: float, seed: int):
    theta = torch.tensor(values)
    in_place = InPlace(ParameterSet([("w", theta)]), "rademacher", reach)
    before = bits(theta)
    seen = in_place.evaluate(Point(seed, -reach * share), theta.clone)
    assert torch.equal(bits(theta), before)
    assert not (seen == theta).any(), "a perturbation must perturb every weight"
    assert (seen - theta).abs().unique().numel() == 1, "by the same amount, exactly"


def test_snapping_moves_no_weight_by_more_than_a_rounding_of_the_largest():
    base = weights(10000, scale=3.0)
    theta = base.clone()
    InPlace(ParameterSet([("w", theta)]), "rademacher", REACH)
    assert (theta - base).abs().max() <= 2.0**-23 * (base.abs().max() + 2 * REACH)
    again = theta.clone()
    InPlace(ParameterSet([("w", again)]), "rademacher", REACH)
    assert torch.equal(bits(again), bits(theta))  # it is on its grid already


def test_a_tensor_of_zeros_and_an_empty_one_are_moved_and_restored():
    zeros, empty, scalar = torch.zeros(5), torch.zeros(0), torch.tensor(-0.0)  # 0-dimensional
    in_place = InPlace(ParameterSet([("z", zeros), ("e", empty), ("s", scalar)]), "rademacher", REACH)
    seen = in_place.evaluate(Point(1, 1e-3), lambda: (zeros.clone(), scalar.clone()))
    torch.testing.assert_close(seen[0].abs(), torch.full((5,), 1e-3))
    assert seen[1].abs().item() == pytest.approx(1e-3, rel=1e-5)  # to the grid
    assert not zeros.any()
    assert not scalar.any()


def test_half_precision_and_gaussian_directions_say_that_they_are_copied():
    named = [("a", weights(8)), ("b", weights(8, torch.bfloat16)), ("c", weights(8, torch.float16))]
    assert InPlace(ParameterSet(named), "rademacher", REACH).copied == ["b", "c"]
    assert InPlace(ParameterSet(named), "gaussian", REACH).copied == ["a", "b", "c"]


@each_dtype
@each_distribution
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_closure_leaves_every_bit(
    dtype: torch.dtype, distribution: Distribution, error: type[BaseException]
):
    named = [("a", weights(64, dtype)), ("b", weights(64, dtype, seed=1))]
    in_place = InPlace(ParameterSet(named), distribution, REACH)
    before = [bits(tensor) for _, tensor in named]

    def closure() -> None:
        raise error("on purpose")

    with pytest.raises(error, match="on purpose"):
        in_place.evaluate(Point(0, REACH), closure)
    assert all(torch.equal(bits(tensor), was) for (_, tensor), was in zip(named, before, strict=True))


def test_an_offset_beyond_the_reach_is_refused():
    in_place = InPlace(ParameterSet([("w", weights(4))]), "rademacher", REACH)
    with pytest.raises(ValueError, match=r"offset 0\.02 is beyond the reach 0\.01"):
        in_place.evaluate(Point(0, 0.02), lambda: None)


@pytest.mark.parametrize("coefficient", [1e-9, 1e-8, 3e-7, 1e-3])
def test_the_mean_of_updates_on_the_grid_is_the_coefficient(coefficient: float):
    """Below the grid's spacing (here 2⁻²³) too: a seed either moves the whole tensor by one spacing or not at all."""
    n, seeds = 16, 4000
    theta = torch.zeros(n)
    theta[0] = 0.5
    in_place = InPlace(ParameterSet([("w", theta)]), "rademacher", REACH)
    applied = []
    for seed in range(seeds):
        before = theta.clone()
        in_place.add([Step(seed, coefficient)])
        applied.append(((theta - before) * z_of(seed, "w", n))[1:].mean().item())
    spacing = 2.0**-23
    assert sum(applied) / seeds == pytest.approx(coefficient, abs=5 * math.sqrt(coefficient * spacing / seeds))


def test_the_update_is_the_coefficient_times_z():
    theta = weights(1000)
    in_place = InPlace(ParameterSet([("w", theta)]), "rademacher", REACH)
    before = theta.clone()
    in_place.add([Step(1, 0.01), Step(2, -0.02)])
    expected = before.double() + 0.01 * z_of(1, "w", 1000).double() - 0.02 * z_of(2, "w", 1000).double()
    torch.testing.assert_close(theta.double(), expected, rtol=0, atol=5e-7)


def test_weights_that_outgrow_their_grid_stay_exact_on_a_coarser_one():
    theta = weights(200)
    in_place = InPlace(ParameterSet([("w", theta)]), "rademacher", REACH)
    for seed in range(60):
        in_place.add([Step(seed, 0.5)])  # to about |w| = 4, from 0.3
        before = bits(theta)
        in_place.evaluate(Point(seed, 1e-3), lambda: None)
        assert torch.equal(bits(theta), before)
    assert theta.abs().max() > 2.0


def test_steps_added_together_are_steps_added_one_by_one():
    steps = [Step(seed, c) for seed, c in enumerate((0.3, -1.5, 1e-8, 0.7, 2.0, -0.001))]
    together, alone = weights(100), weights(100)
    InPlace(ParameterSet([("w", together)]), "rademacher", REACH).add(steps)
    one_by_one = InPlace(ParameterSet([("w", alone)]), "rademacher", REACH)
    for step in steps:
        one_by_one.add([step])
        one_by_one.evaluate(Point(9, REACH), lambda: None)
    assert torch.equal(bits(together), bits(alone))


def test_a_view_into_a_larger_tensor_is_moved_alone():
    whole = weights(100).view(10, 10)
    view = whole[:, 2:5]
    rest = whole.clone()
    in_place = InPlace(ParameterSet([("w", view)]), "rademacher", REACH)
    snapped = whole.clone()
    in_place.evaluate(Point(0, REACH), lambda: None)
    assert torch.equal(whole, snapped)
    seen = in_place.evaluate(Point(0, REACH), whole.clone)
    assert torch.equal(seen[:, :2], rest[:, :2])
    assert torch.equal(seen[:, 5:], rest[:, 5:])
    assert not (seen[:, 2:5] == whole[:, 2:5]).any()
