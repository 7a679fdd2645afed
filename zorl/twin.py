"""Evaluating a model at many points in one forward: the batch is stacked, and low-rank directions never become matrices.

For a linear layer and z = u vᵀ the output at θ + εz is x Wᵀ + ε (x v) uᵀ: the layer's own output and a term of rank one (EGGROLL,
Sarkar et al. 2025; MobiZO). So one forward of a batch stacked P times, each part with a term of its own, evaluates P points: both
sides of a direction, or of several. θ is only read, and only once. A `generate` is stacked in the same way, with its cache.

While a forward runs, the tuned parameters of a replica are tensors that answer to the operations that language models apply
to weights: linear layers, GPT-2's Conv1D, look-ups, normalisations, products and sums with vectors. Any other use of a tuned
parameter is refused, so that nothing is ever computed with unmoved weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from zorl.directions import Distribution, key, matrix_width, rank
from zorl.interrupts import uninterrupted
from zorl.kernels import kernel_for
from zorl.offload import computing_device, is_offloaded, move_when_brought_in
from zorl.parameters import ParameterSet
from zorl.perturbation import Scratch, address, output_embedding, replica
from zorl.probe import Point
from zorl.quantization import is_plain

T = TypeVar("T")
# What a mixture of experts says of itself in its configuration: tokens leave their rows there.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class StackingError(ValueError):
    """A model does something with its weights or its rows that cannot be done at several points in one forward.

    Not a TypeError: Python's operators take that for a hint to try the other operand.
    """


class Twin:
    """Evaluates a model at P points in one forward of a batch that is stacked P times.

    The whole stack lies one point after the other along the first dimension of every activation. The replica shares all tensors
    with the model, which may go on answering others meanwhile, and whose weights may be write-protected.

    Args:
        model: any module whose tuned parameters are used as language models use theirs.
        parameters: the tuned ones, taken from this model.
        distribution: of z, low-rank.

    Raises:
        ValueError: the distribution is not low-rank.
        TypeError: the model is a mixture of experts, or holds a recurrent layer.
    """

    def __init__(self, model: nn.Module, parameters: ParameterSet, distribution: Distribution = "rank1") -> None:
        if not rank(distribution):
            raise ValueError(
                f"points are stacked along low-rank directions, such as 'rank1', not {distribution!r} ones"
            )
        experts = next((n for n in _EXPERTS if (getattr(getattr(model, "config", None), n, None) or 0) > 1), None)
        if experts is not None:
            raise TypeError(
                f"{type(model).__name__} is a mixture of experts ({experts}): its tokens leave their rows, so points cannot "
                "be stacked; use evaluation='scratch'"
            )
        self.parameters = parameters
        self.distribution = distribution
        self.module: Any = replica(model)
        names = parameters.names()
        head = output_embedding(self.module)
        if head is not None and not all(
            is_plain(p) and not is_offloaded(p) for p in head.parameters()
        ):  # called as it is
            head.register_forward_hook(self._take_rows)
            head = None
        self._slots: list[_Slot] = []
        self._away: list[_Slot] = []  # of weights that are brought in when their module runs
        for module in self.module.modules():
            away: list[_Slot] = []
            for attribute, parameter in module._parameters.items():
                name = None if parameter is None else names.get(address(module, attribute))
                if parameter is None or (name is None and module is not head):
                    continue
                if isinstance(module, nn.RNNBase):
                    raise TypeError(f"{type(module).__name__} computes out of sight; use zorl.MeZO with a closure")
                moved = _Moved.of(self, parameter, name, is_head=module is head)
                (away if is_offloaded(parameter) else self._slots).append(_Slot(module, attribute, parameter, moved))
            if away:
                move_when_brought_in(module, partial(self._enter_away, away), partial(self._leave_away, away))
                self._away += away
        self.points: tuple[Point, ...] = ()
        self.head_rows: Tensor | None = None
        self._batch = 0  # rows of the outer forward, all points together
        self._makers: dict[Any, Callable[[], Any]] = {}  # of what the operations asked for so far
        self._cache: dict[Any, Any] = {}  # the same, made for these points
        self._brought: dict[tuple[nn.Module, str], Tensor] = {}  # the weights of modules that are running
        self._depth = 0  # of models that are running, one inside the other
        # peft calls the model that it wraps past its hooks; what is inside that one notes the batch as well.
        for inner in {self.module, *(m for m in self.module.modules() if isinstance(m, PreTrainedModel))}:
            inner.register_forward_pre_hook(self._enter, with_kwargs=True)
            inner.register_forward_hook(self._leave, always_call=True)

    def copies(self, points: int) -> int:
        """How many points a forward holds."""
        return points

    def evaluate(self, point: Point, forward: Callable[[], T], *, head_rows: Tensor | None = None) -> T:
        """See `zorl.perturbation.Evaluator.evaluate`."""
        return self.evaluate_all([point], lambda _: [forward()], head_rows=head_rows)[0]

    @torch.no_grad()
    def evaluate_all(
        self, points: Sequence[Point], forward: Callable[[int], list[T]], *, head_rows: Tensor | None = None
    ) -> list[T]:
        """See `zorl.perturbation.Evaluator.evaluate_all`."""
        with uninterrupted() as interruptible:
            self.points, self.head_rows, self._batch, self._depth = tuple(points), head_rows, 0, 0
            if not all(slot.is_current for slot in self._slots):
                self._slots, self._makers = [slot.again(self) for slot in self._slots], {}
            moved = head_rows is not None or any(point.offset != 0.0 for point in points)
            try:
                if moved:
                    for slot in self._slots:
                        slot.module._parameters[slot.attribute] = slot.moved  # type: ignore[assignment]
                    # What stays for the whole forward comes first. Made between a forward's activations it would leave gaps in
                    # memory that the next ones do not fit into.
                    for name, make in list(self._makers.items()):
                        self._once(name, make)
                result: list[T] = interruptible(lambda: forward(len(points)))
                return result
            finally:
                for slot in self._slots:
                    slot.module._parameters[slot.attribute] = slot.parameter  # type: ignore[assignment]
                for slot in self._away:
                    slot.module._parameters[slot.attribute] = slot.parameter  # type: ignore[assignment]
                self._brought.clear()
                self.points, self.head_rows, self._cache = (), None, {}

    def _enter_away(self, slots: list[_Slot]) -> None:
        """The weights of a module have been brought in: they answer at all points until they go."""
        if not any(point.offset != 0.0 for point in self.points):
            return
        for slot in slots:
            brought = slot.module._parameters[slot.attribute]
            assert brought is not None
            self._brought[slot.module, slot.attribute] = brought
            moved = _Moved.of(self, brought, slot.moved.zorl_name, is_head=False)
            slot.module._parameters[slot.attribute] = moved  # type: ignore[assignment]

    def _leave_away(self, slots: list[_Slot]) -> None:
        for slot in slots:
            moved = slot.module._parameters[slot.attribute]
            brought = self._brought.pop((slot.module, slot.attribute), None)
            if brought is None:
                continue
            slot.module._parameters[slot.attribute] = brought  # type: ignore[assignment]
            # Nothing of it stays behind on the device that computes, nor is made before the next forward.
            for made in [name for name in self._cache if id(moved) in name]:
                del self._cache[made], self._makers[made]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = [kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None]
        tensor = next((t for t in (*named, *args) if isinstance(t, Tensor) and t.ndim), None)
        if tensor is not None:
            self._batch = len(tensor)
        self._depth += 1

    def _leave(self, *_: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if not self._depth:
            self._batch = 0

    def _take_rows(self, head: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
        return logits if self.head_rows is None else logits.index_select(-1, self.head_rows.to(logits.device))

    # --- what the operations need -------------------------------------------------------------------------------------

    def stacked(self, x: Tensor, width: int) -> Tensor:
        """An activation as `(points, n, width)`.

        Raises:
            StackingError: its first dimension does not run over the stacked rows.
        """
        if isinstance(x, _Moved):
            raise StackingError(f"the model computes with {x.zorl_name!r} as an activation; use evaluation='scratch'")
        if not x.ndim or not self._batch or len(x) % self._batch or self._batch % len(self.points):
            raise StackingError(
                f"an activation of shape {tuple(x.shape)} does not run over the {self._batch} stacked rows (packed inputs?); "
                "use evaluation='scratch'"
            )
        return x.reshape(len(self.points), -1, width)

    def over_all_rows(self, ids: Tensor) -> Tensor:
        """Indices that all rows share, such as positions, repeated for every row: `(rows, …)`."""
        if ids.ndim == 1:
            ids = ids[None]
        if not self._batch and len(ids) > 1:
            self._batch = len(ids)  # a soft prompt is looked up before the model itself is called
        if len(ids) not in (1, self._batch):
            raise StackingError(
                f"indices of shape {tuple(ids.shape)} do not run over the {self._batch} stacked rows; use "
                "evaluation='scratch'"
            )
        return ids.expand(self._batch, *ids.shape[1:]) if len(ids) == 1 and self._batch > 1 else ids

    def product(self, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> _Product:
        """What a product with a weight needs, made once an evaluation."""

        def make() -> _Product:
            base = self._base(weight)
            matrix = base.T if transposed else base
            each = None if bias is None else self.each(bias)
            if not isinstance(weight, _Moved) or weight.zorl_name is None:
                return _Product(matrix, None, None, each, None)
            seeds = self._seeds()
            index = torch.arange(matrix.shape[0], device=weight.device)
            along = torch.cat([self._factors(weight, seed, index, columns=transposed) for seed in seeds], dim=1)
            of_point = self._seed_of_point(weight.device)
            across = self.across(weight, columns=not transposed)
            return _Product(matrix, along, across, each, of_point if len(seeds) > 1 else None)

        found: _Product = self._once((id(weight), id(bias)), make)
        return found

    def _seeds(self) -> list[int]:
        """Of the points, each once."""
        return list(dict.fromkeys(point.seed for point in self.points))

    def _seed_of_point(self, device: torch.device) -> Tensor:
        """Which of `_seeds` each point has, `(points,)`; copied to a device once, not for every product."""

        def make() -> Tensor:
            seeds = self._seeds()
            return torch.tensor([seeds.index(point.seed) for point in self.points], device=device)

        return self._once((device, "seed_of_point"), make)

    def across(self, moved: _Moved, *, columns: bool) -> Tensor:
        """offset/√r · u (or v) at each point, `(points, r, n)`."""
        return self._once((id(moved), columns, "across"), lambda: self._across(moved, columns=columns))

    def _across(self, moved: _Moved, *, columns: bool) -> Tensor:
        name = moved.zorl_name
        assert name is not None
        index = torch.arange(matrix_width(moved.shape) if columns else moved.shape[0], device=moved.device)
        if not columns and moved.zorl_is_head and self.head_rows is not None:
            index = self.head_rows.to(moved.device)  # which may be another than that of the inputs
        by_seed = {p.seed: self._factors(moved, p.seed, index, columns=columns).T for p in self.points}
        scale = rank(self.distribution) ** -0.5
        return torch.stack([by_seed[point.seed] * (point.offset_of(name) * scale) for point in self.points])

    def looked_up(self, moved: _Moved, ids: Tensor) -> Tensor:
        """u at looked-up rows, `(points, n, r)`; ids are `(points, n)`."""
        found = [
            self._factors(moved, p.seed, of_point, columns=False) for p, of_point in zip(self.points, ids, strict=True)
        ]
        return torch.stack(found)

    def _factors(self, moved: _Moved, seed: int, index: Tensor, *, columns: bool) -> Tensor:
        """±1 in the parameter's dtype, `(n, r)`."""
        assert moved.zorl_name is not None
        kernel, stream = kernel_for(moved.zorl_base), key(seed, moved.zorl_name)
        return kernel.factors(index, stream, rank(self.distribution), columns=columns).to(moved.dtype)

    def each(self, vector: Tensor) -> Tensor:
        """A vector at each point, to be spread over the rows: `(points, 1, n)`."""

        def make() -> Tensor:
            base, rows = self._base(vector), self.head_rows
            if not isinstance(vector, _Moved) or vector.zorl_name is None:
                return base.expand(len(self.points), 1, -1)
            out = vector.zorl_base.new_empty(len(self.points), *vector.shape)
            for point, at in zip(self.points, out, strict=True):
                stream = key(point.seed, vector.zorl_name)
                offset = point.offset_of(vector.zorl_name)
                kernel_for(at).perturb(vector.zorl_base, stream, offset, self.distribution, at)
            return (out if rows is None or not vector.zorl_is_head else out[:, rows.to(out.device)])[:, None]

        return self._once((id(vector), "each"), make)

    def _base(self, tensor: Tensor) -> Tensor:
        """The weights themselves; of the head only the rows that were asked for."""
        if not isinstance(tensor, _Moved):
            return tensor
        if self.head_rows is None or not tensor.zorl_is_head:
            return tensor.zorl_base
        return tensor.zorl_base[self.head_rows.to(tensor.zorl_base.device)]

    def _once(self, name: Any, make: Callable[[], Any]) -> Any:
        """Made once an evaluation, however many tokens it generates."""
        if name not in self._cache:
            self._makers[name] = make
            self._cache[name] = make()
        return self._cache[name]


