"""Block-wise scales d of SPSA with its variance or its expectation modified (MeZO, Appendix B). A block is a parameter tensor.

Points lie along d⁻¹⊙z: blocks with a large d are perturbed less. With the variance modified θ moves along d⊙z, and the estimate
stays unbiased; with the expectation modified it moves along z, and the estimate's mean is diag(d)⁻¹∇L, a preconditioned gradient.

d is the blocks' parameter norms, or estimates of their gradients' norms: |g| of an SPSA step along z in one block alone, which
takes a step of its own, with two forwards per block, that moves nothing. Both are renewed every `block_scales_every` steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch

from zorl.parameters import ParameterSet
from zorl.updates import bfloat16

BlockScales = Literal["parameter_norms", "gradient_norms"]
LARGEST = (
    16.0  # scales lie within 1/16 … 16, so that a block whose norm is 0, such as new biases, is not thrown far away
)


def check_block_scales(kind: str, every: int) -> None:
    """Raises ValueError for settings out of range."""
    if kind not in get_args(BlockScales):
        raise ValueError(f"block_scales={kind!r}; choose 'parameter_norms' or 'gradient_norms'")
    if every < 2:
        raise ValueError(f"block_scales_every must be at least 2 steps, got {every}")


def measures(header: Mapping[str, Any], step: int) -> bool:
    """Whether this step of a run estimates the blocks' gradient norms and moves nothing."""
    return header.get("block_scales") == "gradient_norms" and step % header["block_scales_every"] == 0


def rescales(header: Mapping[str, Any], step: int) -> bool:
    """Whether the parameters' norms are measured again before this step of a run."""
    return header.get("block_scales") == "parameter_norms" and step % header["block_scales_every"] == 0


def parameter_norms(parameters: ParameterSet) -> dict[str, float]:
    """d of each parameter from its norm."""
    norms = {
        # In float64, so that machines that add in another order agree after rounding to bfloat16.
        name: float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))
        for name, tensor in parameters.items()
    }
    return normalized(norms, parameters)


def normalized(norms: Mapping[str, float], parameters: ParameterSet) -> dict[str, float]:
    """d: the norms over their geometric mean over all elements of the parameters, rounded to bfloat16.

    The mean of log d over the elements is thus 0: on the whole, neither d⁻¹ nor d changes ε or the learning rate. Blocks without
    a norm do not count in the mean; those of norm 0 get the smallest scale, those whose norm is NaN, because nothing was
    measured, get 1. If no block has a norm, all scales are 1.
    """
    known = {name: norm for name, norm in norms.items() if norm > 0.0}
    if not known:
        return dict.fromkeys(norms, 1.0)
    sizes = {name: max(1, parameters[name].numel()) for name in known}
    mean = sum(sizes[name] * math.log(norm) for name, norm in known.items()) / sum(sizes.values())
    largest = math.log(LARGEST)
    return {
        name: bfloat16(math.exp(min(max(math.log(known[name]) - mean, -largest), largest)))
        if name in known
        else 1.0
        if math.isnan(norms[name])
        else 1.0 / LARGEST
        for name in norms
    }
