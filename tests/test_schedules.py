"""How many directions a step averages over."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zorl.schedules import Directions


@pytest.mark.parametrize("value", [4, "4", " 4 ", Directions(4, 4)])
def test_a_number_is_constant(value: object):
    directions = Directions.parse(value)  # type: ignore[arg-type]
    assert [directions.at(step) for step in (0, 1, 1000)] == [4, 4, 4]


def test_a_schedule_grows_linearly_and_then_stays():
    directions = Directions.parse("1-9/8")
    assert [directions.at(step) for step in range(11)] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9]


def test_a_schedule_may_fall():
    directions = Directions.parse("8 - 2 / 3")
    assert [directions.at(step) for step in range(5)] == [8, 6, 4, 2, 2]


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 1000), st.integers(0, 2000))
def test_n_stays_between_its_ends_and_is_written_as_it_is_read(start: int, end: int, steps: int, step: int):
    directions = Directions(start, end, steps)
    assert min(start, end) <= directions.at(step) <= max(start, end)
    assert Directions.parse(str(directions)).at(step) == directions.at(step)


@pytest.mark.parametrize("bad", ["", "four", "1-", "1-8", "1/8", "-1", "1.5", 1.5, None, True])
def test_anything_else_is_refused_with_an_example(bad: object):
    with pytest.raises(ValueError, match="n_spsa must be a number such as 4, or a schedule such as '1-8/1000', got"):
        Directions.parse(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [0, "0", "0-8/10", "1-0/10", "1-8/0", Directions])
def test_less_than_one_direction_is_refused(bad: object):
    with pytest.raises(ValueError, match="n_spsa"):
        Directions.parse(bad)  # type: ignore[arg-type]
