"""The operations that language models apply to weights, each computed at all points of a stacked forward at once.

For a linear layer and z = u vᵀ the output at θ + εz is x Wᵀ + ε (x v) uᵀ: the layer's own output and a term of rank one (EGGROLL,
Sarkar et al. 2025; MobiZO). So the matrix z is never made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zorl.stacked_points import StackedPoints, StackingError, Weight


class StackedParameter(Tensor):
    """A parameter on which operations act at all points at once.

    An operation that is not in the table below raises a `StackingError`, so that nothing is ever computed with unmoved weights.
    """

    zorl_stack: StackedPoints
    zorl_weight: Weight

    @classmethod
    def of(
        cls, stack: StackedPoints, parameter: Tensor, name: str | None, *, is_head: bool = False
    ) -> StackedParameter:
        """A parameter that stands for another; see `Weight`."""
        made = parameter.detach().as_subclass(cls)
        made.zorl_stack, made.zorl_weight = stack, Weight(parameter.detach(), name, is_head)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _OPERATIONS:
                return _OPERATIONS[func](*args, **kwargs)
            result = func(*args, **kwargs)
        is_property = getattr(func, "__name__", "") == "__get__"
        if not (_says_nothing_of_values(result) or (result is None and is_property)):
            raise _refused(getattr(func, "__name__", func), *args, *kwargs.values())
        return result


def _says_nothing_of_values(result: Any) -> bool:
    return isinstance(result, torch.dtype | torch.device | torch.Size | torch.layout | int | str) or (
        isinstance(result, tuple) and all(isinstance(item, int) for item in result)
    )


def _refused(operation: str, *arguments: Any) -> StackingError:
    names = (a.zorl_weight.name for a in arguments if isinstance(a, StackedParameter))
    return StackingError(
        f"the model applies {operation} to {next(names, None) or 'weights'!r}, which cannot be evaluated at several points "
        "at once; use evaluation='scratch'"
    )


def _stack_of(x: Tensor, *parameters: Tensor | None) -> StackedPoints:
    """The stack of the parameters that an operation applies to an activation.

    Raises:
        StackingError: the activation is itself a parameter.
    """
    if isinstance(x, StackedParameter):
        raise StackingError(
            f"the model computes with {x.zorl_weight.name!r} as an activation; use evaluation='scratch'"
        )
    return next(p.zorl_stack for p in parameters if isinstance(p, StackedParameter))


def _weight(parameter: Tensor) -> Weight:
    return parameter.zorl_weight if isinstance(parameter, StackedParameter) else Weight(parameter)


class _Product(NamedTuple):
    """The parts of x M + b at each point, where M has a term of its own at each."""

    matrix: Tensor  # (in, out)
    along: Tensor | None  # (in, seeds · r), the factors that x is multiplied by; None: M is the same at all points
    across: Tensor | None  # (points, r, out), the factors that make the output, times offset/√r
    each: Tensor | None  # (points, 1, out), the biases
    seed_of_point: Tensor | None  # (points,) where there are several seeds

    @classmethod
    def of(cls, stack: StackedPoints, weight: Weight, bias: Weight | None, *, transposed: bool) -> _Product:
        base = stack.base(weight)
        matrix = base.T if transposed else base
        each = None if bias is None else stack.each(bias)
        if weight.name is None:
            return cls(matrix, None, None, each, None)
        along = stack.along(weight, columns=transposed)
        seed_of_point = stack.seed_of_point(base.device) if len(stack.seeds()) > 1 else None
        return cls(matrix, along, stack.across(weight, columns=not transposed), each, seed_of_point)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: the term of each point is (x v)(offset·u)ᵀ."""
    return _product(x, weight, bias, transposed=True)


def _addmm(bias: Tensor, x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """b + x W, as in GPT-2's Conv1D: the term of each point is (x u)(offset·v)ᵀ."""
    if options:
        raise _refused(f"addmm with {', '.join(options)}", weight, bias)
    return _product(x, weight, bias, transposed=False)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor:
    """The points' terms and biases are written first and the product is added to them, which saves a pass over the output."""
    stack = _stack_of(x, weight, bias)
    w, b = _weight(weight), None if bias is None else _weight(bias)
    parts = stack.once(
        (id(w.tensor), None if b is None else id(b.tensor), transposed),
        lambda: _Product.of(stack, w, b, transposed=transposed),
    )
    rows = stack.stacked(x, x.shape[-1])
    points, n, width = rows.shape
    flat = rows.view(-1, width)
    if parts.along is not None and parts.across is not None:
        r = parts.across.shape[1]
        left = (flat @ parts.along).view(points, n, -1)
        if parts.seed_of_point is not None:  # each point takes its own of all seeds' factors
            left = left.view(points, n, -1, r)[torch.arange(points, device=x.device), :, parts.seed_of_point]
        out = torch.bmm(left, parts.across) if parts.each is None else torch.baddbmm(parts.each, left, parts.across)
    elif parts.each is None:  # an output embedding that is not tuned, and of which rows are asked
        return x @ parts.matrix
    else:
        out = parts.each.expand(-1, n, -1).clone(memory_format=torch.contiguous_format)  # other forwards read it too
    out.view(-1, out.shape[2]).addmm_(flat, parts.matrix)
    return out.view(*x.shape[:-1], -1)


def _embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Looked-up rows: the term of each point is (offset·u[ids]) vᵀ. `padding_idx` only matters to gradients."""
    stack, table = _stack_of(ids, weight), _weight(weight)
    if (args and args[0] is not None) or kwargs.get("max_norm") is not None:
        raise StackingError("an embedding with max_norm rescales its rows; use evaluation='scratch'")
    if table.name is None:
        return F.embedding(ids, table.tensor)
    ids = stack.over_all_rows(ids)
    out = F.embedding(ids, table.tensor)
    u = stack.looked_up(table, stack.stacked(ids, 1)[..., 0])
    wide = stack.stacked(out, out.shape[-1])
    return wide.baddbmm_(u, stack.across(table, columns=True)).view(out.shape)


def _layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """The normalised activation, then each point's own gain and bias."""
    stack = _stack_of(x, weight, bias)
    out = F.layer_norm(stack.stacked(x, x.shape[-1]), shape, None, None, eps)
    if weight is not None and bias is not None:
        return torch.addcmul(stack.each(_weight(bias)), out, stack.each(_weight(weight)), out=out).view(x.shape)
    if weight is not None:
        out.mul_(stack.each(_weight(weight)))
    if bias is not None:
        out.add_(stack.each(_weight(bias)))
    return out.view(x.shape)


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """The normalised activation, then each point's own gain."""
    stack = _stack_of(x, weight)
    out = F.rms_norm(stack.stacked(x, x.shape[-1]), shape, None, eps)
    return (out if weight is None else out * stack.each(_weight(weight))).view(x.shape)


def _elementwise(operation: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A product or sum, which commute, of an activation and a vector along its last dimension."""

    def apply(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        if options:
            raise _refused(f"{operation.__name__} with {', '.join(options)}", a, b)
        vector, x = (a, b) if isinstance(a, StackedParameter) else (b, a)
        if vector.ndim != 1 or not isinstance(x, Tensor) or x.shape[-1:] != vector.shape:
            raise StackingError(
                f"the model combines {_weight(vector).name!r} with something other than an activation of its width, which cannot "
                "be evaluated at several points at once; use evaluation='scratch'"
            )
        stack = _stack_of(x, vector)
        return operation(stack.stacked(x, x.shape[-1]), stack.each(_weight(vector))).view(x.shape)

    return apply


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
