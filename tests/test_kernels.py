"""The fast CPU kernel has the bits of the reference, and half precision learns in the mean."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zorl.directions import DISTRIBUTIONS, Distribution, key
from zorl.kernels import DTYPES, kernel_for, reference
from zorl.mezo import MeZO

cpu = pytest.importorskip("zorl.kernels.cpu", reason="numba is not installed")

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SMALLEST_NORMAL = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-14}
SHAPES = [(), (1,), (31,), (33,), (4095,), (4097,), (3, 5, 2), (0, 4), (61, 67)]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
KEYS = [key(seed, "w") for seed in range(4)]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    yield
    torch.set_num_threads(before)


def weights(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 0.1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit: −0 is not 0, and a NaN is itself."""
    assert a.dtype == b.dtype
    return torch.equal(a.contiguous().view(INTEGERS[a.dtype]), b.contiguous().view(INTEGERS[b.dtype]))


def assert_add_agrees(theta: Tensor, coefficients: list[float], distribution: Distribution) -> None:
    expected, found = theta.clone(), theta.clone()
    reference.add(expected, KEYS[: len(coefficients)], coefficients, distribution)
    cpu.add(found, KEYS[: len(coefficients)], coefficients, distribution)
    assert same_bits(found, expected)


def assert_perturb_agrees(theta: Tensor, offset: float, distribution: Distribution, rows: Tensor | None = None) -> None:
    shape = theta.shape if rows is None else (len(rows), *theta.shape[1:])
    expected, found = torch.empty(shape, dtype=theta.dtype), torch.empty(shape, dtype=theta.dtype)
    before = theta.clone()
    reference.perturb(theta, KEYS[0], offset, distribution, expected, rows)
    cpu.perturb(theta, KEYS[0], offset, distribution, found, rows)
    assert same_bits(found, expected)
    assert same_bits(theta, before)


@each_dtype
@each_distribution
@pytest.mark.parametrize("shape", SHAPES)
def test_numba_has_the_reference_bits_for_any_shape(
    dtype: torch.dtype, distribution: Distribution, shape: tuple[int, ...]
):
    theta = weights(shape, dtype)
    assert_add_agrees(theta, [0.01, -1.0 / 3.0, 0.0, 1e-6], distribution)
    assert_perturb_agrees(theta, 1e-3, distribution)
    assert_perturb_agrees(theta, -1e-3, distribution)


@each_dtype
@each_distribution
@pytest.mark.parametrize("coefficient", [1e-40, 1e-30, 1e-7, 3e-3, 1.0, 1e4, 3e38])
def test_numba_has_the_reference_bits_for_any_size_of_the_change(
    dtype: torch.dtype, distribution: Distribution, coefficient: float
):
    smallest, largest = SMALLEST_NORMAL[dtype], torch.finfo(dtype).max
    corners = [0.0, -0.0, 1.0, -1.0, smallest, -smallest, smallest / 8, smallest * 0.75, largest, -largest, largest / 2]
    theta = torch.tensor(corners, dtype=torch.float64).to(dtype).repeat(7)
    for signed in (coefficient, -coefficient):
        assert_add_agrees(theta, [signed], distribution)
        assert_perturb_agrees(theta, signed, distribution)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_distribution
@pytest.mark.parametrize("coefficient", [1e-5, 2e-2, 500.0])
def test_numba_has_the_reference_bits_for_every_half_precision_number(
    dtype: torch.dtype, distribution: Distribution, coefficient: float
):
    theta = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    theta = theta[torch.isfinite(theta)]
    assert_add_agrees(theta, [coefficient], distribution)
    assert_perturb_agrees(theta, coefficient, distribution)


@each_dtype
@each_distribution
def test_numba_has_the_reference_bits_where_memory_is_not_contiguous(dtype: torch.dtype, distribution: Distribution):
    matrix = weights((40, 60), dtype)
    for view in (matrix.T, matrix[:, 3:50], matrix[::3, ::2], matrix.view(-1)[5::7]):
        assert not view.is_contiguous()
        expected = view.clone(memory_format=torch.contiguous_format)
        reference.add(expected, KEYS[:2], [0.01, 0.02], distribution)
        for kernel in (reference, cpu):
            whole = matrix.clone()
            moved = whole.as_strided(view.shape, view.stride(), view.storage_offset())
            kernel.add(moved, KEYS[:2], [0.01, 0.02], distribution)
            assert same_bits(moved, expected)
            moved.copy_(view)
            assert same_bits(whole, matrix), "the rest of the storage was written"
        assert_perturb_agrees(view, 1e-2, distribution)


