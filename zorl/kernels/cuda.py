"""The GPU kernel: one fused pass over θ for all directions, in Triton, with the bits of the reference.

It launches on the current stream, allocates nothing but the small table of keys, never waits for the GPU, and writes θ in
place, so that a captured CUDA graph that reads θ goes on reading it. Fused multiply-adds are switched off: where a product is
inexact (Gaussian directions) they would round once where the reference rounds twice.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zorl.directions import DISTRIBUTIONS, Distribution, Key, half_normal_table, matrix_width, rank
from zorl.directions import key as make_key
from zorl.kernels import reference
from zorl.kernels.reference import COLUMNS, copied_unmoved

_BLOCK = 1024
_KINDS = {"rademacher": 0, "gaussian": 1, "rank1": 2, "rank4": 2}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
factors = reference.factors  # torch's own operations: their work is that of a look-up


def add(theta: Tensor, keys: Sequence[Key], coefficients: Sequence[float], distribution: Distribution) -> None:
    """θ ← θ + Σ cᵢ·z(keyᵢ), in place, in order; the bits of `reference.add`."""
    kept = [(stream, c) for stream, c in zip(keys, coefficients, strict=True) if c != 0.0]
    if not kept or theta.numel() == 0:
        return
    contiguous = theta.detach().contiguous()
    words = _words([stream for stream, _ in kept], theta.device)
    c = torch.tensor([c for _, c in kept], dtype=torch.float32).to(theta.device, non_blocking=True)
    with _on(theta.device):
        _add[(triton.cdiv(theta.numel(), _BLOCK),)](
            contiguous, theta.numel(), words, c, len(kept), *_direction(theta, distribution),
            KIND=_KINDS[distribution], RANK=rank(distribution), DTYPE=_DTYPES[theta.dtype], BLOCK=_BLOCK, **_OPTIONS,
        )  # fmt: skip
    if contiguous.data_ptr() != theta.data_ptr():
        theta.detach().copy_(contiguous)


def perturb(
    theta: Tensor, key: Key, offset: float, distribution: Distribution, out: Tensor, rows: Tensor | None = None
) -> None:
    """out ← θ + offset·z(key), rounded to nearest; arguments and bits of `reference.perturb`."""
    if copied_unmoved(theta, offset, out, rows):
        return
    source = theta.detach().contiguous()
    width = theta.numel() if rows is None else theta[0].numel()
    with _on(theta.device):
        _perturb[(triton.cdiv(out.numel(), _BLOCK),)](
            source, out, out.numel(), source if rows is None else rows, width, _words([key], theta.device), offset,
            *_direction(theta, distribution), KIND=_KINDS[distribution], RANK=rank(distribution),
            HAS_ROWS=rows is not None, DTYPE=_DTYPES[theta.dtype], BLOCK=_BLOCK, **_OPTIONS,
        )  # fmt: skip


@functools.cache
def agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this kernel has the reference's bits on this device, tried once a process: one that does not is not used."""
    streams = [make_key(seed, "self-test") for seed in range(3)]
    theta = torch.linspace(-0.1, 0.1, 35 * 67, device=device).view(35, 67).to(dtype)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    try:
        for distribution in DISTRIBUTIONS:
            found = []
            for kernel in (reference.add, add):
                moved = theta.clone()
                kernel(moved, streams, [0.01, -1.0 / 3.0, 1e-6], distribution)
                found.append(moved)
            for look in (reference.perturb, perturb):
                out = torch.empty_like(theta)
                look(theta, streams[0], -1e-3, distribution, out)
                found.append(out)
            if any(not torch.equal(a.view(integers), b.view(integers)) for a, b in (found[:2], found[2:])):
                raise RuntimeError(f"other bits than the reference's along {distribution} directions")
    except Exception as error:  # whatever a compiler or driver may raise
        warnings.warn(f"the Triton kernel is not used on {device} in {dtype}: {error}", RuntimeWarning, stacklevel=3)
        return False
    return True


_OPTIONS = {"enable_fp_fusion": False}


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU, which may be another than the tensor's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _words(keys: Sequence[Key], device: torch.device) -> Tensor:
    """Four words a direction; int64, because Triton takes no unsigned numbers from torch."""
    return torch.tensor([list(stream) for stream in keys], dtype=torch.int64).to(device, non_blocking=True)


def _direction(theta: Tensor, distribution: Distribution) -> tuple[Tensor, int]:
    """The table of a Gaussian direction, and the width of a matrix that a low-rank one is made for."""
    table = _table(theta.device) if distribution == "gaussian" else theta
    return table, matrix_width(theta.shape) if rank(distribution) else 0


