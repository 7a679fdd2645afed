"""The expected reward of labels, which is smooth where the reward of the best label is a staircase.

A policy with label words has a probability for every label. Its expected reward is what it earns by sampling its
answers, the objective of policy gradients (Williams 1992, section 2). It moves with every perturbation, however small, and
also for a classifier that has collapsed onto one label; the reward of the best labels moves only where a row changes
sides. Answers that are sampled cost no forward: all points share one set of scores and one set of noise each.

A reward of single answers needs no sampling at all: E[r] = Σ_l p(l)·r(l), with r called once per label and the same at all
points. A reward of a whole set, such as F1, is averaged over a few draws of all answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zorl.directions import derive_seed
from zorl.generation import gumbel

LabelReward = Literal["expected", "best"]
DRAWS = 8  # per set of answers


def expected_reward(scores: Tensor, rewards: Tensor) -> Tensor:
    """Mean rewards of the labels under their probabilities.

    Args:
        scores: log-probabilities of the labels at each point, shape `(points, rows, labels)`; −inf for a label that a row
            does not have.
        rewards: each label's reward, shape `(rows, labels)`. NaN: not applicable; the other labels then share its probability.

    Returns:
        float64, shape `(points, rows)`; NaN on rows where no label has a reward.
    """
    known = ~rewards.isnan()
    masked = scores.double().masked_fill(~known, -math.inf)
    values = (masked.softmax(dim=2) * rewards.double().nan_to_num(0.0)).sum(dim=2)
    return torch.where(known.any(dim=1), values, math.nan)


def rectangle(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Values of the rows' answers, given row after row, as `(rows, most answers of a row)`; NaN where a row has fewer."""
    return pad_sequence(list(values.split(list(counts))), batch_first=True, padding_value=math.nan)


def sample_labels(scores: Tensor, noise_seed: int, draws: int) -> Tensor:
    """Labels drawn by their probabilities, with noise that all points share (the Gumbel-max trick; Gumbel 1954).

    Args:
        scores: log-probabilities of the labels at each point, shape `(points, rows, labels)`.
        noise_seed: any integer; names the noise.

    Returns:
        int64, shape `(draws, points, rows)`: indices of labels.
    """
    _, rows, labels = scores.shape
    words = [derive_seed(noise_seed, "label", i) for i in range(draws * rows)]
    keys = torch.tensor([[word & 0x7FFFFFFF, word >> 32] for word in words], dtype=torch.int32)
    noise = gumbel(keys, labels).view(draws, 1, rows, labels)
    return (scores.float() + noise).argmax(dim=3)
