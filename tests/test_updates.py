"""From projected gradients to coefficients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zorl.updates import SGD, Normalized, UpdateName, bfloat16, update_rule

NAMES: tuple[UpdateName, ...] = ("sgd", "normalized", "momentum", "adam")
each_rule = pytest.mark.parametrize("name", NAMES)
projected_gradients = st.lists(
    st.one_of(st.just(math.nan), st.just(0.0), st.floats(-1e6, 1e6).map(bfloat16)), min_size=1, max_size=6
)


@each_rule
@given(st.lists(projected_gradients, min_size=1, max_size=8), st.floats(1e-8, 1.0))
def test_a_coefficient_is_finite_and_points_downhill(name: UpdateName, steps: list[list[float]], lr: float):
    rule = update_rule(name)
    for projected in steps:
        coefficients = rule.coefficients(projected, lr)
        for g, c in zip(projected, coefficients, strict=True):
            assert math.isfinite(c)
            assert c == bfloat16(c), "what is written down is what was done"
            if math.isnan(g) or g == 0.0:
                assert c == 0.0
            else:
                assert c * g <= 0.0
        rule.observe(projected)


@each_rule
def test_ties_and_abstentions_alone_move_nothing(name: UpdateName):
    rule = update_rule(name)
    for projected in ([math.nan], [0.0], [math.nan, math.nan], [0.0, math.nan], [0.0, 0.0]):
        assert all(c == 0.0 for c in rule.coefficients(projected, 0.1))
        rule.observe(projected)
    assert rule.coefficients([4.0], 0.5) != [0.0]


@each_rule
def test_the_divisor_counts_informative_and_tied_directions_but_no_abstentions(name: UpdateName):
    (alone,) = update_rule(name).coefficients([2.0], 0.5)
    assert update_rule(name).coefficients([2.0, math.nan], 0.5) == [alone, 0.0]
    assert update_rule(name).coefficients([2.0, 0.0], 0.5) == [alone / 2, 0.0]
    assert update_rule(name).coefficients([2.0, 2.0, 0.0, 0.0, math.nan], 0.5)[:2] == [alone / 4, alone / 4]


@each_rule
def test_negating_the_gradients_negates_the_coefficients(name: UpdateName):
    one, other = update_rule(name), update_rule(name)
    for projected in ([1.5, -2.0], [0.25, 3.0]):
        assert one.coefficients(projected, 0.1) == [-c for c in other.coefficients([-g for g in projected], 0.1)]
        one.observe(projected)
        other.observe([-g for g in projected])


@each_rule
def test_asking_for_coefficients_changes_no_state(name: UpdateName):
    rule = update_rule(name)
    rule.observe([3.0])
    assert rule.coefficients([1.0], 0.1) == rule.coefficients([1.0], 0.1)


def test_sgd_is_the_papers():
    assert SGD().coefficients([2.0, -4.0], 0.25) == [-0.25, 0.5]  # −lr·g/n, exact in bfloat16
    assert SGD().coefficients([1.0], 0.1) == [-0.10009765625]  # the nearest bfloat16


@given(st.floats(1e-3, 1e3).map(bfloat16), st.floats(1e-6, 1e-1))
def test_a_first_normalized_step_is_of_size_lr(g: float, lr: float):
    (c,) = Normalized().coefficients([g], lr)
    assert abs(c) == pytest.approx(lr, rel=2.0**-8)


@given(st.integers(-30, 30))
def test_the_scale_of_the_reward_does_not_matter(exponent: int):
    scale = 2.0**exponent
    one, other = Normalized(), Normalized()
    for projected in ([1.0], [-3.0], [0.0], [0.5, math.nan], [2.0, 2.5]):
        assert one.coefficients(projected, 0.1) == other.coefficients([scale * g for g in projected], 0.1)
        one.observe(projected)
        other.observe([scale * g for g in projected])


def test_a_freak_gradient_moves_a_weight_by_no_more_than_a_few_lr():
    rule = Normalized(decay=0.95)
    for _ in range(200):
        rule.observe([1.0])
    (c,) = rule.coefficients([1e6], 0.1)
    assert abs(c) == pytest.approx(0.1 / math.sqrt(0.05), rel=0.01)  # it counts in its own average


def test_the_average_forgets_and_is_not_biased_at_first():
    rule = Normalized(decay=0.5)
    rule.observe([2.0])
    # v = (0.5·0.5·4 + 0.5·16) / (0.5·0.5 + 0.5) = 12
    assert rule.coefficients([4.0], 1.0) == [bfloat16(-4.0 / math.sqrt(12.0))]


def test_ties_leave_the_average_alone():
    rule, other = Normalized(), Normalized()
    rule.observe([2.0])
    other.observe([0.0, 2.0, math.nan])
    other.observe([0.0])
    assert rule.coefficients([1.0], 0.1) == other.coefficients([1.0], 0.1)


def test_an_unknown_rule_is_named():
    choices = "'normalized', 'sgd', 'momentum', 'adam'"
    with pytest.raises(ValueError, match=f"update='rmsprop' is not an update rule; choose one of {choices}"):
        update_rule("rmsprop")  # type: ignore[arg-type]


@given(st.floats(width=32, allow_nan=False))
def test_rounding_to_bfloat16_is_torchs(value: float):
    assert bfloat16(value) == torch.tensor(value).bfloat16().item()
    assert bfloat16(bfloat16(value)) == bfloat16(value)
