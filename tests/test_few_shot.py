"""Few-shot draws: stratified, disjoint, and the same for a seed wherever they are made."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zorl.tasks.few_shot import OPT_SIZES, SEEDS, k_shot, sample


def rows_of(*counts: int) -> list[dict[str, Any]]:
    """Rows with the labels "0", "1", … as often as asked, in turns."""
    labels = [str(label) for label, count in enumerate(counts) for _ in range(count)]
    order = sorted(range(len(labels)), key=lambda i: (i * 7919) % max(1, len(labels)))
    return [{"id": i, "label": labels[j]} for i, j in enumerate(order)]


def ids(rows: list[dict[str, Any]]) -> list[int]:
    return [row["id"] for row in rows]


def test_the_paper_s_numbers() -> None:
    assert SEEDS == (13, 21, 42, 87, 100)
    assert OPT_SIZES == (1000, 500, 1000)


def test_a_seed_gives_these_rows_on_every_machine() -> None:
    assert [ids(part) for part in k_shot(rows_of(20, 30), 2, seed=13)] == [[8, 19, 21, 44], [5, 11, 16, 43]]
    assert ids(sample(rows_of(10, 20), (3, 3, 3), seed=13).test) == [1, 19, 22]


@given(st.lists(st.integers(8, 40), min_size=2, max_size=5), st.integers(1, 4), st.sampled_from(SEEDS))
def test_k_of_each_class_and_k_others_in_their_order(counts: list[int], k: int, seed: int) -> None:
    rows = rows_of(*counts)
    train, validation = k_shot(rows, k, seed=seed)
    for part in (train, validation):
        assert Counter(row["label"] for row in part) == {str(label): k for label in range(len(counts))}
        assert ids(part) == sorted(ids(part))
    assert not set(ids(train)) & set(ids(validation))
    assert k_shot(rows, k, seed=seed) == (train, validation)
    assert k_shot(rows, k, seed=seed, validation=False) == (train, [])


def test_seeds_differ() -> None:
    rows = rows_of(50, 50)
    assert len({tuple(ids(k_shot(rows, 4, seed=seed).train)) for seed in SEEDS}) == len(SEEDS)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=5), st.data())
def test_parts_keep_the_proportions_and_share_nothing(counts: list[int], data: st.DataObject) -> None:
    rows = rows_of(*counts)
    cuts = sorted(data.draw(st.tuples(*[st.integers(0, len(rows))] * 3)))
    sizes = (cuts[0], cuts[1] - cuts[0], cuts[2] - cuts[1])
    parts = sample(rows, sizes, seed=42)
    assert tuple(map(len, parts)) == sizes
    drawn = [i for part in parts for i in ids(part)]
    assert len(set(drawn)) == len(drawn)
    found = Counter(row["label"] for row in parts.train)
    for label, count in enumerate(counts):
        assert abs(found[str(label)] - sizes[0] * count / max(1, len(rows))) < 1


def test_without_labels_k_counts_rows_in_all() -> None:
    rows = [{"question": str(i), "label": [str(i)]} for i in range(10)]
    train, validation = k_shot(rows, 5, seed=13, label_column=None)
    assert sorted(row["question"] for row in train + validation) == [str(i) for i in range(10)]


def test_too_few_rows_are_an_error() -> None:
    with pytest.raises(
        ValueError, match="the label '1' has 7 rows, and 4 to train on with 4 to validate on make 8; take k = 3"
    ):
        k_shot(rows_of(20, 7), 4, seed=13)
    with pytest.raises(ValueError, match="there are 3 rows, and 2 to train on"):
        k_shot(rows_of(3), 2, seed=13, label_column=None)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        k_shot(rows_of(3), 0, seed=13)
    with pytest.raises(ValueError, match="add up to 30 at most"):
        sample(rows_of(10, 20), seed=13)
    with pytest.raises(ValueError, match="has no column 'gold'"):
        k_shot(rows_of(4, 4), 1, seed=13, label_column="gold")
