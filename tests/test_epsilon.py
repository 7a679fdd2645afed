"""ε: fixed, or adapted so that probes say something."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zorl.epsilon import FLOOR, Epsilon

START = 5e-3


def test_a_fixed_epsilon_stays():
    epsilon = Epsilon(1e-3)
    epsilon.observe([0.0] * 100 + [1.0] * 7 + [math.nan])
    assert epsilon.value == epsilon.largest == 1e-3


def test_ties_widen_and_informative_probes_narrow():
    epsilon = Epsilon("auto", start=START, target=0.8, growth=1.25)
    epsilon.observe([0.0])
    assert epsilon.value == pytest.approx(START * 1.25)
    epsilon.observe([0.0, 0.0])
    assert epsilon.value == pytest.approx(START * 1.25**3)
    epsilon.observe([1.0, -2.0])
    assert epsilon.value == pytest.approx(START * 1.25 ** (3 - 2 * 0.15 / 0.85)), "it aims at 0.85 to stay above 0.8"


def test_abstentions_do_not_move_it():
    epsilon = Epsilon("auto")
    epsilon.observe([0.0] * 3)
    before = epsilon.value
    epsilon.observe([math.nan] * 50)
    assert epsilon.value == before


def test_it_is_capped():
    epsilon = Epsilon("auto", start=START, cap=16.0)
    epsilon.observe([0.0] * 1000)
    assert epsilon.value == pytest.approx(16 * START)
    assert epsilon.value <= epsilon.largest
    epsilon.observe([1.0] * 4)
    assert epsilon.value < 16 * START, "ties beyond the cap are not remembered"


def test_it_never_falls_below_its_start():
    epsilon = Epsilon("auto", start=START)
    epsilon.observe([1.0] * 100)
    assert epsilon.value == pytest.approx(START)
    epsilon.observe([0.0])
    assert epsilon.value == pytest.approx(START * 1.25)


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, -0.5, math.nan]), min_size=1, max_size=4), max_size=60))
def test_it_is_a_pure_function_of_the_log_within_its_bounds(log: list[list[float]]):
    one, other = Epsilon("auto"), Epsilon("auto")
    for projected in log:
        one.observe(projected)
        assert START * (1 - 1e-9) <= one.value <= one.largest
    for single in [[g] for projected in log for g in projected]:
        other.observe(single)
    assert one.value == other.value


@pytest.mark.parametrize("target", [0.5, 0.8, 0.9])
def test_it_keeps_the_share_of_informative_probes_above_the_target(target: float):
    """A probe of size ε is informative with probability 1 − exp(−ε/0.02), as if rewards changed at random places."""
    generator = random.Random(0)
    epsilon = Epsilon("auto", start=1e-3, cap=1000.0, target=target)
    informative = []
    for _ in range(4000):
        found = generator.random() < 1 - math.exp(-epsilon.value / 0.02)
        informative.append(found)
        epsilon.observe([1.0 if found else 0.0])
    share = sum(informative[1000:]) / 3000
    assert share > target
    assert share == pytest.approx(target + (1 - target) / 4, abs=0.03), "and looks no farther than it has to"


@pytest.mark.parametrize("bad", [0.0, -1e-3, math.nan, math.inf, "large", "1e-3"])
def test_anything_but_a_positive_number_or_auto_is_refused(bad: float):
    with pytest.raises(ValueError, match="epsilon must be a positive number or 'auto', got"):
        Epsilon(bad)


@pytest.mark.parametrize("target", [0.0, 1.0, -0.5, 2.0])
def test_a_target_that_is_no_share_is_refused(target: float):
    with pytest.raises(ValueError, match=f"informative_target must be between 0 and 1, got {target}"):
        Epsilon("auto", target=target)


@pytest.mark.parametrize("dtype", list(FLOOR))
def test_half_precision_has_a_floor(dtype: torch.dtype):
    assert Epsilon(FLOOR[dtype], [dtype]).value == FLOOR[dtype]
    with pytest.raises(ValueError, match=f"is below {FLOOR[dtype]:g}, under which {dtype} rounds most perturbations"):
        Epsilon(FLOOR[dtype] / 2, [torch.float32, dtype])


@pytest.mark.parametrize("dtype", list(FLOOR))
def test_above_the_floor_most_weights_are_perturbed(dtype: torch.dtype):
    theta = (torch.randn(10000, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    moved = (theta.double() + FLOOR[dtype]).to(dtype)
    assert (moved != theta).double().mean() > 0.5
    assert Epsilon("auto", [dtype]).value >= FLOOR[dtype]
