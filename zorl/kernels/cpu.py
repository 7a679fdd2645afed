"""The CPU kernel: one fused pass over θ in cache-sized blocks, on all of torch's threads, compiled by numba.

A block of z is made in first-level cache and added at once, so θ is read and written a single time however many
directions are folded. numba has no float16 or bfloat16 on CPUs: both are handled as the 16-bit integers that they are.
No fastmath and no fused multiply-add, so that the bits are the reference kernel's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from zorl.directions import Distribution, Key, half_normal_table
from zorl.kernels.reference import check_rows

_BLOCK = 4096  # elements: θ, z and rounding bits of a block fit first-level cache together
_PER_THREAD = 1 << 16  # below this many elements a second thread costs more than it saves
_F32, _BF16, _F16 = 0, 1, 2
_CODES = {torch.float32: _F32, torch.bfloat16: _BF16, torch.float16: _F16}
_pool: ThreadPoolExecutor | None = None


def add(theta: Tensor, keys: Sequence[Key], coefficients: Sequence[float], distribution: Distribution) -> None:
    """θ ← θ + Σ cᵢ·z(keyᵢ), in place, in order; the bits of `reference.add`."""
    if not keys or theta.numel() == 0:
        return
    contiguous = theta.detach().contiguous()
    values = _bits(contiguous)
    key_words = np.array(keys, dtype=np.uint32)
    c = np.array(coefficients, dtype=np.float32)
    gaussian, table = distribution == "gaussian", _table(distribution)
    code = _CODES[theta.dtype]

    def run(start: int, stop: int) -> None:
        if code == _F32:
            _add_f32(values, start, stop, key_words, c, gaussian, table)
        else:
            _add_half(values, start, stop, key_words, c, gaussian, table, code == _BF16)

    _parallel(run, theta.numel(), _BLOCK)
    if contiguous.data_ptr() != theta.data_ptr():
        theta.detach().copy_(contiguous)


def perturb(
    theta: Tensor, key: Key, offset: float, distribution: Distribution, out: Tensor, rows: Tensor | None = None
) -> None:
    """out ← θ + offset·z(key), rounded to nearest; arguments and bits of `reference.perturb`."""
    if rows is not None:
        check_rows(theta, rows)
    if out.numel() == 0:
        return
    if offset == 0.0:
        out.copy_(theta.detach() if rows is None else theta.detach()[rows])
        return
    source, target = _bits(theta.detach().contiguous()), _bits(out)
    # Without rows the tensor is one long row: index 0, as wide as the whole.
    row_index = np.zeros(1, dtype=np.int64) if rows is None else rows.numpy()
    width = theta.numel() if rows is None else theta[0].numel()
    words = np.array(key, dtype=np.uint32)
    c, gaussian, table, code = np.float32(offset), distribution == "gaussian", _table(distribution), _CODES[theta.dtype]

    def run(start: int, stop: int) -> None:
        if code == _F32:
            _perturb_f32(source, target, row_index, width, start, stop, words, c, gaussian, table)
        else:
            _perturb_half(source, target, row_index, width, start, stop, words, c, gaussian, table, code == _BF16)

    _parallel(run, out.numel(), _BLOCK)


def _bits(tensor: Tensor) -> np.ndarray:
    """A flat numpy view: float32, or the uint16 bit patterns of half precision."""
    flat = tensor.view(-1)
    return flat.numpy() if tensor.dtype == torch.float32 else flat.view(torch.uint16).numpy()


_NO_TABLE = np.zeros(1, dtype=np.float32)


def _table(distribution: Distribution) -> np.ndarray:
    return half_normal_table().numpy() if distribution == "gaussian" else _NO_TABLE


def _parallel(run: Callable[[int, int], None], numel: int, block: int) -> None:
    """Runs over [0, numel) on torch's number of threads; every thread's share starts at a block's start.

    Compiled functions release the interpreter lock, so plain threads do, without a second OpenMP runtime beside torch's.
    """
    global _pool
    threads = max(1, min(torch.get_num_threads(), numel // _PER_THREAD))
    if threads == 1:
        run(0, numel)
        return
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=64, thread_name_prefix="zorl-kernel")
    share = -(-numel // (threads * block)) * block
    others = [_pool.submit(run, start, min(start + share, numel)) for start in range(share, numel, share)]
    run(0, min(share, numel))
    for other in others:
        other.result()


# --- compiled -------------------------------------------------------------------------------------------------------


@intrinsic
def _as_float32(typing_context, bits):  # type: ignore[no-untyped-def]
    """uint32 bits -> the float32 with those bits."""
    return types.float32(types.uint32), lambda ctx, builder, sig, args: builder.bitcast(
        args[0], ctx.get_value_type(types.float32)
    )


@intrinsic
def _bits32(typing_context, value):  # type: ignore[no-untyped-def]
    """float32 -> its bits as uint32."""
    return types.uint32(types.float32), lambda ctx, builder, sig, args: builder.bitcast(
        args[0], ctx.get_value_type(types.uint32)
    )


@intrinsic
def _as_float64(typing_context, bits):  # type: ignore[no-untyped-def]
    """int64 bits -> the float64 with those bits."""
    return types.float64(types.int64), lambda ctx, builder, sig, args: builder.bitcast(
        args[0], ctx.get_value_type(types.float64)
    )


@intrinsic
def _bits64(typing_context, value):  # type: ignore[no-untyped-def]
    """float64 -> its bits as int64."""
    return types.int64(types.float64), lambda ctx, builder, sig, args: builder.bitcast(
        args[0], ctx.get_value_type(types.int64)
    )


@njit(inline="always")
def _hash(counter, key0, key1):  # type: ignore[no-untyped-def]
    """Two rounds of lowbias32 on uint32, as `reference._hash`."""
    x = np.uint32(counter) ^ key0
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    x = np.uint32((x ^ (x >> np.uint32(16))) + key1)
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return x ^ (x >> np.uint32(16))


@njit(nogil=True, cache=True)
def _fill_z(z, start, n, key0, key1, gaussian, table):  # type: ignore[no-untyped-def]
    """z[0:n] ← the direction at flat indices start … start+n−1."""
    i = 0
    if gaussian:
        while i < n:
            h = _hash((start + i) >> 1, key0, key1)
            if (start + i) & 1:
                h >>= np.uint32(16)
            z[i] = table[h & np.uint32(0x7FFF)] if h & np.uint32(0x8000) else -table[h & np.uint32(0x7FFF)]
            i += 1
        return
    while i < n:
        h = _hash((start + i) >> 5, key0, key1)
        first = (start + i) & 31
        if first == 0 and n - i >= 32:
            for b in range(32):
                z[i + b] = np.float32(np.int32((h >> np.uint32(b)) & np.uint32(1)) * np.int32(2) - np.int32(1))
            i += 32
        else:
            count = min(32 - first, n - i)
            for b in range(count):
                z[i + b] = np.float32(np.int32((h >> np.uint32(first + b)) & np.uint32(1)) * np.int32(2) - np.int32(1))
            i += count


@njit(inline="always")
def _load(bits, bf16):  # type: ignore[no-untyped-def]
    """The float32 value of a bfloat16 or float16 bit pattern (exact)."""
    wide = np.uint32(bits)
    if bf16:
        return _as_float32(np.uint32(wide << np.uint32(16)))
    sign = np.uint32((wide & np.uint32(0x8000)) << np.uint32(16))
    magnitude = np.uint32((wide & np.uint32(0x7FFF)) << np.uint32(13))
    if magnitude >= np.uint32(0x7C00 << 13):  # infinity and NaN
        return _as_float32(np.uint32(sign | magnitude | np.uint32(0x7F800000)))
    # float16's exponent bias is 15, float32's 127; the product is exact and turns subnormals into normal numbers.
    value = _as_float32(magnitude) * np.float32(2.0**112)
    return -value if sign else value


@njit(inline="always")
def _store(value, bf16):  # type: ignore[no-untyped-def]
    """The bfloat16 or float16 bit pattern nearest to a float32 value, ties to even."""
    bits = _bits32(value)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    if bf16:
        if magnitude > np.uint32(0x7F800000):
            return np.uint16(np.uint32(bits >> np.uint32(16)) | np.uint32(0x40))
        odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
        return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    if magnitude > np.uint32(0x7F800000):
        return np.uint16(sign | np.uint32(0x7E00))
    if magnitude >= np.uint32(0x477FF000):  # 65520: rounds to infinity
        return np.uint16(sign | np.uint32(0x7C00))
    if magnitude < np.uint32(0x38800000):  # below 2⁻¹⁴: adding 0.5 makes the FPU round to a multiple of 2⁻²⁴
        shifted = _bits32(np.float32(_as_float32(magnitude) + np.float32(0.5)))
        return np.uint16(sign | np.uint32(shifted - np.uint32(0x3F000000)))
    odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
    return np.uint16(sign | np.uint32((magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13)))


@njit(nogil=True, cache=True)
def _add_f32(values, start, stop, keys, c, gaussian, table):  # type: ignore[no-untyped-def]
    z = np.empty(_BLOCK, dtype=np.float32)
    for block in range(start, stop, _BLOCK):
        n = min(_BLOCK, stop - block)
        for d in range(len(c)):
            if c[d] == np.float32(0.0):
                continue
            _fill_z(z, block, n, keys[d, 0], keys[d, 1], gaussian, table)
            coefficient = c[d]
            for i in range(n):
                values[block + i] += coefficient * z[i]


@njit(nogil=True, cache=True)
def _add_half(values, start, stop, keys, c, gaussian, table, bf16):  # type: ignore[no-untyped-def]
    """Stochastic rounding as in `reference._round_stochastically`."""
    z = np.empty(_BLOCK, dtype=np.float32)
    mantissa, smallest = (np.int64(7), np.int64(-126)) if bf16 else (np.int64(10), np.int64(-14))
    bias = np.int64(1023)
    for block in range(start, stop, _BLOCK):
        n = min(_BLOCK, stop - block)
        for d in range(len(c)):
            if c[d] == np.float32(0.0):
                continue
            _fill_z(z, block, n, keys[d, 0], keys[d, 1], gaussian, table)
            key0, key1, coefficient = keys[d, 2], keys[d, 3], c[d]
            for i in range(n):
                value = np.float64(_load(values[block + i], bf16)) + np.float64(np.float32(coefficient * z[i]))
                exponent = ((_bits64(value) >> np.int64(52)) & np.int64(0x7FF)) - bias
                spacing = max(exponent, smallest) - mantissa
                scaled = value * _as_float64((bias - spacing) << np.int64(52))
                below = np.floor(scaled)
                threshold = np.float64(_hash(block + i, key0, key1)) * 2.0**-32
                if scaled - below > threshold:
                    below += 1.0
                rounded = np.float32(below * _as_float64((bias + spacing) << np.int64(52)))
                values[block + i] = _store(rounded, bf16)  # exact: rounded is a multiple of the spacing


@njit(nogil=True, cache=True)
def _perturb_f32(source, target, rows, width, start, stop, key, c, gaussian, table):  # type: ignore[no-untyped-def]
    z = np.empty(_BLOCK, dtype=np.float32)
    position = start
    while position < stop:
        row = position // width
        column = position - row * width
        n = min(_BLOCK, stop - position, width - column)
        flat = rows[row] * width + column
        _fill_z(z, flat, n, key[0], key[1], gaussian, table)
        for i in range(n):
            target[position + i] = source[flat + i] + c * z[i]
        position += n


@njit(nogil=True, cache=True)
def _perturb_half(source, target, rows, width, start, stop, key, c, gaussian, table, bf16):  # type: ignore[no-untyped-def]
    z = np.empty(_BLOCK, dtype=np.float32)
    position = start
    while position < stop:
        row = position // width
        column = position - row * width
        n = min(_BLOCK, stop - position, width - column)
        flat = rows[row] * width + column
        _fill_z(z, flat, n, key[0], key[1], gaussian, table)
        for i in range(n):
            value = np.float32(_load(source[flat + i], bf16) + np.float32(c * z[i]))
            target[position + i] = _store(value, bf16)
        position += n