@each_dtype
@each_distribution
def test_rows_are_those_of_the_whole_perturbed_matrix(dtype: torch.dtype, distribution: Distribution):
    theta = weights((50, 37), dtype)
    whole = torch.empty_like(theta)
    cpu.perturb(theta, KEYS[0], 0.02, distribution, whole)
    for rows in (torch.tensor([3, 3, 49, 0, 17]), torch.arange(50).flip(0), torch.arange(0, 50, 3), torch.tensor([7])):
        for kernel in (reference, cpu):
            out = torch.empty(len(rows), 37, dtype=dtype)
            kernel.perturb(theta, KEYS[0], 0.02, distribution, out, rows)
            assert same_bits(out, whole[rows])
        assert_perturb_agrees(theta.T.contiguous().T, 0.02, distribution, rows)
    assert_perturb_agrees(theta, 0.02, distribution, torch.tensor([], dtype=torch.int64))
    assert_perturb_agrees(weights((9, 3, 2), dtype), 0.02, distribution, torch.tensor([8, 1]))
    assert_perturb_agrees(weights((9,), dtype), 0.02, distribution, torch.tensor([8, 1]))
    assert_perturb_agrees(theta, 0.0, distribution, torch.tensor([8, 1]))


@pytest.mark.parametrize("kernel", [reference, cpu])
@pytest.mark.parametrize("row", [50, -1, 1 << 40])
def test_a_row_that_is_not_there_is_refused(kernel, row: int):
    theta, out = weights((50, 4), torch.float32), torch.empty(1, 4)
    with pytest.raises(IndexError):
        kernel.perturb(theta, KEYS[0], 0.02, "rademacher", out, torch.tensor([row]))


@each_dtype
@each_distribution
def test_the_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype, distribution: Distribution, threads: None):
    theta = weights((5 * (1 << 16) + 4097,), dtype)  # five threads and a remainder
    assert_add_agrees(theta, [0.01, 0.02], distribution)
    assert_perturb_agrees(theta, 0.01, distribution)


@each_dtype
@each_distribution
def test_directions_folded_together_are_folded_one_by_one(dtype: torch.dtype, distribution: Distribution):
    together, alone = weights((1000,), dtype), weights((1000,), dtype)
    coefficients = [0.01, -0.5, 1e-5, 0.25]
    cpu.add(together, KEYS, coefficients, distribution)
    for stream, coefficient in zip(KEYS, coefficients, strict=True):
        cpu.add(alone, [stream], [coefficient], distribution)
    assert same_bits(together, alone)


@each_dtype
@given(st.integers(1, 300), st.floats(-100, 100, width=32), st.integers(0, 1 << 62))
@settings(max_examples=40, deadline=None)
def test_numba_has_the_reference_bits_for_any_seed_and_coefficient(dtype: torch.dtype, n: int, c: float, seed: int):
    for distribution in DISTRIBUTIONS:
        expected, found = weights((n,), dtype), weights((n,), dtype)
        reference.add(expected, [key(seed, "w")], [c], distribution)
        cpu.add(found, [key(seed, "w")], [c], distribution)
        assert same_bits(found, expected)


@each_distribution
def test_float32_is_one_rounded_sum_an_element(distribution: Distribution):
    theta = weights((500,), torch.float32)
    z = reference.sample(torch.arange(500), KEYS[0], distribution)
    moved, out = theta.clone(), torch.empty_like(theta)
    cpu.add(moved, [KEYS[0]], [0.03], distribution)
    cpu.perturb(theta, KEYS[0], 0.03, distribution, out)
    assert same_bits(moved, theta + z * 0.03)
    assert same_bits(out, moved)


@each_dtype
def test_a_zero_coefficient_leaves_every_bit(dtype: torch.dtype):
    theta = torch.tensor([[0.0, -0.0], [1.5, -2.5]], dtype=dtype)
    for kernel, distribution in itertools.product((reference, cpu), DISTRIBUTIONS):
        moved, out = theta.clone(), torch.empty_like(theta)
        kernel.add(moved, KEYS[:4], [0.0] * 4, distribution)
        kernel.perturb(theta, KEYS[0], 0.0, distribution, out)
        assert same_bits(moved, theta)
        assert same_bits(out, theta)


