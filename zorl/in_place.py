"""Evaluating a closure that zorl cannot see into: θ is written, and restored exactly.

In floating point θ + ε − ε is not θ unless the additions are exact. So float32 tensors are snapped to a grid of multiples of
a power of two, fine enough to change no weight by more than 2⁻²³ of the range, which is the tensor's largest value plus twice
the farthest ε. A tensor that outgrows its grid gets a coarser one. ε and the coefficients are kept to multiples of it, so that
every sum is exact. Half precision has no bits to spare for that, and directions that are not ±1 fit no grid: these tensors are
copied, which takes their memory once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from zorl.directions import Distribution, Key, Step, key
from zorl.interrupts import uninterrupted
from zorl.kernels import kernel_for
from zorl.kernels.reference import add_dense
from zorl.parameters import ParameterSet
from zorl.probe import Point

T = TypeVar("T")


@dataclass(slots=True)
class _Grid:
    """The multiples of `spacing`. Sums of them are exact as long as no |value| exceeds 2²⁴ · spacing."""

    spacing: float
    largest: float  # an upper bound on the tensor's present |w|


class InPlace:
    """Moves θ itself to a point and back.

    Args:
        parameters: their float32 tensors are snapped to a grid at once, if the directions are ±1.
        distribution: of z.
        reach: the largest |offset| that will be asked for; the grid leaves room for it.
    """

    def __init__(self, parameters: ParameterSet, distribution: Distribution, reach: float) -> None:
        self.parameters = parameters
        self.distribution = distribution
        self.reach = reach
        self._grids: dict[str, _Grid] = {}
        if distribution in ("rademacher", "rank1"):
            for name, tensor in parameters.items():
                if tensor.dtype == torch.float32:
                    self._grids[name] = _snap(tensor, reach)

    @property
    def copied(self) -> list[str]:
        """The names of the parameters that every evaluation copies, because no exact grid exists for them."""
        return [name for name in self.parameters if name not in self._grids]

    @torch.no_grad()
    def evaluate(self, point: Point, forward: Callable[[], T]) -> T:
        """The result of `forward()` at the point. Whether this returns or raises, θ then has the bits that it had before.

        Raises:
            ValueError: the offset exceeds `reach`.
        """
        offsets = {name: point.offset_of(name) for name in self.parameters}
        farthest = max(offsets.values(), key=abs)
        if abs(farthest) > self.reach * (1 + 1e-6):
            raise ValueError(f"offset {farthest:g} is beyond the reach {self.reach:g} that the grid has room for")
        if point.offset == 0.0:
            return forward()
        copies = {name: self.parameters[name].clone() for name in self.copied}
        moved: list[tuple[Tensor, Key, float]] = []
        with uninterrupted() as interruptible:
            try:
                for name, tensor in self.parameters.items():
                    stream = key(point.seed, name)
                    if name in copies:
                        out = torch.empty_like(tensor, memory_format=torch.contiguous_format)
                        kernel_for(tensor).perturb(tensor, stream, offsets[name], self.distribution, out)
                        tensor.copy_(out)
                    elif offsets[name] != 0.0:
                        offset = _nearest_multiple(offsets[name], self._grids[name].spacing)
                        kernel_for(tensor).add(tensor, [stream], [offset], self.distribution)
                        moved.append((tensor, stream, offset))
                result: T = interruptible(forward)
                return result
            finally:
                for name, copy in copies.items():
                    self.parameters[name].copy_(copy)
                for tensor, stream, offset in moved:
                    kernel_for(tensor).add(tensor, [stream], [-offset], self.distribution)

    @torch.no_grad()
    def add(self, steps: Sequence[Step]) -> None:
        """θ ← θ + Σ cᵢ·z(seedᵢ) on the grid.

        Each coefficient is rounded stochastically to a multiple of the spacing, with hashed bits of (seed, name), so that its
        mean is right however small it is.
        """
        for name, tensor in self.parameters.items():
            for step in steps:
                stream, c = key(step.seed, name), step.coefficient_of(name)
                if name in self._grids:
                    grid = self._grid_with_room(name, abs(c))
                    c = math.floor(c / grid.spacing + stream.rounding0 * 2.0**-32) * grid.spacing
                    grid.largest += abs(c)
                kernel_for(tensor).add(tensor, [stream], [c], self.distribution)

    @torch.no_grad()
    def change(self, name: str, amount: Tensor, stream: Key) -> None:
        """Adds a tensor to a parameter on the grid, each element rounded stochastically to a multiple of the spacing."""
        tensor = self.parameters[name]
        if name not in self._grids:
            add_dense(tensor, amount, stream)
            return
        largest = float(amount.abs().max()) if amount.numel() else 0.0
        grid = self._grid_with_room(name, largest)
        add_dense(tensor, amount, stream, grid.spacing)
        grid.largest += largest + grid.spacing

    def _grid_with_room(self, name: str, change: float) -> _Grid:
        """The parameter's grid, made coarser if a change of this size would not fit."""
        grid = self._grids[name]
        if grid.largest + change + self.reach >= grid.spacing * 2.0**24:
            grid = self._grids[name] = _snap(self.parameters[name], self.reach + change)
        return grid


def _snap(tensor: Tensor, room: float) -> _Grid:
    """Rounds a float32 tensor to multiples of a power of two: 2⁻²³ of the range that its values and `room` need."""
    largest = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
    spacing = 2.0 ** (math.ceil(math.log2(largest + 2.0 * room)) - 23)
    flat = tensor.detach()
    # Exact, apart from the rounding itself. Adding 0 turns −0 into 0: adding and subtracting an offset would lose the sign.
    flat.copy_(torch.round(flat / spacing) * spacing + 0.0)
    return _Grid(spacing, largest + spacing)


def _nearest_multiple(value: float, spacing: float) -> float:
    """The nearest multiple of `spacing`, but never zero: a perturbation must perturb."""
    multiple = round(abs(value) / spacing) or 1
    return math.copysign(multiple * spacing, value)
