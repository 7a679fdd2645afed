"""The GPU kernel: one fused pass over θ for all directions, in Triton, with the bits of the reference.

It launches on the current stream, allocates nothing but a small table of the directions, never waits for the GPU, and writes θ
in place, so that a captured CUDA graph that reads θ goes on reading it. Fused multiply-adds are switched off: where a product
is inexact (Gaussian directions) they would round once where the reference rounds twice.
"""

from __future__ import annotations

import functools
import sys
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
_SIGNS, _GAUSSIAN, _LOW_RANK = 0, 1, 2
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def add(theta: Tensor, keys: Sequence[Key], coefficients: Sequence[float], distribution: Distribution) -> None:
    """θ ← θ + Σ cᵢ·z(keyᵢ), in place, in order; the bits of `reference.add`."""
    kept = [(stream, c) for stream, c in zip(keys, coefficients, strict=True) if c != 0.0]
    if not kept or theta.numel() == 0:
        return
    contiguous = theta.detach().contiguous()
    with _on(theta.device):
        _add[(triton.cdiv(theta.numel(), _BLOCK),)](
            contiguous, theta.numel(), _table_of(kept, theta.device), len(kept), *_direction(theta, distribution),
            DTYPE=_DTYPES[theta.dtype], BLOCK=_BLOCK, **_OPTIONS,
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
            source, out, out.numel(), source if rows is None else rows.contiguous(), width, _signed(key.z0), _signed(key.z1),
            offset, *_direction(theta, distribution), HAS_ROWS=rows is not None, DTYPE=_DTYPES[theta.dtype], BLOCK=_BLOCK,
            **_OPTIONS,
        )  # fmt: skip


def factors(index: Tensor, key: Key, r: int, *, columns: bool) -> Tensor:
    """The signs of a low-rank direction's factors; arguments and bits of `reference.factors`."""
    out = torch.empty(len(index), r, device=index.device)
    if len(index):
        with _on(index.device):
            _factors[(triton.cdiv(len(index), _BLOCK),)](
                index.contiguous(), out, len(index), _signed(key.z0 ^ COLUMNS if columns else key.z0), _signed(key.z1),
                RANK=r, BLOCK=_BLOCK, **_OPTIONS,
            )  # fmt: skip
    return out


@functools.cache
def agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this kernel has the reference's bits on this device, tried once per process: if it has not, it is not used."""
    streams = [make_key(seed, "self-test") for seed in range(3)]
    theta = torch.linspace(-0.1, 0.1, 35 * 67, device=device).view(35, 67).to(dtype)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    try:
        for distribution in DISTRIBUTIONS:
            made = []
            for kernel in (reference, sys.modules[__name__]):
                moved, out = theta.clone(), torch.empty_like(theta)
                kernel.add(moved, streams, [0.01, -1.0 / 3.0, 1e-6], distribution)
                kernel.perturb(theta, streams[0], -1e-3, distribution, out)
                signs = kernel.factors(
                    torch.arange(67, device=device), streams[0], rank(distribution) or 1, columns=True
                )
                made.append([moved.view(integers), out.view(integers), signs])
            if not all(map(torch.equal, *made)):
                raise RuntimeError(f"its bits differ from the reference's along {distribution} directions")
    except Exception as error:  # whatever a compiler or driver may raise
        warnings.warn(f"the Triton kernel is not used on {device} in {dtype}: {error}", RuntimeWarning, stacklevel=3)
        return False
    return True


_OPTIONS = {"enable_fp_fusion": False}


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU, which may be another than the tensor's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _table_of(directions: Sequence[tuple[Key, float]], device: torch.device) -> Tensor:
    """One row per direction: its four words, and the bits of its coefficient as a float32; int64, which holds both."""
    bits = torch.tensor([c for _, c in directions], dtype=torch.float32).view(torch.int32)
    words = torch.tensor([list(stream) for stream, _ in directions], dtype=torch.int64)
    return torch.cat([words, bits[:, None]], dim=1).to(device, non_blocking=True)


def _signed(word: int) -> int:
    """A 32-bit word as the signed number with the same bits: Triton would take a large one for 64 bits, and compile again."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _direction(theta: Tensor, distribution: Distribution) -> tuple[Tensor, int, int, int]:
    """The table of a Gaussian direction, the width of a matrix that a low-rank one is made for, its kind and its rank."""
    if distribution == "gaussian":
        return _table(theta.device), 0, _GAUSSIAN, 0
    if rank(distribution) and (width := matrix_width(theta.shape)):
        return theta, width, _LOW_RANK, rank(distribution)
    return theta, 0, _SIGNS, 0


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
    if KIND == 2:
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
    of_direction,
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
        row = of_direction + 5 * d
        key0, key1 = tl.load(row).to(tl.uint32), tl.load(row + 1).to(tl.uint32)
        coefficient = tl.load(row + 4).to(tl.int32).to(tl.float32, bitcast=True)
        change = coefficient * _z(index, key0, key1, table, width, KIND, RANK, COLUMN_KEY)
        if DTYPE == 0:
            value = value + change
        else:
            key2, key3 = tl.load(row + 2).to(tl.uint32), tl.load(row + 3).to(tl.uint32)
            value = _rounded(value.to(tl.float64) + change.to(tl.float64), index, key2, key3, DTYPE)
            value = value.to(theta.dtype.element_ty).to(tl.float32)  # what overflows stays infinite
    tl.store(theta + index, value.to(theta.dtype.element_ty), mask=inside)


@triton.jit
def _nearest_bfloat16(value):  # type: ignore[no-untyped-def]
    """float32 rounded to 8 bits of mantissa, ties to even, as torch does it."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & tl.full((), 0xFFFF0000, tl.uint32)
    return tl.where(value != value, value, rounded.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["z0", "z1"])
def _perturb(  # type: ignore[no-untyped-def]
    theta,
    out,
    n,
    rows,
    row_width,
    z0,
    z1,
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
    change = _z(index, z0.to(tl.uint32), z1.to(tl.uint32), table, width, KIND, RANK, COLUMN_KEY) * offset
    value = tl.load(theta + index, mask=inside, other=0.0).to(tl.float32) + change
    if DTYPE == 1:
        value = _nearest_bfloat16(value)
    tl.store(out + position, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["z0", "z1"])
def _factors(index, out, n, z0, z1, RANK: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < n
    words = _hash(tl.load(index + position, mask=inside, other=0), z0.to(tl.uint32), z1.to(tl.uint32))
    for j in tl.static_range(RANK):
        tl.store(out + position * RANK + j, ((words >> j) & 1).to(tl.float32) * 2 - 1, mask=inside)
