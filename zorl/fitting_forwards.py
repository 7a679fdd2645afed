"""Forwards that fit into memory: whenever it runs out, the number of inputs per forward is halved for good.

How many inputs a forward can hold is not known in advance: it depends on the model, the lengths of the texts and what else is in
memory. So the requested number is tried first, and halved until it fits. The results depend on it only by rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

if TYPE_CHECKING:
    from zorl.perturbation import Evaluator
    from zorl.probe import Point

T = TypeVar("T")


class FittingForwards:
    """Evaluates points in forwards of a limited number of inputs, which is halved whenever memory runs out.

    Args:
        evaluator: runs the model at points.
        batch_size: the most inputs per forward, counting those of all its points.

    Attributes:
        batch_size: the largest number that has fitted so far.

    Raises:
        ValueError: batch_size is below 1.
    """

    def __init__(self, evaluator: Evaluator, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.evaluator = evaluator
        self.batch_size = batch_size

    def __call__(
        self,
        points: Sequence[Point],
        prepare: Callable[[int], Callable[[int], list[T]]],
        *,
        inputs: int,
        inputs_per_row: int = 1,
        head_rows: Tensor | None = None,
    ) -> list[T]:
        """The results of a forward at each point.

        Args:
            prepare: takes the most inputs per point that a forward may hold, at least 1, and returns the function that
                `Evaluator.evaluate_all` is to call.
            inputs: the number of inputs per point, over all rows.
            inputs_per_row: the most inputs that one row has. Points share a forward only if it holds one row of each.
            head_rows: as for `Evaluator.evaluate_all`.

        Raises:
            torch.OutOfMemoryError: there is not enough memory for a single input.
        """
        tried = self.batch_size
        while True:
            together = self._points_together(len(points), inputs_per_row)
            failure: Exception | None = None
            try:
                forward = prepare(max(1, self.batch_size // max(1, self.evaluator.copies(together))))
                found = [
                    result
                    for start in range(0, len(points), together)
                    for result in self.evaluator.evaluate_all(
                        points[start : start + together], forward, head_rows=head_rows
                    )
                ]
            except RuntimeError as error:
                if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                    raise
                # Without its traceback, whose frames hold the tensors that there is no room for.
                failure = error.with_traceback(None)
            if failure is None:
                break
            clear_device_cache(garbage_collection=True)
            held = min(self.batch_size, inputs * self.evaluator.copies(together))
            if held <= 1:
                raise torch.OutOfMemoryError(
                    f"there is not enough memory for a forward of one input at one point (forward_batch_size was {tried}, and "
                    "has been halved down to 1): shorten the inputs with max_length, load the model with "
                    "dtype='bfloat16', or use a device with more memory"
                ) from failure
            self.batch_size = held // 2
        if self.batch_size < tried:
            warnings.warn(
                f"there is not enough memory for forwards of {tried} inputs: forward_batch_size has been lowered to "
                f"{self.batch_size} for the rest of the run",
                stacklevel=2,
            )
        return found

    def _points_together(self, points: int, inputs_per_row: int) -> int:
        """How many points to evaluate at once: all of them, or as many as fit, in groups of about equal size."""
        fits = (n for n in range(points, 1, -1) if self.evaluator.copies(n) * inputs_per_row <= self.batch_size)
        groups = -(-points // next(fits, 1))
        return max(1, -(-points // max(1, groups)))
