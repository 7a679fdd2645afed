"""ε: chosen where slopes are right."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from zorl.probe import Point
from zorl.slopes import Look, choose_epsilon, look

EPSILONS = [1e-4, 1e-3, 1e-2, 1e-1]


def along_a_line(loss: Callable[[float], float]) -> Callable[[Sequence[Point]], Tensor]:
    """A loss that depends on the offset alone, with another slope for every seed."""
    return lambda points: torch.tensor([loss(p.offset) * (1 + p.seed) for p in points], dtype=torch.float64)


def test_the_largest_epsilon_that_the_third_derivative_leaves_alone_is_chosen() -> None:
    looks = look(along_a_line(lambda x: x + 2e3 * x**3), range(4), EPSILONS)  # the slope is off by 2000·ε²
    assert [found.slope_error for found in looks] == pytest.approx([1e-3, 1e-3, 0.2, 20.0], rel=0.02)
    assert choose_epsilon(looks, 0.8) == 1e-3
    straight = look(along_a_line(lambda x: 3.0 * x), range(4), EPSILONS)
    assert choose_epsilon(straight, 0.8) == 1e-1


def test_steps_of_a_reward_call_for_a_larger_epsilon() -> None:
    stairs = look(along_a_line(lambda x: round(x / 3e-3) * 3e-3), range(4), EPSILONS)
    assert [found.informative for found in stairs] == [0.0, 0.0, 1.0, 1.0]
    assert choose_epsilon(stairs, 0.8) == 1e-1
    flat = look(along_a_line(lambda x: 0.0), range(4), EPSILONS)
    assert all(math.isnan(found.slope_error) for found in flat)
    assert choose_epsilon(flat, 0.8) is None


def test_a_loss_that_saturates_has_its_plateau_where_it_is_straight() -> None:
    """Beyond ε = 3e-3 both sides are at the ends of a sigmoid, and slopes differ little because there is little left of them."""

    def loss(points: Sequence[Point]) -> Tensor:
        return torch.tensor([math.tanh(p.offset * (1 + p.seed) / 3e-3) for p in points], dtype=torch.float64)

    epsilons = [10.0 ** (-4.0 + i / 2.0) for i in range(9)]
    looks = look(loss, range(4), epsilons)
    assert choose_epsilon(looks, 0.8) == pytest.approx(10**-3.5)
    assert looks[0].slope_error < 0.03
    assert looks[-1].slope_error > 0.9


def test_an_epsilon_that_is_not_informative_enough_is_not_chosen() -> None:
    looks = [Look(1e-3, 1.0, 0.3), Look(1e-2, 0.9, 0.2), Look(1e-1, 0.5, 0.01)]
    assert choose_epsilon(looks, 0.8) == 1e-2, "none is within the tolerance: the best of the informative ones"
    assert choose_epsilon(looks, 0.95) == 1e-3
    assert choose_epsilon(looks, 0.4) == 1e-1
