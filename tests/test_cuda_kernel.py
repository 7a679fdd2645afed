"""The Triton kernel has the bits of the reference: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (it comes with torch for CUDA)"
)
# A process of its own: whether Triton compiles or interprets is decided when the kernel is imported.
PROGRAM = """
import itertools, sys
import torch
from zorl.directions import DISTRIBUTIONS, key
from zorl.kernels import cuda, reference

device = sys.argv[1]
integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
streams = [key(seed, "w") for seed in range(4)]
generator = torch.Generator().manual_seed(0)

def same(a, b):
    return torch.equal(a.contiguous().view(integers[a.dtype]), b.contiguous().view(integers[b.dtype]))

for dtype, distribution, shape in itertools.product(integers, DISTRIBUTIONS, [(33,), (61, 67), (3, 5, 2), (1500,)]):
    theta = (torch.randn(shape, generator=generator) * 0.1).to(device, dtype)
    expected, found = theta.clone(), theta.clone()
    for kernel, moved in ((reference, expected), (cuda, found)):
        kernel.add(moved, streams, [0.01, -1.0 / 3.0, 0.0, 1e-6], distribution)
    assert same(expected, found), ("add", dtype, distribution, shape)
    several = torch.tensor([[2, 5], [2, 5], [0, 5]], device=device)
    for rows in [None] if len(shape) == 1 else [None, several[:, 0].contiguous(), several[:, 0]]:
        out = [torch.empty(shape if rows is None else (3, *shape[1:]), dtype=dtype, device=device) for _ in range(2)]
        for kernel, to in zip((reference, cuda), out):
            kernel.perturb(theta, streams[0], -1e-3, distribution, to, rows)
        assert same(*out), ("perturb", dtype, distribution, shape)
    view = theta.expand(2, *shape).contiguous().transpose(0, 1)
    expected, found = view.clone(memory_format=torch.contiguous_format), view
    reference.add(expected, streams[:1], [0.5], distribution)
    cuda.add(found, streams[:1], [0.5], distribution)
    assert same(expected, found), ("strided", dtype, distribution, shape)
for r, columns, index in itertools.product((1, 4), (False, True), (torch.arange(2000), torch.tensor([[7, 1], [3, 1]])[:, 0])):
    assert torch.equal(*(k.factors(index.to(device), streams[1], r, columns=columns) for k in (reference, cuda)))
theta = torch.full((64,), 65504.0, dtype=torch.float16, device=device)  # beyond it there is only infinity
expected, found = theta.clone(), theta.clone()
reference.add(expected, streams[:2], [1e4, -1e4], "rademacher")
cuda.add(found, streams[:2], [1e4, -1e4], "rademacher")
assert same(expected, found)
for dtype in integers:
    assert cuda.agrees(torch.device(device), dtype)
print("the same bits")
"""


def test_triton_has_the_reference_bits() -> None:
    environment = os.environ if ON_GPU else {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "cuda" if ON_GPU else "cpu"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "the same bits"


# The interpreter takes programs that the compiler refuses. Compiling needs no GPU.
COMPILING = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from zorl.kernels import cuda

def compiled(kernel, signature, **constants):
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    target = GPUTarget("cuda", 90, 32)
    triton.compile(ASTSource(kernel, types, constants), target=target, options=cuda._OPTIONS)

pointers = {0: "*fp32", 1: "*bf16", 2: "*fp16"}
for kind, r in ((cuda._SIGNS, 0), (cuda._GAUSSIAN, 0), (cuda._LOW_RANK, 1), (cuda._LOW_RANK, 4)):
    for dtype, pointer in pointers.items():
        table = "*fp32" if kind == cuda._GAUSSIAN else pointer
        common = {"KIND": kind, "RANK": r, "DTYPE": dtype, "BLOCK": cuda._BLOCK, "COLUMN_KEY": cuda.COLUMNS}
        scalars = {**dict.fromkeys(("n", "width", "directions", "row_width", "z0", "z1"), "i32"), "offset": "fp32"}
        types = {"theta": pointer, "out": pointer, "table": table, "of_direction": "*i64", "rows": "*i64", **scalars}
        compiled(cuda._add, types, **common)
        compiled(cuda._perturb, types, HAS_ROWS=True, **common)
for r in (1, 4):
    compiled(cuda._factors, {"index": "*i64", "out": "*fp32", "n": "i32", "z0": "i32", "z1": "i32"}, RANK=r, BLOCK=cuda._BLOCK)
print("compiled")
"""


def test_triton_compiles_every_kind_of_direction() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "compiled"


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_a_captured_graph_reads_what_the_update_wrote() -> None:
    from zorl.directions import key
    from zorl.kernels import kernel_for

    theta = torch.ones(1000, device="cuda")
    kernel_for(theta)  # compiles outside the graph
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        theta.sum()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        total = theta.sum()
    graph.replay()
    before = total.item()
    kernel_for(theta).add(theta, [key(0, "w")], [1.0], "rademacher")
    graph.replay()
    assert total.item() == theta.sum().item() != before
