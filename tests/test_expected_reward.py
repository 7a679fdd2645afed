"""Expected rewards of labels: exact for single answers, sampled with common noise for sets."""

from __future__ import annotations

import math

import pytest
import torch

from zorl.expected_reward import expected_reward, rectangle, sample_labels

SCORES = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]], [[0.2, 0.2, 0.6], [0.1, 0.1, 0.8]]]).log()  # (2, 2, 3)


def test_it_is_the_mean_under_the_probabilities():
    rewards = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]])
    values = expected_reward(SCORES, rewards)
    assert values.flatten().tolist() == pytest.approx([0.3, 1.6, -0.4, 0.2], abs=1e-6)


def test_a_label_without_a_reward_leaves_its_probability_to_the_others():
    rewards = torch.tensor([[1.0, 0.0, math.nan], [math.nan, math.nan, math.nan]])
    values = expected_reward(SCORES, rewards)
    assert values[:, 0].tolist() == pytest.approx([0.5 / 0.8, 0.5])
    assert values[:, 1].isnan().all()


def test_rows_may_have_fewer_labels_than_others():
    scores = torch.tensor([[[0.5, 0.3, 0.2], [0.4, 0.6, 0.0]]]).log()
    rewards = rectangle(torch.tensor([1.0, 0.0, -1.0, 0.0, 2.0]), [3, 2])
    assert torch.equal(rewards.isnan(), torch.tensor([[False] * 3, [False, False, True]]))
    assert expected_reward(scores, rewards).flatten().tolist() == pytest.approx([0.3, 1.2])
    assert sample_labels(scores, noise_seed=3, draws=500)[:, 0, 1].max() == 1


def test_labels_are_drawn_by_their_probabilities():
    drawn = sample_labels(SCORES, noise_seed=3, draws=4000)
    assert drawn.shape == (4000, 2, 2)
    for point in range(2):
        for row in range(2):
            shares = torch.bincount(drawn[:, point, row], minlength=3) / 4000
            assert torch.allclose(shares, SCORES[point, row].exp(), atol=0.03)


def test_points_share_their_noise_and_seeds_do_not():
    same = sample_labels(SCORES[:1].expand(2, -1, -1), noise_seed=1, draws=50)
    assert torch.equal(same[:, 0], same[:, 1])
    assert not torch.equal(same, sample_labels(SCORES[:1].expand(2, -1, -1), noise_seed=2, draws=50))
    assert not torch.equal(same[:, 0, 0], same[:, 0, 1]), "rows have noise of their own"