class _Slot(NamedTuple):
    """Where a module of the replica keeps a parameter."""

    module: nn.Module
    attribute: str
    parameter: Tensor
    moved: _Moved

    @property
    def is_current(self) -> bool:
        """Unless the model was converted or moved to another device since."""
        now, then = self.parameter.data, self.moved.zorl_base
        return now.data_ptr() == then.data_ptr() and now.dtype == then.dtype

    def again(self, twin: Twin) -> _Slot:
        moved = _Moved.of(twin, self.parameter, self.moved.zorl_name, is_head=self.moved.zorl_is_head)
        return self._replace(moved=moved)


class _Product(NamedTuple):
    """x M + b at each point, where M has a term of its own at each: its parts."""

    matrix: Tensor  # (in, out)
    along: Tensor | None  # (in, seeds · r), the factors that x is multiplied by; None: M is the same at all points
    across: Tensor | None  # (points, r, out), the factors that make the output, times offset/√r
    each: Tensor | None  # (points, 1, out), the biases
    seed_of_point: Tensor | None  # (points,) where there are several seeds


def twin_or_scratch(model: nn.Module, parameters: ParameterSet, distribution: Distribution) -> Twin | Scratch:
    """A `Twin` where the direction is low-rank and the model can be stacked, as a small forward shows; else a `Scratch`."""
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
    except (StackingError, RuntimeError, TypeError):  # or shapes that do not fit each other once they are stacked
        return Scratch(model, parameters, distribution)
    return twin


