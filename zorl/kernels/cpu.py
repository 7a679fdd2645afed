"""The CPU kernel: one fused pass over θ in cache-sized blocks, on all of torch's threads, compiled by numba.

A block of z is made in first-level cache and added at once, so θ is read and written once, however many directions
are folded. numba has no float16 or bfloat16 on CPUs: both are handled as the 16-bit integers that they are.
No fastmath and no fused multiply-add, so that the bits are the reference kernel's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from zorl.directions import Distribution, Key, half_normal_table, matrix_width, rank
from zorl.kernels.reference import COLUMNS, copied_unmoved

_BLOCK = 4096  # elements: θ, z and rounding bits of a block fit first-level cache together
_COLUMN_WORDS = 1 << 18  # low-rank directions kept at once: these fit second-level cache, however long a replay is
_PER_THREAD = 1 << 16  # below this many elements a second thread costs more than it saves
_pool: ThreadPoolExecutor | None = None


def _compiled(function: Callable[..., Any]) -> Any:
    """Compiles a function when it is first called; kept on disk for the next process, where there is a folder to keep it in."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the installation nor the home can be written, as in many containers
        return njit(nogil=True)(function)


def add(theta: Tensor, keys: Sequence[Key], coefficients: Sequence[float], distribution: Distribution) -> None:
    """θ ← θ + Σ cᵢ·z(keyᵢ), in place, in order; the bits of `reference.add`."""
    if not keys or theta.numel() == 0:
        return
    contiguous = theta.detach().contiguous()
    values = _bits(contiguous)
    all_c = np.array(coefficients, dtype=np.float32)
    all_words, all_c = np.array(keys, dtype=np.uint32)[all_c != 0.0], all_c[all_c != 0.0]  # −0 + 0 would be 0
    gaussian, table = distribution == "gaussian", _table(distribution)
    r, width = rank(distribution), matrix_width(theta.shape)
    at_once = max(1, _COLUMN_WORDS // width) if r and width else max(1, len(all_c))
    for first in range(0, len(all_c), at_once):
        words, c = all_words[first : first + at_once], all_c[first : first + at_once]
        columns = _column_words(words, r, width)
        if theta.dtype != torch.float32:
            run = partial(_add_half, values, words, c, gaussian, table, r, columns, theta.dtype == torch.bfloat16)
        elif distribution == "rademacher":
            run = partial(_add_f32_signs, values, words, c)
        elif r == 1 and width:
            run = partial(_add_f32_rank1, values, words, c, (columns & 1).astype(np.float32) * 2 - 1)
        else:
            run = partial(_add_f32, values, words, c, gaussian, table, r, columns)
        _parallel(run, theta.numel(), _BLOCK)
    if contiguous.data_ptr() != theta.data_ptr():
        theta.detach().copy_(contiguous)


def perturb(
    theta: Tensor, key: Key, offset: float, distribution: Distribution, out: Tensor, rows: Tensor | None = None
) -> None:
    """out ← θ + offset·z(key), rounded to nearest; arguments and bits of `reference.perturb`."""
    if copied_unmoved(theta, offset, out, rows):
        return
    source, target = _bits(theta.detach().contiguous()), _bits(out)
    # Without rows the tensor is one long row: index 0, as wide as the whole.
    row_index = np.zeros(1, dtype=np.int64) if rows is None else rows.numpy()
    width = theta.numel() if rows is None else theta[0].numel()
    words = np.array(key, dtype=np.uint32)
    r = rank(distribution)
    columns = _column_words(words[None], r, matrix_width(theta.shape))[0]
    direction = (words, np.float32(offset), distribution == "gaussian", _table(distribution), r, columns)
    if theta.dtype == torch.float32 and distribution == "rademacher":
        run = partial(_perturb_f32_signs, source, target, row_index, width, words, np.float32(offset))
    elif theta.dtype == torch.float32:
        run = partial(_perturb_f32, source, target, row_index, width, *direction)
    else:
        run = partial(_perturb_half, source, target, row_index, width, *direction, theta.dtype == torch.bfloat16)
    _parallel(run, out.numel(), _BLOCK)


def factors(index: Tensor, key: Key, r: int, *, columns: bool) -> Tensor:
    """The signs of a low-rank direction's factors; arguments and bits of `reference.factors`."""
    out = np.empty((len(index), r), dtype=np.float32)
    _fill_factors(out, index.numpy(), np.array(key, dtype=np.uint32), np.uint32(COLUMNS if columns else 0))
    return torch.from_numpy(out)


def _column_words(words: np.ndarray, r: int, width: int) -> np.ndarray:
    """32 bits for each direction and column of a matrix, shape `(directions, width)`; width 0 where z is not low-rank."""
    found = np.empty((len(words), width if r else 0), dtype=np.uint32)
    _fill_column_words(found, words, np.uint32(COLUMNS))
    return found


def _bits(tensor: Tensor) -> np.ndarray:
    """A flat numpy view: float32, or the uint16 bit patterns of half precision."""
    flat = tensor.view(-1)
    return flat.numpy() if tensor.dtype == torch.float32 else flat.view(torch.uint16).numpy()


_NO_TABLE = np.zeros(1, dtype=np.float32)


def _table(distribution: Distribution) -> np.ndarray:
    return half_normal_table().numpy() if distribution == "gaussian" else _NO_TABLE


def _parallel(run: Callable[[int, int], None], numel: int, block: int) -> None:
    """Runs over [0, numel) on as many threads as torch uses; each thread's share begins at the start of a block.

    Compiled functions release the interpreter lock, so plain threads suffice: no second OpenMP runtime beside torch's.
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


@_compiled
def _fill_factors(out, index, key, offset):  # type: ignore[no-untyped-def]
    for i in range(len(index)):
        word = _hash(index[i], key[0] ^ offset, key[1])
        for j in range(out.shape[1]):
            out[i, j] = np.float32(np.int32((word >> np.uint32(j)) & np.uint32(1)) * np.int32(2) - np.int32(1))


@_compiled
def _fill_column_words(out, keys, offset):  # type: ignore[no-untyped-def]
    for d in range(out.shape[0]):
        for column in range(out.shape[1]):
            out[d, column] = _hash(column, keys[d, 0] ^ offset, keys[d, 1])


@_compiled
def _fill_low_rank(z, start, key0, key1, rank, columns):  # type: ignore[no-untyped-def]
    """z of a matrix: what rows and columns agree on, less what they differ in, over √r."""
    width, n = len(columns), len(z)
    scale = np.float32(1.0 / np.sqrt(rank))
    i = 0
    while i < n:
        row = (start + i) // width
        column = start + i - row * width
        count = min(n - i, width - column)
        word = _hash(row, key0, key1)
        out, words = z[i : i + count], columns[column : column + count]
        out[:] = np.float32(rank) * scale
        for j in range(rank):
            for k in range(count):
                out[k] -= np.float32(np.int32(((word ^ words[k]) >> np.uint32(j)) & np.uint32(1))) * (
                    np.float32(2.0) * scale
                )
        i += count


@_compiled
def _fill_gaussian(z, start, key0, key1, table):  # type: ignore[no-untyped-def]
    for i in range(len(z)):
        h = _hash((start + i) >> 1, key0, key1)
        if (start + i) & 1:
            h >>= np.uint32(16)
        z[i] = table[h & np.uint32(0x7FFF)] if h & np.uint32(0x8000) else -table[h & np.uint32(0x7FFF)]


@_compiled
def _fill_signs(z, start, key0, key1):  # type: ignore[no-untyped-def]
    n = len(z)
    i = 0
    while i < n:
        h = _hash((start + i) >> 5, key0, key1)
        first = (start + i) & 31
        out = z[i : i + min(32 - first, n - i)]
        h >>= np.uint32(first)
        for b in range(len(out)):
            out[b] = np.float32(np.int32((h >> np.uint32(b)) & np.uint32(1)) * np.int32(2) - np.int32(1))
        i += len(out)


# Loops run over slices: the compiler uses the processor's wide registers only where it can see that an index is never
# negative, as it can if the index starts at 0.
@_compiled
def _fill_z(z, start, key0, key1, gaussian, table, rank, columns):  # type: ignore[no-untyped-def]
    """z ← the direction at flat indices start, start + 1, …"""
    if rank > 0 and len(columns) > 0:
        _fill_low_rank(z, start, key0, key1, rank, columns)
    elif gaussian:
        _fill_gaussian(z, start, key0, key1, table)
    else:
        _fill_signs(z, start, key0, key1)


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


@_compiled
def _add_f32(values, keys, c, gaussian, table, rank, columns, start, stop):  # type: ignore[no-untyped-def]
    buffer = np.empty(_BLOCK, dtype=np.float32)
    for block in range(start, stop, _BLOCK):
        theta = values[block : min(block + _BLOCK, stop)]
        z = buffer[: len(theta)]
        for d in range(len(c)):
            _fill_z(z, block, keys[d, 0], keys[d, 1], gaussian, table, rank, columns[d])
            coefficient = c[d]
            for i in range(len(theta)):
                theta[i] += coefficient * z[i]


@njit(inline="always")
def _with_sign(bits, word, k):  # type: ignore[no-untyped-def]
    """c·z exactly, for a sign z: c (its bits) with the sign flipped where bit k of the word is 0."""
    return _as_float32(np.uint32(bits ^ np.uint32((~(word >> np.uint32(k))) << np.uint32(31))))


@_compiled
def _add_f32_signs(values, keys, c, start, stop):  # type: ignore[no-untyped-def]
    for block in range(start, stop, _BLOCK):
        end = min(block + _BLOCK, stop)
        for d in range(len(c)):
            bits = _bits32(c[d])
            for first in range(block, end, 32):  # blocks begin at a word's first bit
                word = _hash(first >> 5, keys[d, 0], keys[d, 1])
                theta = values[first : min(first + 32, end)]
                for k in range(len(theta)):
                    theta[k] += _with_sign(bits, word, k)


@_compiled
def _add_f32_rank1(values, keys, c, signs, start, stop):  # type: ignore[no-untyped-def]
    """Rows of θ plus ±c times the columns' signs: nothing is hashed per element, so a long replay runs at cache speed.

    Each pass over a row adds four directions, in order, with one rounding each.
    """
    width, n = signs.shape[1], len(c)
    signed = np.empty(n, dtype=np.float32)
    first = start
    while first < stop:
        row = first // width
        column = first - row * width
        count = min(stop - first, width - column, _BLOCK)
        theta = values[first : first + count]
        for d in range(n):
            signed[d] = c[d] if _hash(row, keys[d, 0], keys[d, 1]) & np.uint32(1) else -c[d]
        d = 0
        while d + 4 <= n:
            c0, c1, c2, c3 = signed[d], signed[d + 1], signed[d + 2], signed[d + 3]
            v0, v1 = signs[d, column : column + count], signs[d + 1, column : column + count]
            v2, v3 = signs[d + 2, column : column + count], signs[d + 3, column : column + count]
            for k in range(count):
                theta[k] = (((theta[k] + c0 * v0[k]) + c1 * v1[k]) + c2 * v2[k]) + c3 * v3[k]
            d += 4
        while d < n:
            c0, v0 = signed[d], signs[d, column : column + count]
            for k in range(count):
                theta[k] += c0 * v0[k]
            d += 1
        first += count


@_compiled
def _add_half(values, keys, c, gaussian, table, rank, columns, bf16, start, stop):  # type: ignore[no-untyped-def]
    """Stochastic rounding as in `reference._round_stochastically`."""
    buffer = np.empty(_BLOCK, dtype=np.float32)
    mantissa, smallest = (np.int64(7), np.int64(-126)) if bf16 else (np.int64(10), np.int64(-14))
    bias = np.int64(1023)
    for block in range(start, stop, _BLOCK):
        theta = values[block : min(block + _BLOCK, stop)]
        z = buffer[: len(theta)]
        for d in range(len(c)):
            _fill_z(z, block, keys[d, 0], keys[d, 1], gaussian, table, rank, columns[d])
            key0, key1, coefficient = keys[d, 2], keys[d, 3], c[d]
            for i in range(len(theta)):
                value = np.float64(_load(theta[i], bf16)) + np.float64(np.float32(coefficient * z[i]))
                exponent = ((_bits64(value) >> np.int64(52)) & np.int64(0x7FF)) - bias
                spacing = max(exponent, smallest) - mantissa
                scaled = value * _as_float64((bias - spacing) << np.int64(52))
                below = np.floor(scaled)
                threshold = np.float64(_hash(block + i, key0, key1)) * 2.0**-32
                if scaled - below > threshold:
                    below += 1.0
                rounded = np.float32(below * _as_float64((bias + spacing) << np.int64(52)))
                theta[i] = _store(rounded, bf16)  # exact: rounded is a multiple of the spacing


@_compiled
def _perturb_f32_signs(source, target, rows, width, key, c, start, stop):  # type: ignore[no-untyped-def]
    bits = _bits32(c)
    position = start
    while position < stop:
        row = position // width
        column = position - row * width
        flat = rows[row] * width + column
        n = min(32 - (flat & 31), stop - position, width - column)  # as far as one word reaches
        word = _hash(flat >> 5, key[0], key[1]) >> np.uint32(flat & 31)
        theta, out = source[flat : flat + n], target[position : position + n]
        for k in range(n):
            out[k] = theta[k] + _with_sign(bits, word, k)
        position += n


@_compiled
def _perturb_f32(source, target, rows, width, key, c, gaussian, table, rank, columns, start, stop):  # type: ignore[no-untyped-def]
    buffer = np.empty(_BLOCK, dtype=np.float32)
    position = start
    while position < stop:
        row = position // width
        column = position - row * width
        n = min(_BLOCK, stop - position, width - column)
        flat = rows[row] * width + column
        z, theta, out = buffer[:n], source[flat : flat + n], target[position : position + n]
        _fill_z(z, flat, key[0], key[1], gaussian, table, rank, columns)
        for i in range(n):
            out[i] = theta[i] + c * z[i]
        position += n


@_compiled
def _perturb_half(source, target, rows, width, key, c, gaussian, table, rank, columns, bf16, start, stop):  # type: ignore[no-untyped-def]
    buffer = np.empty(_BLOCK, dtype=np.float32)
    position = start
    while position < stop:
        row = position // width
        column = position - row * width
        n = min(_BLOCK, stop - position, width - column)
        flat = rows[row] * width + column
        z, theta, out = buffer[:n], source[flat : flat + n], target[position : position + n]
        _fill_z(z, flat, key[0], key[1], gaussian, table, rank, columns)
        for i in range(n):
            out[i] = _store(np.float32(_load(theta[i], bf16) + np.float32(c * z[i])), bf16)
        position += n
