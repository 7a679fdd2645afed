"""Evaluating a model at θ + offset·z without writing θ, one point after the other; `zorl.twin` evaluates many at once.

Adding ε·z and subtracting it again does not restore θ in floating point (at ε = 1e-3, half of all float32 elements
differ afterwards). So θ is only read here: just before a module runs, its parameters at the point are written into a
scratch buffer that the next module reuses, and the module computes with those.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from zorl.directions import Distribution, key
from zorl.interrupts import uninterrupted
from zorl.kernels import kernel_for
from zorl.offload import ReplacedWeights, is_offloaded, stored, what_hooks_share
from zorl.parameters import ParameterSet
from zorl.probe import Point
from zorl.quantization import is_plain

T = TypeVar("T")
# The smallest parameters, up to this many bytes in all, are perturbed once per evaluation rather than once per forward. It
# spares tiny models the hooks, and generation a pass per token, for memory that no one notices.
HELD_BYTES = 4 << 20


class Evaluator(Protocol):
    """Runs forwards at points around θ."""

    @property
    def module(self) -> Any:
        """What a forward must call: a model that shares every tensor with the user's, in eval mode."""

    def evaluate(self, point: Point, forward: Callable[[], T], *, head_rows: Tensor | None = None) -> T:
        """The result of `forward()` with `module` at the point.

        Args:
            forward: calls `module`. It may be called twice, so it must have no other effect.
            head_rows: vocabulary rows, int64, shape `(n,)`. The output embedding computes only these, in this order, so
                that logits have shape `(..., n)`.
        """

    def copies(self, points: int) -> int:
        """How many of the given number of points one forward holds."""

    def evaluate_all(
        self, points: Sequence[Point], forward: Callable[[int], list[T]], *, head_rows: Tensor | None = None
    ) -> list[T]:
        """The results of a forward at each point, in the order of the points.

        Args:
            forward: takes a number of copies, runs `module` on a batch that is repeated that often along its first
                dimension (all of the batch, then all of it again, …), and returns one result per copy.
            head_rows: as for `evaluate`.
        """


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a module of the replica keeps one tuned parameter."""

    module: nn.Module
    attribute: str
    name: str  # canonical
    parameter: Tensor


class _Watched(Tensor):
    """A parameter outside its own module's forward, where no hook moves it to the point: it records that it was read there.

    Asking for its shape, dtype or device does not count as reading.
    """

    zorl_name: str
    zorl_read: set[str]

    @classmethod
    def of(cls, slot: _Slot, read: set[str]) -> _Watched:
        watched = slot.parameter.detach().as_subclass(cls)
        watched.zorl_name, watched.zorl_read = slot.name, read
        return watched

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if not isinstance(result, torch.dtype | torch.device | torch.Size | torch.layout | int):
            for tensor in _tensors((args, kwargs)):
                if isinstance(tensor, _Watched):
                    tensor.zorl_read.add(tensor.zorl_name)
        return result


class Scratch:
    """Evaluates a model module by module through a scratch buffer. θ keeps its bits, whatever happens.

    The hooks are on a replica: a copy of the module tree that shares all tensors with the model. So the model itself is
    neither hooked nor switched to eval mode, and other threads may read or run it meanwhile. Move the model to its device
    before: a buffer that is replaced in the model later is not replaced here.

    Args:
        model: any module; frozen parameters are used as they are.
        parameters: the tuned ones, taken from this model.
        distribution: of z.

    Raises:
        TypeError: the model has a tuned recurrent layer, whose weights are kept where hooks cannot reach them.
    """

    def __init__(self, model: nn.Module, parameters: ParameterSet, distribution: Distribution = "rademacher") -> None:
        self.parameters = parameters
        self.distribution = distribution
        self.module: Any = replica(model)
        self._slots: dict[nn.Module, list[_Slot]] = {}
        self._offloaded: list[ReplacedWeights] = []
        names = parameters.names()
        for module in self.module.modules():
            slots: list[_Slot] = []
            offloaded: dict[str, str] = {}
            for attribute, p in module._parameters.items():
                if p is None or (name := names.get(address(module, attribute))) is None:
                    continue
                if isinstance(module, nn.RNNBase):
                    raise TypeError(
                        f"{type(module).__name__} cannot be perturbed module by module; use zorl.MeZO with a closure"
                    )
                if is_offloaded(p):
                    offloaded[attribute] = name
                else:
                    slots.append(_Slot(module, attribute, name, p))
            if slots:
                self._slots[module] = slots
            if offloaded:
                self._offloaded.append(ReplacedWeights(module, offloaded, self._moved))
        self._held = self._small_parameters()
        self._head = output_embedding(self.module)
        self._rows_first = self._head is not None and gives_rows(self._head)  # else rows are taken from its output
        for module in {*self._slots, *([self._head] if self._head is not None else [])}:
            module.register_forward_pre_hook(self._enter, with_kwargs=True)
            module.register_forward_hook(self._leave, always_call=True)
        self._point: Point | None = None
        self._head_rows: Tensor | None = None
        self._reached: set[str] | None = set(self._held)  # None once a forward has shown that hooks reach the rest
        self._read: set[str] = set()  # parameters that something other than their own module has read
        self._buffers: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._replaced: list[list[tuple[nn.Module, str, Any]]] = []  # a frame per running module, innermost last

    def evaluate(self, point: Point, forward: Callable[[], T], *, head_rows: Tensor | None = None) -> T:
        """See `Evaluator.evaluate`."""
        with uninterrupted() as interruptible:
            while True:
                result: T = self._run(point, lambda: interruptible(forward), head_rows)
                # Weights that a parent module reads itself are kept at the point for the whole forward.
                missed, self._read = self._read - self._held, set()
                if self._reached is not None and point.offset != 0.0:
                    missed |= self.parameters.keys() - self._reached
                    self._reached = None
                if not missed:
                    return result
                self._held |= missed

    def copies(self, points: int) -> int:
        """How many points a forward holds: one."""
        return 1

    def evaluate_all(
        self, points: Sequence[Point], forward: Callable[[int], list[T]], *, head_rows: Tensor | None = None
    ) -> list[T]:
        """See `Evaluator.evaluate_all`: one point after the other."""
        return [self.evaluate(point, lambda: forward(1)[0], head_rows=head_rows) for point in points]

    @torch.no_grad()
    def _run(self, point: Point, forward: Callable[[], T], head_rows: Tensor | None) -> T:
        self._point, self._head_rows = point, head_rows
        self._replaced.append([])
        try:
            if point.offset != 0.0:
                kept: dict[str, Tensor] = {}
                for slot in (slot for slots in self._slots.values() for slot in slots):
                    if slot.name not in self._held:
                        self._replace(slot.module, slot.attribute, _Watched.of(slot, self._read))
                        continue
                    if slot.name not in kept:
                        kept[slot.name] = torch.empty_like(slot.parameter, memory_format=torch.contiguous_format)
                        self._perturb(slot.name, slot.parameter, kept[slot.name])
                    self._replace(slot.module, slot.attribute, kept[slot.name])
            return forward()
        finally:
            while self._replaced:
                self._restore()
            for offloaded in self._offloaded:
                offloaded.reset()
            self._point = self._head_rows = None

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a module runs: replaces its parameters by those at the point, in a frame of their own."""
        if self._point is None:
            return None
        self._replaced.append([])
        rows = self._head_rows if module is self._head and self._rows_first else None
        if rows is not None:
            return self._enter_head(module, rows)
        if self._point.offset == 0.0:
            return None
        slots = [slot for slot in self._slots.get(module, ()) if slot.name not in self._held]
        if self._reached is not None:
            self._reached.update(slot.name for slot in slots)
        if len(slots) == 1 and _gathers_rows(module, args, kwargs):
            return self._enter_embedding(module, slots[0], args, kwargs)
        views = self._allocate([(tuple(slot.parameter.shape), slot.parameter) for slot in slots])
        for slot, view in zip(slots, views, strict=True):
            self._perturb(slot.name, slot.parameter, view)
            self._replace(module, slot.attribute, view)
        return None

    def _enter_embedding(self, module: Any, slot: _Slot, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An embedding perturbs the rows that are looked up, not its whole table."""
        indices = args[0] if args else kwargs["input"]
        flat = indices.reshape(-1).to(slot.parameter.device)  # accelerate moves a module's inputs only after this
        (view,) = self._allocate([((flat.numel(), slot.parameter.shape[1]), slot.parameter)])
        self._perturb(slot.name, slot.parameter, view, flat)
        self._replace(module, slot.attribute, view)
        self._replaced[-1].append((module, "padding_idx", module.padding_idx))
        module.padding_idx = None  # it counts rows of the table, and only matters to a backward pass
        return (torch.arange(flat.numel(), device=flat.device).view(indices.shape),), {}

    def _enter_head(self, module: nn.Module, rows: Tensor) -> None:
        """The output embedding computes only the rows of the vocabulary that were asked for."""
        assert self._point is not None
        rows = rows.to(next(p for p in module._parameters.values() if p is not None).device)
        tuned = {slot.attribute: slot for slot in self._slots.get(module, ())}
        if self._reached is not None:
            self._reached.update(slot.name for slot in tuned.values())
        moved = [slot for slot in tuned.values() if slot.name not in self._held and self._point.offset != 0.0]
        views = self._allocate([((len(rows), *slot.parameter.shape[1:]), slot.parameter) for slot in moved])
        for slot, view in zip(moved, views, strict=True):
            self._perturb(slot.name, slot.parameter, view, rows)
            self._replace(module, slot.attribute, view)
        for attribute, parameter in list(module._parameters.items()):
            if parameter is not None and all(slot.attribute != attribute for slot in moved):
                self._replace(module, attribute, parameter[rows])

    def _moved(self, name: str, loaded: Tensor) -> Tensor | None:
        """Offloaded weights at the point. They are moved out of place: on the CPU what was loaded is θ itself."""
        if self._reached is not None:
            self._reached.add(name)
        if self._point is None or self._point.offset == 0.0:
            return None
        moved = torch.empty_like(loaded, memory_format=torch.contiguous_format)
        self._perturb(name, loaded, moved)
        return moved

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._point is None or len(self._replaced) < 2:
            return None
        depth = len(self._replaced)
        self._restore()
        if module is self._head and self._head_rows is not None and not self._rows_first:
            return output.index_select(-1, self._head_rows.to(output.device))
        for tensor in _tensors(output):
            # The module returned its own parameter, which the next module must not overwrite.
            if self._in_scratch(tensor, depth):
                del self._buffers[depth, tensor.dtype, tensor.device]
        return None

    def _perturb(self, name: str, parameter: Tensor, out: Tensor, rows: Tensor | None = None) -> None:
        assert self._point is not None
        stream, offset = key(self._point.seed, name), self._point.offset_of(name)
        kernel_for(parameter).perturb(parameter, stream, offset, self.distribution, out, rows)

    def _replace(self, module: nn.Module, attribute: str, tensor: Tensor) -> None:
        self._replaced[-1].append((module, attribute, module._parameters[attribute]))
        module._parameters[attribute] = tensor  # type: ignore[assignment]

    def _restore(self) -> None:
        """Undoes the innermost frame. An interrupt may come at any line, so an entry is dropped only once it is undone."""
        frame = self._replaced[-1]
        while frame:
            module, attribute, original = frame[-1]
            if attribute in module._parameters:
                module._parameters[attribute] = original
            else:
                setattr(module, attribute, original)
            frame.pop()
        self._replaced.pop()

    def _allocate(self, wanted: list[tuple[tuple[int, ...], Tensor]]) -> list[Tensor]:
        """Views of the scratch buffer for this nesting depth, which modules that run one after the other share."""
        views, used = [], dict.fromkeys(((like.dtype, like.device) for _, like in wanted), 0)
        total = dict(used)
        for shape, like in wanted:
            total[like.dtype, like.device] += torch.Size(shape).numel()
        for shape, like in wanted:
            kind = (like.dtype, like.device)
            place = (len(self._replaced), *kind)
            if place not in self._buffers or self._buffers[place].numel() < total[kind]:
                self._buffers[place] = torch.empty(total[kind], dtype=like.dtype, device=like.device)
            n = torch.Size(shape).numel()
            views.append(self._buffers[place][used[kind] : used[kind] + n].view(shape))
            used[kind] += n
        return views

    def _in_scratch(self, tensor: Tensor, depth: int) -> bool:
        buffer = self._buffers.get((depth, tensor.dtype, tensor.device))
        return buffer is not None and tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()

    def _small_parameters(self) -> set[str]:
        """The smallest parameters, as many as fit into `HELD_BYTES`."""
        held, budget = set(), HELD_BYTES
        here = {slot.name for slots in self._slots.values() for slot in slots}
        for name, tensor in sorted(self.parameters.items(), key=lambda item: item[1].numel()):
            if name not in here:
                continue
            budget -= tensor.numel() * tensor.element_size()
            if budget < 0:
                break
            held.add(name)
        return held


def replica(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer with the model, in eval mode."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=shared | what_hooks_share(model)).eval()


def address(module: nn.Module, attribute: str) -> int:
    """The key of a module's parameter in `ParameterSet.names`."""
    parameter = module._parameters[attribute]
    assert parameter is not None
    return stored(module, attribute).data_ptr() if is_offloaded(parameter) else id(parameter)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)


def output_embedding(module: nn.Module) -> nn.Module | None:
    """The module that holds a language model's output embedding, one row per token of the vocabulary; None for other models.

    None also where what the model calls so is another layer of its head, as in DeBERTa with `legacy=False`.
    """
    find: Any = getattr(module, "get_output_embeddings", None)  # as transformers' models have
    output: Any = None if find is None else find()
    if output is None:
        return None
    model: Any = module
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return output if getattr(output, "out_features", vocabulary) == vocabulary else None


def gives_rows(head: nn.Module) -> bool:
    """Whether an output embedding can compute single rows: a linear layer, neither offloaded nor quantised, can."""
    plain = all(is_plain(p) and not is_offloaded(p) for p in head.parameters())
    return type(head).forward is nn.Linear.forward and plain


def _gathers_rows(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a module is a plain look-up table. Subclasses may compute with the indices first, as OPT's positions do."""
    return type(module).forward is nn.Embedding.forward and module.max_norm is None and len(args) + len(kwargs) == 1