class _Moved(Tensor):
    """A parameter that operations see at all points at once."""

    zorl_twin: Twin
    zorl_base: Tensor  # the parameter, as a plain tensor
    zorl_name: str | None  # canonical; None: not tuned, but of the head, whose rows are chosen
    zorl_is_head: bool

    @classmethod
    def of(cls, twin: Twin, parameter: Tensor, name: str | None, *, is_head: bool) -> _Moved:
        moved = parameter.detach().as_subclass(cls)
        moved.zorl_twin, moved.zorl_base, moved.zorl_name = twin, parameter.detach(), name
        moved.zorl_is_head = is_head
        return moved

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _OPERATIONS:
                return _OPERATIONS[func](*args, **kwargs)
            result = func(*args, **kwargs)
        is_property = getattr(func, "__name__", "") == "__get__"
        if not (_says_nothing_of_values(result) or (result is None and is_property)):
            name = next((a.zorl_name for a in (*args, *kwargs.values()) if isinstance(a, _Moved)), "weights")
            raise StackingError(
                f"the model applies {getattr(func, '__name__', func)} to {name!r}, which cannot be evaluated at several points "
                "at once; use evaluation='scratch'"
            )
        return result


def _says_nothing_of_values(result: Any) -> bool:
    return isinstance(result, torch.dtype | torch.device | torch.Size | torch.layout | int | str) or (
        isinstance(result, tuple) and all(isinstance(item, int) for item in result)
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: the term of each point is (x v)(offset·u)ᵀ."""
    return _product(x, weight, bias, transposed=True)


def _addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """b + x W, as in GPT-2's Conv1D: the term of each point is (x u)(offset·v)ᵀ."""
    return _product(x, weight, bias, transposed=False)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor:
    """The points' terms and biases are written first, and the product is added to them: no pass over the output is extra."""
    twin = _twin_of(x, weight, bias)
    parts = twin.product(weight, bias, transposed=transposed)
    rows = twin.stacked(x, x.shape[-1])
    points, n, width = rows.shape
    flat = rows.view(-1, width)
    if parts.along is not None and parts.across is not None:
        r = parts.across.shape[1]
        left = (flat @ parts.along).view(points, n, -1)
        if parts.seed_of_point is not None:  # of all seeds' factors each point has its own
            left = left.view(points, n, -1, r)[torch.arange(points, device=x.device), :, parts.seed_of_point]
        out = torch.bmm(left, parts.across) if parts.each is None else torch.baddbmm(parts.each, left, parts.across)
    elif parts.each is None:  # a head of which rows are chosen, and which is not tuned
        return x @ parts.matrix
    else:
        out = parts.each.expand(-1, n, -1).clone(memory_format=torch.contiguous_format)  # kept for other forwards
    out.view(-1, out.shape[2]).addmm_(flat, parts.matrix)
    return out.view(*x.shape[:-1], -1)


def _embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Looked-up rows: the term of each point is (offset·u[ids]) vᵀ. Gradients are what `padding_idx` is for."""
    twin = _twin_of(weight)
    if (args and args[0] is not None) or kwargs.get("max_norm") is not None:
        raise StackingError("an embedding with max_norm rescales its rows; use evaluation='scratch'")
    assert isinstance(weight, _Moved)
    if weight.zorl_name is None:
        return F.embedding(ids, weight.zorl_base)
    ids = twin.over_all_rows(ids)
    out = F.embedding(ids, weight.zorl_base)
    u = twin.looked_up(weight, twin.stacked(ids, 1)[..., 0])
    wide = twin.stacked(out, out.shape[-1])
    return wide.baddbmm_(u, twin.across(weight, columns=True)).view(out.shape)


def _layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """The normalised activation, then each point's own gain and bias."""
    twin = _twin_of(x, weight, bias)
    out = F.layer_norm(twin.stacked(x, x.shape[-1]), shape, None, None, eps)
    if weight is not None and bias is not None:
        return torch.addcmul(twin.each(bias), out, twin.each(weight), out=out).view(x.shape)
    if weight is not None:
        out.mul_(twin.each(weight))
    if bias is not None:
        out.add_(twin.each(bias))
    return out.view(x.shape)


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    twin = _twin_of(x, weight)
    out = F.rms_norm(twin.stacked(x, x.shape[-1]), shape, None, eps)
    return (out if weight is None else out * twin.each(weight)).view(x.shape)


def _elementwise(operation: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A product or sum of an activation and a vector along its last dimension."""

    def apply(a: Tensor, b: Tensor) -> Tensor:
        moved, other = (a, b) if isinstance(a, _Moved) else (b, a)
        assert isinstance(moved, _Moved)
        twin = moved.zorl_twin
        if (
            moved.ndim != 1
            or not isinstance(other, Tensor)
            or isinstance(other, _Moved)
            or other.shape[-1:] != moved.shape
        ):
            raise StackingError(
                f"the model combines {moved.zorl_name!r} with something else than an activation of its width, which cannot be "
                "evaluated at several points at once; use evaluation='scratch'"
            )
        wide, each = twin.stacked(other, other.shape[-1]), twin.each(moved)
        result = operation(each, wide) if moved is a else operation(wide, each)
        return result.view(other.shape)

    return apply


def _twin_of(*tensors: Tensor | None) -> Twin:
    return next(tensor.zorl_twin for tensor in tensors if isinstance(tensor, _Moved))


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.mul: _elementwise(torch.mul),
    Tensor.mul: _elementwise(torch.mul),
    torch.add: _elementwise(torch.add),
    Tensor.add: _elementwise(torch.add),
}
