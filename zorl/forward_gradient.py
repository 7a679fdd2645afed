"""The forward gradient (Baydin et al. 2022; MeZO, section 2.2 and Appendix D): z·∇L itself, by forward-mode differentiation.

Dual numbers, which carry a derivative, go through one forward and give L and z·∇L: what SPSA estimates by a difference, without
ε and its error. It needs a loss that torch can differentiate, and it holds z and a derivative beside every
activation in use, where SPSA holds neither. No graph is kept and there is no backward pass.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from zorl.directions import Distribution, key
from zorl.interrupts import uninterrupted
from zorl.kernels import kernel_for
from zorl.parameters import ParameterSet
from zorl.perturbation import Scratch
from zorl.probe import Answers, Point, Slopes


class ForwardGradient:
    """The estimator: g = z·∇L, as it is told."""

    sides = 1

    def points(self, seeds: tuple[int, ...], epsilon: float) -> tuple[Point, ...]:
        """θ itself for each seed, where the slope along z(seed) is wanted."""
        return tuple(Point(seed, 0.0) for seed in seeds)

    def project(self, answers: Answers, directions: int, epsilon: float) -> list[float]:
        """The slopes of the loss.

        Raises:
            ValueError: the answers are scores or verdicts, or are for another number of directions.
        """
        if not isinstance(answers, Slopes):
            raise ValueError(
                "estimator='forward_gradient' differentiates a loss, and scores and verdicts have no slope: use estimator='spsa'"
            )
        if len(answers.values) != directions:
            raise ValueError(f"expected slopes along {directions} directions, got {len(answers.values)}")
        return [slope + 0.0 for slope in answers.values]

    def losses(self, answers: Answers) -> tuple[float, ...]:
        """None: a slope is exact."""
        return ()

    def observe(self, losses: Sequence[float]) -> None:
        pass


# The derivative is linear in z. Along z itself, whose elements are about 1, it overflows float16 within a few layers.
_SCALE = 2.0**-8


class DirectionalDerivative:
    """Differentiates a model's loss along directions z. θ is only read.

    Args:
        model: any module whose operations have forward derivatives. Attention is computed eagerly, on a replica: fused
            attention has none.
        parameters: the tuned ones, taken from this model.
        distribution: the distribution of z.
    """

    def __init__(self, model: nn.Module, parameters: ParameterSet, distribution: Distribution = "rademacher") -> None:
        from transformers import (
            PreTrainedModel,
        )  # slow, and it loads quantisers that print warnings: `zorl.MeZO` needs neither

        self.parameters, self.distribution = parameters, distribution
        self.evaluator = Scratch(model, parameters, distribution)  # at offset 0, it selects the head's rows
        self.module: Any = self.evaluator.module
        for inner in self.module.modules():
            if isinstance(inner, PreTrainedModel):
                inner.set_attn_implementation("eager")
        names = {id(tensor): name for name, tensor in parameters.items()}
        self._slots = [
            (module, attribute, names[id(p)], p)
            for module in self.module.modules()
            for attribute, p in module._parameters.items()
            if p is not None and id(p) in names
        ]

    def slopes(self, points: Sequence[Point], loss: Callable[[], Tensor]) -> tuple[float, Slopes]:
        """L at θ, and its slope along the direction of each point: one forward each.

        Args:
            loss: runs `module` and returns a tensor with one element.

        Raises:
            ValueError: the loss is not a tensor, or does not depend on the parameters in a way that can be differentiated.
        """
        found = [self._along(point.seed, loss) for point in points]
        return found[0][0], Slopes(tuple(slope for _, slope in found))

    @torch.no_grad()
    def _along(self, seed: int, loss: Callable[[], Tensor]) -> tuple[float, float]:
        with uninterrupted() as interruptible, forward_ad.dual_level():
            with self._carrying(self._direction(seed)):
                value = interruptible(loss)
            parts = forward_ad.unpack_dual(value) if isinstance(value, Tensor) else None
            if parts is None or parts.tangent is None:
                raise ValueError(
                    "estimator='forward_gradient' needs a loss that torch can differentiate: this one returns a number without a "
                    "derivative (.item(), .detach() or an argmax on the way?); use estimator='spsa'"
                )
            primal, slope = float(parts.primal), float(parts.tangent) / _SCALE
            if math.isfinite(primal) and not math.isfinite(slope):
                raise ValueError(
                    f"the loss is {primal:.4g}, and its derivative overflows the model's dtype: load the model with "
                    "dtype='bfloat16' or 'float32', or use estimator='spsa'"
                )
            return primal, slope

    def _direction(self, seed: int) -> dict[str, Tensor]:
        z = {}
        for name, tensor in self.parameters.items():
            z[name] = torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
            kernel_for(z[name]).add(z[name], [key(seed, name)], [_SCALE], self.distribution)
        return z

    @contextmanager
    def _carrying(self, z: dict[str, Tensor]) -> Iterator[None]:
        """The replica's parameters with their derivative, z, beside them."""
        with warnings.catch_warnings():  # torch loads its rules on first use, in a way that it has deprecated itself
            warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
            duals = {
                name: forward_ad.make_dual(tensor.detach(), z[name].to(tensor.dtype))
                for name, tensor in self.parameters.items()
            }
        try:
            for module, attribute, name, _ in self._slots:
                module._parameters[attribute] = duals[name]
            yield
        finally:
            for module, attribute, _, parameter in self._slots:
                module._parameters[attribute] = parameter
