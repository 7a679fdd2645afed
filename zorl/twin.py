"""Evaluating a model at many points in one forward of a batch that is stacked, along directions that never become matrices.

One forward of a batch that is stacked P times, each part with a term of its own in every layer (`zorl.stacked_operations`),
evaluates P points: both sides of a direction, or of several. θ is read once for all of them and never written. A `generate` is
stacked in the same way, with its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zorl.directions import Distribution, rank
from zorl.interrupts import uninterrupted
from zorl.offload import ReplacedWeights, computing_device, is_offloaded
from zorl.parameters import ParameterSet
from zorl.perturbation import Scratch, address, gives_rows, output_embedding, replica
from zorl.probe import Point
from zorl.stacked_operations import StackedParameter
from zorl.stacked_points import StackedPoints, StackingError

T = TypeVar("T")
# Where a configuration counts the experts of a mixture, whose tokens leave their rows.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Twin:
    """Evaluates a model at P points in one forward of a batch that is stacked P times.

    The stack lies one point after the other along the first dimension of every activation. The replica shares all tensors
    with the model, which may meanwhile answer others, and whose weights may be write-protected. Move the model to its device
    before, as for `Scratch`.

    Args:
        model: any module that uses its tuned parameters as language models use theirs.
        parameters: the tuned ones, taken from this model.
        distribution: of z, low-rank.

    Raises:
        ValueError: the distribution is not low-rank.
        StackingError: the model is a mixture of experts, or has a tuned recurrent layer.
    """

    def __init__(self, model: nn.Module, parameters: ParameterSet, distribution: Distribution = "rank1") -> None:
        if not rank(distribution):
            raise ValueError(
                f"points are stacked along low-rank directions, such as 'rank1', not {distribution!r} ones"
            )
        experts = next((n for n in _EXPERTS if (getattr(getattr(model, "config", None), n, None) or 0) > 1), None)
        if experts is not None:
            raise StackingError(
                f"{type(model).__name__} is a mixture of experts ({experts}): its tokens leave their rows, so points cannot "
                "be stacked; use evaluation='scratch'"
            )
        self.parameters = parameters
        self.distribution = distribution
        self.module: Any = replica(model)
        self._stack = StackedPoints(distribution)
        self._slots: list[_Slot] = []
        self._offloaded: list[ReplacedWeights] = []
        self._depth = 0  # of models that are running, one inside the other
        names = parameters.names()
        head = output_embedding(self.module)
        if head is not None and not gives_rows(head):
            head.register_forward_hook(self._take_rows)
            head = None
        for module in self.module.modules():
            offloaded: dict[str, str] = {}
            for attribute, parameter in module._parameters.items():
                name = None if parameter is None else names.get(address(module, attribute))
                if parameter is None or (name is None and module is not head):
                    continue
                if isinstance(module, nn.RNNBase):
                    raise StackingError(
                        f"{type(module).__name__} computes where its operations cannot be seen; use zorl.MeZO with a closure"
                    )
                if is_offloaded(parameter):
                    assert name is not None
                    offloaded[attribute] = name
                else:
                    stacked = StackedParameter.of(self._stack, parameter, name, is_head=module is head)
                    self._slots.append(_Slot(module, attribute, parameter, stacked))
            if offloaded:
                self._offloaded.append(ReplacedWeights(module, offloaded, self._stacked, self._forget))
        # peft calls the model that it wraps past its hooks, so the models inside note the batch as well.
        for inner in {self.module, *(m for m in self.module.modules() if isinstance(m, PreTrainedModel))}:
            inner.register_forward_pre_hook(self._enter, with_kwargs=True)
            inner.register_forward_hook(self._leave, always_call=True)

    def copies(self, points: int) -> int:
        """How many points a forward holds: all."""
        return points

    def evaluate(self, point: Point, forward: Callable[[], T], *, head_rows: Tensor | None = None) -> T:
        """See `zorl.perturbation.Evaluator.evaluate`."""
        return self.evaluate_all([point], lambda _: [forward()], head_rows=head_rows)[0]

    @torch.no_grad()
    def evaluate_all(
        self, points: Sequence[Point], forward: Callable[[int], list[T]], *, head_rows: Tensor | None = None
    ) -> list[T]:
        """See `zorl.perturbation.Evaluator.evaluate_all`.

        Raises:
            StackingError: the model uses a tuned parameter, or lays out its rows, in a way that cannot be stacked.
        """
        with uninterrupted() as interruptible:
            self._stack.start(points, head_rows)
            self._depth = 0
            if not all(slot.is_current for slot in self._slots):
                self._slots = [slot.renewed(self._stack) for slot in self._slots]
                self._stack.forget_all()
            try:
                if head_rows is not None or self._stack.any_moved:
                    for slot in self._slots:
                        slot.module._parameters[slot.attribute] = slot.stacked  # type: ignore[assignment]
                    self._stack.make_ahead()
                result: list[T] = interruptible(lambda: forward(len(points)))
                return result
            finally:
                for slot in self._slots:
                    slot.module._parameters[slot.attribute] = slot.parameter  # type: ignore[assignment]
                for offloaded in self._offloaded:
                    offloaded.reset()
                self._stack.finish()

    def _stacked(self, name: str, loaded: Tensor) -> Tensor | None:
        return StackedParameter.of(self._stack, loaded, name) if self._stack.any_moved else None

    def _forget(self, stacked: Tensor) -> None:
        """Keeps nothing of an offloaded weight on the device that computes."""
        assert isinstance(stacked, StackedParameter)
        self._stack.forget(stacked.zorl_weight)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = [kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None]
        tensor = next((t for t in (*named, *args) if isinstance(t, Tensor) and t.ndim), None)
        if tensor is not None:
            self._stack.batch = len(tensor)
        self._depth += 1

    def _leave(self, *_: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if not self._depth:
            self._stack.batch = 0

    def _take_rows(self, head: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
        rows = self._stack.head_rows_on(logits.device)
        return logits if rows is None else logits.index_select(-1, rows)


class _Slot(NamedTuple):
    """Where a module of the replica keeps a parameter, and what stands there during an evaluation."""

    module: nn.Module
    attribute: str
    parameter: Tensor
    stacked: StackedParameter

    @property
    def is_current(self) -> bool:
        """False once the model has been converted or moved to another device."""
        now, then = self.parameter.data, self.stacked.zorl_weight.tensor
        return now.data_ptr() == then.data_ptr() and now.dtype == then.dtype

    def renewed(self, stack: StackedPoints) -> _Slot:
        weight = self.stacked.zorl_weight
        return self._replace(stacked=StackedParameter.of(stack, self.parameter, weight.name, is_head=weight.is_head))


def twin_or_scratch(model: nn.Module, parameters: ParameterSet, distribution: Distribution) -> Twin | Scratch:
    """A `Twin` where the directions are low-rank and a small forward shows that the model can be stacked; else a `Scratch`."""
    if not rank(distribution):
        return Scratch(model, parameters, distribution)
    try:
        twin = Twin(model, parameters, distribution)
        tokens = torch.zeros(2, 4, dtype=torch.long, device=computing_device(model))
        points = [Point(0, 1e-3), Point(0, -1e-3)]

        def forward(copies: int) -> list[None]:
            batch = tokens.repeat(copies, 1)
            twin.module(input_ids=batch, attention_mask=torch.ones_like(batch))
            return [None] * copies

        twin.evaluate_all(points, forward)
    # A StackingError, which is a ValueError; shapes that do not fit once they are stacked; a model that takes other inputs; or no
    # memory even for this, and a Scratch needs less.
    except (ValueError, TypeError, RuntimeError):
        return Scratch(model, parameters, distribution)
    return twin
