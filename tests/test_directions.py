"""Directions z: pure functions of (seed, name, index), with E[z zᵀ] = I."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zorl.directions import (
    DISTRIBUTIONS,
    Distribution,
    Key,
    canonical_name,
    canonical_names,
    derive_seed,
    half_normal_table,
    key,
)
from zorl.kernels import reference

words = st.integers(0, (1 << 32) - 1)
keys = st.builds(Key, words, words, words, words)
each_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


def direction(seed: int, name: str, n: int, distribution: Distribution = "rademacher") -> Tensor:
    """The first n elements of z, shape (n,)."""
    return reference.sample(torch.arange(n), key(seed, name), distribution)


def test_the_directions_of_earlier_trajectories_stay_what_they_were():
    signs = "".join("+" if z > 0 else "-" for z in direction(0, "w", 32).tolist())
    assert signs == "+++-----+--+-+++++-+-+-+-+++++++"
    assert direction(7, "layer.0.weight", 4, "gaussian").tolist() == [
        0.7940520644187927,
        1.4784271717071533,
        0.22128166258335114,
        -1.071632981300354,
    ]
    assert derive_seed(0, "direction", 0, 0) == 2011642082979897746


@given(st.integers(0, (1 << 32) - 1), keys)
def test_the_hash_is_the_published_one(counter: int, stream: Key):
    """Two rounds of C. Wellons' lowbias32, in Python's own integers: bit `index % 32` of the word is the sign."""

    def lowbias32(x: int) -> int:
        x = ((x ^ x >> 16) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ x >> 15) * 0x846CA68B) & 0xFFFFFFFF
        return x ^ x >> 16

    word = lowbias32((lowbias32((counter >> 5) ^ stream.z0) + stream.z1) & 0xFFFFFFFF)
    expected = 1.0 if word >> (counter & 31) & 1 else -1.0
    assert reference.sample(torch.tensor([counter]), stream, "rademacher").item() == expected


@each_distribution
@given(keys, st.integers(0, 5000), st.integers(1, 300))
@settings(max_examples=30)
def test_any_slice_can_be_made_alone(distribution: Distribution, stream: Key, start: int, n: int):
    whole = reference.sample(torch.arange(start + n), stream, distribution)
    assert torch.equal(reference.sample(torch.arange(start, start + n), stream, distribution), whole[start:])


@each_distribution
def test_equal_shaped_tensors_get_different_noise(distribution: Distribution):
    assert not torch.equal(direction(3, "a.weight", 256, distribution), direction(3, "b.weight", 256, distribution))
    correlation = direction(3, "a.weight", 1 << 16, distribution) @ direction(3, "b.weight", 1 << 16, distribution)
    assert abs(correlation.item()) < 5 * math.sqrt(1 << 16)


@each_distribution
def test_seed_zero_is_a_seed(distribution: Distribution):
    zero, one = direction(0, "w", 1024, distribution), direction(1, "w", 1024, distribution)
    assert zero.abs().min() > 0
    assert not torch.equal(zero, one)


@each_distribution
def test_the_largest_seed_has_a_direction_and_a_larger_one_is_refused(distribution: Distribution):
    assert direction((1 << 64) - 1, "w", 8, distribution).shape == (8,)
    with pytest.raises(OverflowError):
        key(1 << 64, "w")


@each_distribution
def test_no_global_random_state_is_read_or_written(distribution: Distribution):
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = direction(5, "w", 100, distribution)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    torch.manual_seed(2)
    assert torch.equal(direction(5, "w", 100, distribution), first)


@each_distribution
def test_the_second_moment_over_seeds_is_the_identity(distribution: Distribution):
    n, d = 4000, 12
    z = torch.stack([direction(seed, "w", d, distribution) for seed in range(n)]).double()  # (n, d)
    error = z.T @ z / n - torch.eye(d, dtype=torch.float64)
    assert error.abs().max() < 5 * math.sqrt(2 / n)  # the variance of z² is 2 at most (Gaussian), that of zᵢzⱼ 1
    assert z.mean(0).abs().max() < 5 / math.sqrt(n)


@each_distribution
@pytest.mark.parametrize("lag", [1, 2, 31, 32, 33, 4096])
def test_elements_of_one_direction_are_uncorrelated(distribution: Distribution, lag: int):
    n = 1 << 17
    z = direction(11, "w", n + lag, distribution)
    assert abs((z[:-lag] @ z[lag:]).item()) < 5 * math.sqrt(n)


def test_a_rademacher_direction_is_plus_or_minus_one_and_balanced():
    n = 1 << 18
    z = direction(4, "w", n)
    assert set(z.tolist()) == {-1.0, 1.0}
    assert abs(z.sum().item()) < 5 * math.sqrt(n)


def test_the_gaussian_table_has_the_moments_of_a_half_normal():
    table = half_normal_table().double()
    assert table.shape == (1 << 15,)
    assert (table.diff() > 0).all()
    assert table.min() > 0
    assert table.square().mean().item() == pytest.approx(1.0, abs=1e-7)
    assert table.pow(4).mean().item() == pytest.approx(2.999, abs=5e-4)
    assert table.mean().item() == pytest.approx(math.sqrt(2 / math.pi), abs=1e-4)
    assert table.max().item() == pytest.approx(4.32, abs=0.01)


def test_a_gaussian_direction_has_gaussian_moments_and_tails():
    n = 1 << 18
    z = direction(4, "w", n, "gaussian").double()
    assert abs(z.mean().item()) < 5 / math.sqrt(n)
    assert z.square().mean().item() == pytest.approx(1.0, abs=5 * math.sqrt(2 / n))
    assert z.pow(4).mean().item() == pytest.approx(3.0, abs=5 * math.sqrt(96 / n))
    for limit in (0.5, 1.0, 2.0, 3.0):
        expected = math.erfc(limit / math.sqrt(2))
        assert (z.abs() > limit).double().mean().item() == pytest.approx(expected, abs=5 * math.sqrt(expected / n))


@pytest.mark.parametrize(
    ("wrapped", "canonical"),
    [
        ("model.layers.0.weight", "model.layers.0.weight"),
        ("module.model.layers.0.weight", "model.layers.0.weight"),
        ("_orig_mod.model.weight", "model.weight"),
        ("module._orig_mod.model.weight", "model.weight"),
        ("layers.0._orig_mod.weight", "layers.0.weight"),
        ("base_model.model.model.q_proj.base_layer.weight", "model.q_proj.weight"),
        ("base_model.model.model.q_proj.lora_A.default.weight", "model.q_proj.lora_A.default.weight"),
        ("my_module.weight", "my_module.weight"),  # a name that only ends like a wrapper is left alone
        ("submodule.base_layers.weight", "submodule.base_layers.weight"),
    ],
)
def test_the_prefixes_of_wrappers_are_stripped(wrapped: str, canonical: str):
    assert canonical_name(wrapped) == canonical


def test_a_compiled_or_distributed_model_keeps_its_names():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    wrapped = torch.nn.Module()
    wrapped.module = model
    names = [name for name, _ in model.named_parameters()]
    assert canonical_names(name for name, _ in wrapped.named_parameters()) == names


def test_two_parameters_of_one_canonical_name_are_refused():
    with pytest.raises(ValueError, match=r"'w' and 'module\.w' have the same canonical name 'w'"):
        canonical_names(["w", "module.w"])


def test_derived_seeds_differ_by_every_part_of_their_path():
    seeds = {
        derive_seed(m, use, s, i) for m in range(4) for use in ("noise", "order") for s in range(8) for i in range(4)
    }
    assert len(seeds) == 4 * 2 * 8 * 4
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)