@functools.cache
def _table(device: torch.device) -> Tensor:
    return half_normal_table().to(device)


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    """lowbias32, as `reference._mix`, on uint32."""
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _hash(counter, key0, key1):  # type: ignore[no-untyped-def]
    return _mix(_mix(counter.to(tl.uint32) ^ key0) + key1)


@triton.jit
def _z(index, key0, key1, table, width, KIND: tl.constexpr, RANK: tl.constexpr, COLUMN_KEY: tl.constexpr):  # type: ignore[no-untyped-def]
    """The direction at flat indices (int64): float32."""
    if KIND == 1:
        word = _hash(index >> 1, key0, key1) >> ((index & 1) * 16).to(tl.uint32)
        magnitude = tl.load(table + (word & 0x7FFF).to(tl.int64))
        return tl.where((word & 0x8000) != 0, magnitude, -magnitude)
    if KIND == 2 and width > 0:
        column_key = key0 ^ tl.full((), COLUMN_KEY, tl.uint32)
        words = _hash(index // width, key0, key1) ^ _hash(index % width, column_key, key1)
        different = tl.zeros_like(words)
        for j in tl.static_range(RANK):
            different += (words >> j) & 1
        total = RANK - 2 * different.to(tl.int32)
        return total.to(tl.float32) * (0.5 if RANK == 4 else 1.0)
    bit = (_hash(index >> 5, key0, key1) >> (index & 31).to(tl.uint32)) & 1
    return bit.to(tl.float32) * 2 - 1


@triton.jit
def _power_of_two(exponent):  # type: ignore[no-untyped-def]
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _rounded(value, index, key2, key3, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stochastic rounding, as `reference._round_stochastically`: float64 in, a value that the dtype holds out."""
    mantissa = 7 if DTYPE == 1 else 10
    smallest = -126 if DTYPE == 1 else -14
    exponent = ((value.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1023
    spacing = tl.maximum(exponent, smallest) - mantissa
    scaled = value * _power_of_two(-spacing)
    below = tl.floor(scaled)
    threshold = _hash(index, key2, key3).to(tl.float64) * 2.3283064365386963e-10  # 2⁻³²
    below = tl.where(scaled - below > threshold, below + 1.0, below)
    return (below * _power_of_two(spacing)).to(tl.float32)


@triton.jit
def _add(  # type: ignore[no-untyped-def]
    theta,
    n,
    keys,
    c,
    directions,
    table,
    width,
    KIND: tl.constexpr,
    RANK: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMN_KEY: tl.constexpr = COLUMNS,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    value = tl.load(theta + index, mask=inside, other=0.0).to(tl.float32)
    for d in range(directions):
        key0, key1 = tl.load(keys + 4 * d).to(tl.uint32), tl.load(keys + 4 * d + 1).to(tl.uint32)
        change = tl.load(c + d) * _z(index, key0, key1, table, width, KIND, RANK, COLUMN_KEY)
        if DTYPE == 0:
            value = value + change
        else:
            key2, key3 = tl.load(keys + 4 * d + 2).to(tl.uint32), tl.load(keys + 4 * d + 3).to(tl.uint32)
            value = _rounded(value.to(tl.float64) + change.to(tl.float64), index, key2, key3, DTYPE)
    tl.store(theta + index, value.to(theta.dtype.element_ty), mask=inside)


@triton.jit
def _nearest_bfloat16(value):  # type: ignore[no-untyped-def]
    """float32 rounded to 8 bits of mantissa, ties to even, as torch does it."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & tl.full((), 0xFFFF0000, tl.uint32)
    return tl.where(value != value, value, rounded.to(tl.float32, bitcast=True))


@triton.jit
def _perturb(  # type: ignore[no-untyped-def]
    theta,
    out,
    n,
    rows,
    row_width,
    keys,
    offset,
    table,
    width,
    KIND: tl.constexpr,
    RANK: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMN_KEY: tl.constexpr = COLUMNS,
):
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < n
    index = position
    if HAS_ROWS:
        index = tl.load(rows + position // row_width, mask=inside, other=0) * row_width + position % row_width
    key0, key1 = tl.load(keys).to(tl.uint32), tl.load(keys + 1).to(tl.uint32)
    change = _z(index, key0, key1, table, width, KIND, RANK, COLUMN_KEY) * offset
    value = tl.load(theta + index, mask=inside, other=0.0).to(tl.float32) + change
    if DTYPE == 1:
        value = _nearest_bfloat16(value)
    tl.store(out + position, value.to(out.dtype.element_ty), mask=inside)
