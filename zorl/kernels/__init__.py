"""θ ← θ + c·z(seed), in one pass and with the same bits wherever it runs.

Three functions make up a kernel:

* `add(theta, keys, coefficients, distribution)` folds directions into θ in place, in index order, one rounding each.
  float32 rounds to nearest; bfloat16 and float16 round stochastically, with hashed bits of (seed, name, index), because
  round-to-nearest swallows updates smaller than half a unit in the last place.
* `perturb(theta, key, offset, distribution, out, rows=None)` writes θ + offset·z (rounded to nearest) into `out` and
  leaves θ alone; with `rows` only those rows of a matrix.
* `factors(index, key, r, columns=…)` gives the signs that a low-rank direction of a matrix is made of.

`reference` is plain torch and runs on any device; `cpu` (numba) and `cuda` (Triton) are the fast ones, held to the reference
bit for bit.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from zorl.directions import Distribution, Key
from zorl.kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Kernel(Protocol):
    def add(
        self, theta: Tensor, keys: Sequence[Key], coefficients: Sequence[float], distribution: Distribution
    ) -> None: ...

    def perturb(
        self,
        theta: Tensor,
        key: Key,
        offset: float,
        distribution: Distribution,
        out: Tensor,
        rows: Tensor | None = None,
    ) -> None: ...

    def factors(self, index: Tensor, key: Key, r: int, *, columns: bool) -> Tensor: ...


def kernel_for(theta: Tensor) -> Kernel:
    """The fastest kernel for this tensor on this machine.

    Raises:
        TypeError: the dtype has no kernel.
        ValueError: the tensor has 2³² elements or more (an element's index is hashed as 32 bits).
    """
    if theta.dtype not in DTYPES:
        raise TypeError(f"zorl tunes float32, bfloat16 and float16 parameters, not {theta.dtype}")
    if theta.numel() >= 1 << 32:
        raise ValueError(f"a parameter has {theta.numel()} elements; at most {(1 << 32) - 1} are supported")
    if theta.device.type == "cpu" and _HAS_NUMBA:
        from zorl.kernels import cpu

        return cpu
    if theta.device.type == "cuda" and _HAS_TRITON:
        from zorl.kernels import cuda

        return cuda if cuda.agrees(theta.device, theta.dtype) else reference
    return reference


_HAS_NUMBA = importlib.util.find_spec("numba") is not None
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # comes with torch's builds for CUDA
