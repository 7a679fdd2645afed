"""What the paper's theory says of a step, in figures: how long the estimated gradient is, and which learning rate that allows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zorl.directions import Distribution, key
from zorl.kernels import kernel_for
from zorl.parameters import ParameterSet


def lemma_2(parameters: int, n: int, distribution: Distribution) -> float:
    """E‖∇̂L‖² / ‖∇L‖² of n-SPSA (Malladi et al. 2023, Lemma 2): (d + n − 1)/n wherever ‖z‖² = d.

    That is so on the paper's sphere of radius √d, and for ±1 and rank-one directions, whose elements are all ±1. A Gaussian z is
    longer where it meets the gradient, E[(z·∇L)²‖z‖²] = (d + 2)‖∇L‖², which makes it (d + n + 1)/n. For rank four the
    length varies too; (d + n − 1)/n is then an approximation.
    """
    return (parameters + n + (1 if distribution == "gaussian" else -1)) / n


def corollary_1(trace: float, norm: float, n: int) -> float:
    """The learning rate η_SGD/γ that falls the most a step by the descent lemma (Malladi et al. 2023, Corollary 1), η_SGD = 1/ℓ.

    For Gaussian z, E[ĝᵀHĝ] = (tr H‖∇L‖² + (n+1)·∇LᵀH∇L)/n, so γ = (r + n + 1)/n with r = tr H/ℓ; for the sphere, ±1 and rank one
    it differs by terms of the order of ℓ/n. The dimension does not occur.

    Args:
        trace: tr H.
        norm: ℓ, H's largest eigenvalue.
        n: directions a step.
    """
    return n / (trace + (n + 1) * norm)


def estimated_norm(slopes: Tensor, parameters: ParameterSet, distribution: Distribution, seeds: Sequence[int]) -> float:
    """‖∇̂L‖² of n-SPSA with these seeds and slopes zᵢ·∇L: the estimate is made one parameter at a time, and not kept."""
    coefficients = (slopes / len(seeds)).tolist()
    total = 0.0
    for name, tensor in parameters.items():
        estimate = torch.zeros_like(tensor, dtype=torch.float32, requires_grad=False)
        kernel_for(estimate).add(estimate, [key(seed, name) for seed in seeds], coefficients, distribution)
        total += estimate.double().square().sum().item()
    return total
