"""The order of rows in an epoch."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zorl.sampling import StratifiedSampler


@st.composite
def labelled(draw: st.DrawFn) -> tuple[list[str], int]:
    """Labels of up to eight classes, some of them rare, in any order, and a batch size up to their number."""
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=8))
    labels = [f"label {k}" for k, size in enumerate(sizes) for _ in range(size)]
    draw(st.randoms(use_true_random=False)).shuffle(labels)
    return labels, draw(st.integers(1, len(labels)))


def batches(order: list[int], batch_size: int) -> list[list[int]]:
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@given(labelled(), st.integers(0, 5), st.integers(0, 3))
def test_every_index_appears_exactly_once_an_epoch(case: tuple[list[str], int], seed: int, epoch: int) -> None:
    labels, batch_size = case
    sampler = StratifiedSampler(len(labels), batch_size, labels, seed)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(labels)
    assert sorted(sampler) == list(range(len(labels)))


@settings(max_examples=300)
@given(labelled())
def test_every_full_batch_holds_each_labels_share_rounded_down_or_up(case: tuple[list[str], int]) -> None:
    labels, batch_size = case
    size, counts = len(labels), Counter(labels)
    for batch in batches(list(StratifiedSampler(size, batch_size, labels)), batch_size):
        if len(batch) == batch_size:
            held = Counter(labels[index] for index in batch)
            for label, count in counts.items():
                assert count * batch_size // size <= held[label] <= -(-count * batch_size // size)


@given(labelled())
def test_no_label_is_ever_two_rows_ahead_of_or_behind_its_share(case: tuple[list[str], int]) -> None:
    labels, batch_size = case
    size, counts = len(labels), Counter(labels)
    seen: Counter[str] = Counter()
    for number, batch in enumerate(batches(list(StratifiedSampler(size, batch_size, labels)), batch_size), 1):
        seen.update(labels[index] for index in batch)
        for label, count in counts.items():
            assert abs(seen[label] - count * min(number * batch_size, size) / size) < 2


def test_a_rare_label_is_spread_evenly_over_the_epoch() -> None:
    labels = ["common"] * 72 + ["rare"] * 8  # 4 rows a batch: a rare one every 2.5 batches
    order = list(StratifiedSampler(80, 4, labels, seed=7))
    holding = [i for i, batch in enumerate(batches(order, 4)) if any(labels[index] == "rare" for index in batch)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(holding)]
    assert len(holding) == 8
    assert set(gaps) == {2, 3}


def test_shares_that_are_whole_numbers_are_met_exactly() -> None:
    labels = ["a", "b", "b", "c", "c", "c", "c", "c"] * 10
    for batch in batches(list(StratifiedSampler(80, 16, labels)), 16):
        assert Counter(labels[index] for index in batch) == {"a": 2, "b": 4, "c": 10}


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    labels = [i % 3 for i in range(60)]

    def order(seed: int, epoch: int) -> list[int]:
        sampler = StratifiedSampler(60, 8, labels, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    reference = order(3, 2)
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert order(3, 2) == reference
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    orders = {tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_iterating_twice_gives_the_same_epoch() -> None:
    sampler = StratifiedSampler(20, 4, [0, 1] * 10, seed=1)
    assert list(sampler) == list(sampler)


def test_without_labels_the_order_is_a_plain_shuffle() -> None:
    order = list(StratifiedSampler(50, 8, seed=0))
    assert sorted(order) == list(range(50))
    assert order != list(range(50))


def test_over_many_epochs_every_row_meets_every_place() -> None:
    sampler = StratifiedSampler(12, 4, ["a"] * 8 + ["b"] * 4)
    met = [set() for _ in range(12)]
    for epoch in range(200):
        sampler.set_epoch(epoch)
        for place, index in enumerate(sampler):
            met[index].add(place)
    assert all(len(places) == 12 for places in met)


def test_labels_are_compared_as_text() -> None:
    assert list(StratifiedSampler(6, 2, [1, "1", 0, "0", 1, 0])) == list(StratifiedSampler(6, 2, list("110010")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0, "batch_size": 1}, "size must be at least 1, got 0"),
        ({"size": 4, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"size": 4, "batch_size": 2, "seed": -1}, "seed must not be negative, got -1"),
        ({"size": 4, "batch_size": 2, "labels": [0, 1]}, "a label for each of 4 rows, got 2 labels"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StratifiedSampler(**arguments)
