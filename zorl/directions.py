"""Directions z: pure functions of (seed, parameter name, element index), never stored.

A counter-based generator hashes an element's index under a key made from the seed and the parameter's canonical name.
So equal-shaped tensors get independent noise, the order of parameters does not matter, any slice can be made alone, and
no global random state is read or written. Every direction satisfies E[z zᵀ] = I, which is all that SPSA requires
(Spall 1992, section II; Malladi et al. 2023, Definition 1).

This file says *what* z is; `zorl.kernels` turns it into θ + c·z.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Distribution = Literal["rademacher", "gaussian", "rank1", "rank4"]
DISTRIBUTIONS: tuple[Distribution, ...] = ("rademacher", "gaussian", "rank1", "rank4")


def rank(distribution: Distribution) -> int:
    """r of a low-rank direction; 0 for the dense ones.

    A low-rank direction of a matrix is z = (u₁v₁ᵀ + … + uᵣvᵣᵀ) / √r with signs u and v (EGGROLL, Sarkar et al. 2025): a model
    can be evaluated there without materialising the matrix. A tensor of more dimensions is a matrix of its first dimension by the
    rest; vectors and scalars get independent signs. With r = 1 or 4 every element is an exact floating-point number.
    """
    return {"rank1": 1, "rank4": 4}.get(distribution, 0)


def matrix_width(shape: Sequence[int]) -> int:
    """The columns of the matrix that low-rank directions take a tensor for; 0 for vectors and scalars."""
    return math.prod(shape[1:]) if len(shape) > 1 else 0


# torch.compile, DistributedDataParallel and peft wrap a model and lengthen the names of its parameters.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod\.|module\.|base_model\.model\.|base_layer\.)")


class Key(NamedTuple):
    """128 bits that select one stream for z and an independent one for stochastic rounding (four unsigned 32-bit words)."""

    z0: int
    z1: int
    rounding0: int
    rounding1: int


def canonical_name(name: str) -> str:
    """The parameter's name in the unwrapped model: `module.`, `_orig_mod.` and peft's prefixes are stripped."""
    return _WRAPPERS.sub("", name)


def canonical_names(names: Iterable[str]) -> list[str]:
    """Canonical names in the given order.

    Raises:
        ValueError: two names are the same once their wrappers are stripped, and so would share their noise.
    """
    canonical: dict[str, str] = {}
    for name in names:
        short = canonical_name(name)
        if short in canonical:
            raise ValueError(f"parameters {canonical[short]!r} and {name!r} have the same canonical name {short!r}")
        canonical[short] = name
    return list(canonical)


@cache
def _name_digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def key(seed: int, name: str) -> Key:
    """The stream of direction `seed` (any integer in 0 … 2⁶⁴−1) in the parameter with canonical name `name`."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + _name_digest(name), digest_size=16).digest()
    return Key(*(int.from_bytes(digest[i : i + 4], "little") for i in (0, 4, 8, 12)))


def derive_seed(master: int, *path: int | str) -> int:
    """A seed in 0 … 2⁶³−1 for one use (a step and a direction, an epoch, …) of a run with seed `master`."""
    text = ":".join(str(part) for part in (master, *path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@cache
def half_normal_table() -> Tensor:
    """The 2¹⁵ magnitudes that a Gaussian direction takes (float32): equally likely quantiles of |N(0, 1)|.

    A table rather than Box–Muller, because table look-ups give the same bits on every machine, while libraries' logarithms
    and cosines do not. The quantiles are scaled to a second moment of exactly one; the largest is 4.32, the kurtosis 2.999.
    """
    n = 1 << 15
    normal = NormalDist()
    table = torch.tensor([normal.inv_cdf(0.5 + (i + 0.5) / (2 * n)) for i in range(n)], dtype=torch.float64)
    return (table / table.square().mean().sqrt()).float()


@dataclass(frozen=True, slots=True)
class Step:
    """One direction and the coefficient that it was applied with: θ ← θ + coefficient · z(seed).

    Attributes:
        scales: a multiple of the coefficient for each parameter, by canonical name; None for the same in all.
    """

    seed: int
    coefficient: float
    scales: Mapping[str, float] | None = None

    def coefficient_of(self, name: str) -> float:
        """The coefficient for the parameter with this canonical name. Both factors are bfloat16, so it is exact in float32."""
        return self.coefficient if self.scales is None else self.coefficient * self.scales[name]
