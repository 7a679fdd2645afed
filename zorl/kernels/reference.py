"""The reference kernel: plain torch on any device. Other kernels are tested against it bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from zorl.directions import Distribution, Key, half_normal_table, matrix_width, rank

# Elements worked on at once: bounds the memory of the int64 and float64 temporaries. A GPU prefers few large operations.
_BLOCK, _GPU_BLOCK = 1 << 18, 1 << 24
_MASK = 0xFFFFFFFF
COLUMNS = 0x9E3779B9  # sets the stream of a low-rank direction's columns apart from that of its rows
# dtype -> (explicit mantissa bits, exponent of the smallest normal number)
_FORMATS = {torch.bfloat16: (7, -126), torch.float16: (10, -14)}


def add(theta: Tensor, keys: Sequence[Key], coefficients: Sequence[float], distribution: Distribution) -> None:
    """θ ← θ + Σ cᵢ·z(keyᵢ), in place, in order, one rounding each (float32: nearest; half precision: stochastic)."""
    width = matrix_width(theta.shape)
    flat = theta.detach().reshape(-1)  # a copy where theta is not contiguous
    size = _block(theta)
    for start in range(0, flat.numel(), size):
        block = flat[start : start + size]
        index = torch.arange(start, start + block.numel(), device=theta.device)
        for key, coefficient in zip(keys, coefficients, strict=True):
            if coefficient == 0.0:
                continue
            change = sample(index, key, distribution, width) * coefficient
            if theta.dtype == torch.float32:
                block += change
            else:
                block.copy_(_round_stochastically(block.double() + change.double(), theta.dtype, index, key))
    if flat.data_ptr() != theta.data_ptr():
        theta.detach().copy_(flat.view(theta.shape))


def add_dense(theta: Tensor, change: Tensor, key: Key, spacing: float | None = None) -> None:
    """θ ← θ + change, in place, with one rounding per element as in `add`. It makes no z, so plain torch does on every device.

    Args:
        change: float32, of theta's shape.
        key: the source of the bits for stochastic rounding.
        spacing: the spacing of the grid that a float32 θ lies on: the change is rounded stochastically to multiples of it.
    """
    flat, changes = theta.detach().reshape(-1), change.reshape(-1)  # a copy where theta is not contiguous
    size = _block(theta)
    for start in range(0, flat.numel(), size):
        block, by = flat[start : start + size], changes[start : start + size]
        if theta.dtype == torch.float32 and spacing is None:
            block += by
            continue
        index = torch.arange(start, start + block.numel(), device=theta.device)
        if spacing is None:
            block.copy_(_round_stochastically(block.double() + by.double(), theta.dtype, index, key))
        else:
            threshold = _hash(index, key.rounding0, key.rounding1).double() * 2.0**-32
            block += ((by.double() / spacing + threshold).floor() * spacing).float()
    if flat.data_ptr() != theta.data_ptr():
        theta.detach().copy_(flat.view(theta.shape))


def perturb(
    theta: Tensor, key: Key, offset: float, distribution: Distribution, out: Tensor, rows: Tensor | None = None
) -> None:
    """out ← θ + offset·z(key), rounded to nearest; θ is only read.

    Args:
        theta: the parameter, any shape.
        out: contiguous, of theta's dtype and device; theta's shape, or `(len(rows), *theta.shape[1:])`.
        rows: optional indices into theta's first dimension, shape `(n,)`, int64.

    Raises:
        IndexError: there is no such row.
    """
    if copied_unmoved(theta, offset, out, rows):
        return
    flat, source, size = out.view(-1), theta.detach().reshape(-1), _block(theta)
    for start in range(0, flat.numel(), size):
        block = flat[start : start + size]
        index = torch.arange(start, start + block.numel(), device=theta.device)
        if rows is not None:
            width = theta[0].numel()
            index = rows[index // width] * width + index % width
        block.copy_(source[index].float() + sample(index, key, distribution, matrix_width(theta.shape)) * offset)


def copied_unmoved(theta: Tensor, offset: float, out: Tensor, rows: Tensor | None) -> bool:
    """Whether there is nothing to add; if so, out ← θ (or the given rows). Every kernel's `perturb` begins with it.

    Raises:
        IndexError: there is no such row.
    """
    if rows is not None:
        check_rows(theta, rows)
    if offset == 0.0:
        out.copy_(theta.detach() if rows is None else theta.detach()[rows])
    return offset == 0.0 or out.numel() == 0


def _block(theta: Tensor) -> int:
    return _BLOCK if theta.device.type == "cpu" else _GPU_BLOCK


def check_rows(theta: Tensor, rows: Tensor) -> None:
    """Raises IndexError for a row that theta does not have, as an embedding does: a kernel would read beyond its end.

    On a GPU, it is an assertion on the device, so that nothing waits for it.
    """
    if rows.device.type == "cuda":
        torch._assert_async(((rows >= 0) & (rows < len(theta))).all())
    elif len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(theta):
        raise IndexError(
            f"rows {int(rows.min())} to {int(rows.max())} were asked for, and the parameter has {len(theta)}"
        )


def sample(index: Tensor, key: Key, distribution: Distribution, width: int = 0) -> Tensor:
    """z at the given flat element indices (int64, any shape), float32: ±1, a Gaussian by quantile table, or low-rank.

    Args:
        width: columns of the parameter, where it is a matrix (see `zorl.directions.rank`).
    """
    r = rank(distribution)
    if r and width:
        words = _factor_words(index // width, key, columns=False) ^ _factor_words(index % width, key, columns=True)
        different = torch.stack([(words >> j) & 1 for j in range(r)]).sum(dim=0)
        return (r - 2 * different).float() * r**-0.5
    if distribution != "gaussian":  # one bit per element, 32 elements per hash
        return ((_hash(index >> 5, key.z0, key.z1) >> (index & 31)) & 1).float() * 2 - 1
    word = _hash(index >> 1, key.z0, key.z1) >> ((index & 1) * 16)  # 16 bits per element: sign and quantile
    magnitude = _table(index.device)[word & 0x7FFF]
    return torch.where((word >> 15) & 1 == 1, magnitude, -magnitude)


@cache
def _table(device: torch.device) -> Tensor:
    """Copied to a device once: a copy waits for all that the device has been asked to do."""
    return half_normal_table().to(device)


def factors(index: Tensor, key: Key, r: int, *, columns: bool) -> Tensor:
    """u₁ … uᵣ of a low-rank direction at rows of a matrix, or v₁ … vᵣ at columns: z = u vᵀ / √r.

    Args:
        index: int64, shape `(n,)`.

    Returns:
        ±1, float32, shape `(n, r)`.
    """
    words = _factor_words(index, key, columns=columns)
    return ((words[:, None] >> torch.arange(r, device=index.device)) & 1).float() * 2 - 1


def _factor_words(index: Tensor, key: Key, *, columns: bool) -> Tensor:
    """32 bits for each row or column: bit j is the sign in the j-th factor."""
    return _hash(index, key.z0 ^ COLUMNS if columns else key.z0, key.z1)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words with low bias (C. Wellons' lowbias32), on int64 tensors that hold them."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def _hash(counter: Tensor, key0: int, key1: int) -> Tensor:
    return _mix((_mix((counter ^ key0) & _MASK) + key1) & _MASK)


def _round_stochastically(value: Tensor, dtype: torch.dtype, index: Tensor, key: Key) -> Tensor:
    """Rounds float64 `value` up with probability equal to its distance from the neighbour below, so the mean is exact.

    The spacing of `dtype` at the value is a power of two taken from the exponent bits; scaling by it is exact, so no
    step but the last depends on rounding, and integer and float64 arithmetic give the same bits everywhere.
    """
    mantissa, smallest = _FORMATS[dtype]
    exponent = ((value.view(torch.int64) >> 52) & 0x7FF) - 1023
    spacing = exponent.clamp(min=smallest) - mantissa
    scaled = value * _power_of_two(-spacing)
    below = scaled.floor()
    threshold = _hash(index, key.rounding0, key.rounding1).double() * 2.0**-32
    rounded = below + (scaled - below > threshold)
    return (rounded * _power_of_two(spacing)).to(dtype)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float64, from its bits: `pow` is not exact on every device."""
    return ((exponent + 1023) << 52).view(torch.float64)
