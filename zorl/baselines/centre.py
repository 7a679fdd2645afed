"""The evaluator of methods that do not perturb the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from zorl.probe import Point

T = TypeVar("T")


class Centre:
    """Evaluates at θ alone (see `zorl.perturbation.Evaluator`), through the model itself.

    It leaves the model's mode and autograd alone, so scores have gradients where these are enabled.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def evaluate(self, point: Point, forward: Callable[[], T], *, head_rows: Tensor | None = None) -> T:
        if point.offset:
            raise ValueError(f"this model is evaluated as it is, not at an offset of {point.offset}")
        return forward()

    def copies(self, points: int) -> int:
        return 1

    def evaluate_all(
        self, points: Sequence[Point], forward: Callable[[int], list[T]], *, head_rows: Tensor | None = None
    ) -> list[T]:
        return [result for point in points for result in self.evaluate(point, lambda: forward(1))]
