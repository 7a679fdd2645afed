"""The paper's theory in figures: the length of the estimated gradient, and the learning rate that it allows."""

from __future__ import annotations

from zorl.directions import Distribution


def lemma_2(parameters: int, n: int, distribution: Distribution, *, one_sided: bool = False) -> float:
    """E‖∇̂L‖² / ‖∇L‖² of n-SPSA (Malladi et al. 2023, Lemma 2): (d + n − 1)/n wherever ‖z‖² = d.

    This holds on the paper's sphere of radius √d, and for ±1 and rank-one directions, whose elements are all ±1. A Gaussian z is
    longer along the gradient, E[(z·∇L)²‖z‖²] = (d + 2)‖∇L‖², which makes it (d + n + 1)/n. For rank four the
    length varies too; (d + n − 1)/n is then an approximation.

    Args:
        one_sided: each of n ≥ 2 points is compared with the mean of the others in place of a second side. That mean is noisy
            itself: d/(n − 1) + ((n − 1)² + 1)/(n(n − 1)), and 2/n more for a Gaussian.
    """
    longer = 2 / n if distribution == "gaussian" else 0.0
    if one_sided:
        return parameters / (n - 1) + ((n - 1) ** 2 + 1) / (n * (n - 1)) + longer
    return (parameters + n - 1) / n + longer


def corollary_1(trace: float, norm: float, n: int, *, one_sided: bool = False) -> float:
    """The learning rate η_SGD/γ, η_SGD = 1/ℓ, that falls most per step by the descent lemma (Malladi et al. 2023, Corollary 1).

    For Gaussian z, E[ĝᵀHĝ] = (tr H‖∇L‖² + (n+1)·∇LᵀH∇L)/n, so γ = (r + n + 1)/n with r = tr H/ℓ; for the sphere and ±1 it
    differs by terms of the order of ℓ/n. The dimension does not occur. z of rank one varies more: where the curvature of a
    linear layer lies in few of its inputs, the first term is up to three times as large, and the rate up to as many times too
    high. With many layers tuned at once little of that is left.

    Args:
        trace: tr H.
        norm: ℓ, H's largest eigenvalue.
        n: directions per step.
        one_sided: as for `lemma_2`: E[ĝᵀHĝ] = tr H‖∇L‖²/(n − 1) + (n + 1 + 1/(n − 1))/n · ∇LᵀH∇L.
    """
    if one_sided:
        return 1 / (trace / (n - 1) + (n + 1 + 1 / (n - 1)) / n * norm)
    return n / (trace + (n + 1) * norm)
