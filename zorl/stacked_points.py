"""What a stacked forward computes with: its points, how its rows are laid out, and each weight at each point.

The batch is stacked P times, one point after the other along the first dimension of every activation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from zorl.directions import Distribution, key, matrix_width, rank
from zorl.kernels import kernel_for
from zorl.probe import Point

T = TypeVar("T")


class StackingError(ValueError):
    """A model does something with its weights or its rows that cannot be done at several points in one forward.

    It is not a TypeError because Python's operators would take that as a hint to try the other operand.
    """


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter of the model, as the operations of a stacked forward see it."""

    tensor: Tensor
    name: str | None = None  # canonical; None: it is not tuned
    is_head: bool = False  # part of the output embedding, of which single rows may be asked


class StackedPoints:
    """The points of the evaluation that is under way, and what it has computed for all of its forwards.

    What does not depend on the inputs is made once per evaluation, however many tokens that generates.

    Args:
        distribution: of z, low-rank.

    Attributes:
        points: empty between evaluations.
        head_rows: the rows of the vocabulary that the output embedding computes, `(n,)`; None: all of them.
        batch: rows of the outer forward, all points together; 0 outside it.
    """

    def __init__(self, distribution: Distribution) -> None:
        self.distribution = distribution
        self.points: tuple[Point, ...] = ()
        self.head_rows: Tensor | None = None
        self.batch = 0
        self._makers: dict[Any, Callable[[], Any]] = {}  # of everything that evaluations have asked for so far
        self._made: dict[Any, Any] = {}  # the same, for these points

    def start(self, points: Sequence[Point], head_rows: Tensor | None) -> None:
        """Begins an evaluation."""
        self.points, self.head_rows, self.batch = tuple(points), head_rows, 0

    def finish(self) -> None:
        """Ends the evaluation and frees what it has made."""
        self.points, self.head_rows, self._made = (), None, {}

    def once(self, name: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What `make` returns, which is called once per evaluation.

        Args:
            name: holds the `id` of the tensor of each weight that `make` reads.
        """
        if name not in self._made:
            self._makers[name] = make
            self._made[name] = make()
        made: T = self._made[name]
        return made

    def make_ahead(self) -> None:
        """Makes all that earlier evaluations have asked for, before the first activation.

        Made between a forward's activations, what stays would leave gaps in memory that the next ones do not fit into.
        """
        for name, make in list(self._makers.items()):
            self.once(name, make)

    def forget(self, weight: Weight) -> None:
        """Frees what was made of a weight, and does not make it ahead any more."""
        for name in [name for name in self._made if id(weight.tensor) in name]:
            del self._made[name], self._makers[name]

    def forget_all(self) -> None:
        """Makes nothing ahead any more."""
        self._makers = {}

    @property
    def any_moved(self) -> bool:
        """Whether any point differs from θ."""
        return any(point.offset != 0.0 for point in self.points)

    def stacked(self, x: Tensor, width: int) -> Tensor:
        """An activation as `(points, n, width)`.

        Raises:
            StackingError: its first dimension does not run over the stacked rows.
        """
        if not x.ndim or not self.batch or len(x) % self.batch or self.batch % len(self.points):
            raise StackingError(
                f"an activation of shape {tuple(x.shape)} does not run over the {self.batch} stacked rows (packed inputs?); "
                "use evaluation='scratch'"
            )
        return x.reshape(len(self.points), -1, width)

    def over_all_rows(self, ids: Tensor) -> Tensor:
        """Indices that all rows share, such as positions, repeated for every row: `(rows, …)`.

        Raises:
            StackingError: their first dimension does not run over the stacked rows.
        """
        if ids.ndim == 1:
            ids = ids[None]
        if not self.batch and len(ids) > 1:
            self.batch = len(ids)  # a soft prompt is looked up before the model itself is called
        if len(ids) not in (1, self.batch):
            raise StackingError(
                f"indices of shape {tuple(ids.shape)} do not run over the {self.batch} stacked rows; use "
                "evaluation='scratch'"
            )
        return ids.expand(self.batch, *ids.shape[1:]) if len(ids) == 1 and self.batch > 1 else ids

    def head_rows_on(self, device: torch.device) -> Tensor | None:
        """The asked rows on the device of the output embedding, which may not be that of the inputs."""
        return None if self.head_rows is None else self.head_rows.to(device)

    def base(self, weight: Weight) -> Tensor:
        """The weight at θ; of the output embedding only the asked rows."""
        rows = self._asked_rows(weight)
        return weight.tensor if rows is None else weight.tensor[rows]

    def each(self, vector: Weight) -> Tensor:
        """A vector at each point, to be broadcast over the rows: `(points, 1, n)`."""

        def make() -> Tensor:
            if vector.name is None:
                return self.base(vector).expand(len(self.points), 1, -1)
            out = vector.tensor.new_empty(len(self.points), *vector.tensor.shape)
            for point, at in zip(self.points, out, strict=True):
                stream, offset = key(point.seed, vector.name), point.offset_of(vector.name)
                kernel_for(at).perturb(vector.tensor, stream, offset, self.distribution, at)
            rows = self._asked_rows(vector)
            return (out if rows is None else out[:, rows])[:, None]

        return self.once((id(vector.tensor), "each"), make)

    def along(self, matrix: Weight, *, columns: bool) -> Tensor:
        """u (v with `columns`) of all seeds side by side, `(n, seeds · r)`."""
        index = self._index(matrix, columns=columns)
        return torch.cat([self._factors(matrix, seed, index, columns=columns) for seed in self.seeds()], dim=1)

    def across(self, matrix: Weight, *, columns: bool) -> Tensor:
        """offset/√r · u (v with `columns`) at each point, `(points, r, n)`."""

        def make() -> Tensor:
            assert matrix.name is not None
            index = self._index(matrix, columns=columns)
            factors = {seed: self._factors(matrix, seed, index, columns=columns).T for seed in self.seeds()}
            scale = rank(self.distribution) ** -0.5
            return torch.stack([factors[p.seed] * (p.offset_of(matrix.name) * scale) for p in self.points])

        return self.once((id(matrix.tensor), columns, "across"), make)

    def looked_up(self, matrix: Weight, ids: Tensor) -> Tensor:
        """u at the rows that each point looks up, `(points, n, r)`; ids are `(points, n)`."""
        found = [self._factors(matrix, p.seed, rows, columns=False) for p, rows in zip(self.points, ids, strict=True)]
        return torch.stack(found)

    def seeds(self) -> list[int]:
        """The points' seeds, each once."""
        return list(dict.fromkeys(point.seed for point in self.points))

    def seed_of_point(self, device: torch.device) -> Tensor:
        """The index in `seeds` of each point's seed, `(points,)`; copied to a device once, not for every product."""

        def make() -> Tensor:
            seeds = self.seeds()
            return torch.tensor([seeds.index(point.seed) for point in self.points], device=device)

        return self.once((device, "seed_of_point"), make)

    def _asked_rows(self, weight: Weight) -> Tensor | None:
        return self.head_rows_on(weight.tensor.device) if weight.is_head else None

    def _index(self, matrix: Weight, *, columns: bool) -> Tensor:
        """The indices of a matrix's columns or rows; of the output embedding only the asked rows."""
        rows = None if columns else self._asked_rows(matrix)
        if rows is not None:
            return rows
        shape = matrix.tensor.shape
        return torch.arange(matrix_width(shape) if columns else shape[0], device=matrix.tensor.device)

    def _factors(self, matrix: Weight, seed: int, index: Tensor, *, columns: bool) -> Tensor:
        """±1 in the parameter's dtype, `(n, r)`."""
        assert matrix.name is not None
        kernel, stream = kernel_for(matrix.tensor), key(seed, matrix.name)
        return kernel.factors(index, stream, rank(self.distribution), columns=columns).to(matrix.tensor.dtype)