@pytest.mark.parametrize("directions", [1, 3, 4, 7, 700])
def test_rank_one_directions_that_are_folded_by_fours_keep_their_order(directions: int):
    """Also more of them than the columns' signs are kept for at once."""
    keys = [key(seed, "w") for seed in range(directions)]
    coefficients = [(-1) ** i * 10.0 ** -(i % 9) for i in range(directions)]
    for shape in ((9, 513), (3, 5000)):
        expected, found = weights(shape, torch.float32), weights(shape, torch.float32)
        reference.add(expected, keys, coefficients, "rank1")
        cpu.add(found, keys, coefficients, "rank1")
        assert same_bits(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coefficient", [1e-6, 1e-5, 1e-4, 3e-3])
def test_the_mean_applied_update_in_half_precision_is_the_coefficient(dtype: torch.dtype, coefficient: float):
    """Round-to-nearest swallows these: at |w| = 0.05 neighbours in bfloat16 are 2.4e-4 apart, in float16 3e-5."""
    n = 1 << 20
    theta = weights((n,), dtype, scale=0.05)
    moved = theta.clone()
    cpu.add(moved, [KEYS[0]], [coefficient], "rademacher")
    z = reference.sample(torch.arange(n), KEYS[0], "rademacher").double()
    change = (moved.double() - theta.double()) * z
    # Rounding to one of two neighbours h apart with mean c has the variance c(h−c) ≤ ch; here h ≤ 2⁻⁸ (bfloat16).
    spacing = 2.0 ** (-9 if dtype == torch.bfloat16 else -12)
    assert change.mean().item() == pytest.approx(coefficient, abs=5 * math.sqrt(coefficient * spacing / n) + 1e-9)
    nearest = (theta.double() + coefficient * z).to(dtype).double() - theta.double()
    if coefficient == 1e-6 and dtype == torch.bfloat16:
        assert abs((nearest * z).mean().item() - coefficient) > 0.1 * coefficient  # what plain rounding would do


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounding_of_an_element_is_independent_of_its_direction(dtype: torch.dtype):
    """Where θ is one number, updates in both directions must be rounded up equally often."""
    theta = torch.full((1 << 18,), 1.0, dtype=dtype)
    cpu.add(theta, [KEYS[0]], [torch.finfo(dtype).eps / 8], "rademacher")
    z = reference.sample(torch.arange(1 << 18), KEYS[0], "rademacher")
    up = (theta[z > 0] > 1.0).double().mean().item()
    assert up == pytest.approx(1 / 8, abs=5 * math.sqrt(1 / 8 / (1 << 17)))
    down = (theta[z < 0] < 1.0).double().mean().item()
    assert down == pytest.approx(1 / 4, abs=5 * math.sqrt(1 / 4 / (1 << 17)))  # neighbours below 1 are half as far


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64])
def test_a_dtype_without_a_kernel_is_named(dtype: torch.dtype):
    with pytest.raises(TypeError, match=rf"float32, bfloat16 and float16 parameters, not {dtype}"):
        kernel_for(torch.zeros(3, dtype=dtype))


def test_a_tensor_of_too_many_elements_is_refused():
    with pytest.raises(ValueError, match="4294967296 elements; at most 4294967295"):
        kernel_for(torch.zeros(1, dtype=torch.float16).expand(1 << 32))


def test_the_fast_kernel_is_chosen_on_cpus():
    assert kernel_for(torch.zeros(3)) is cpu


def test_without_numba_the_reference_kernel_runs():
    program = """
import sys
sys.modules["numba"] = None  # what importing it finds where it is not installed
import torch
from zorl.kernels import kernel_for, reference
from zorl.mezo import MeZO
assert kernel_for(torch.zeros(3)) is reference
w = torch.full((100,), 0.5)
optimizer = MeZO([("w", w)], lr=0.01, epsilon=0.01, update="normalized")
for _ in range(20):
    optimizer.step(lambda: w.square().sum().item())
assert "zorl.kernels.cpu" not in sys.modules
print(optimizer.parameters.sha256())
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    w = torch.full((100,), 0.5)
    optimizer = MeZO([("w", w)], lr=0.01, epsilon=0.01, update="normalized")
    for _ in range(20):
        optimizer.step(lambda: w.square().sum().item())
    assert found.stdout.strip() == optimizer.parameters.sha256()
    assert not torch.equal(w, torch.full((100,), 0.5))


def test_where_nothing_can_be_written_the_kernel_is_compiled_without_a_cache():
    """numba looks for a place beside the file and in the home; a container may let a process write neither."""
    program = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"  # what is left where no place can be written
        "import torch\nfrom zorl.kernels import cpu\n"
        "theta = torch.zeros(5)\ncpu.add(theta, [(1, 2)], [1.0], 'rademacher')\nprint(theta.abs().tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[1.0, 1.0, 1.0, 1.0, 1.0]\n", done.stderr
