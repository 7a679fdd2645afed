"""GPUs for machines that have none: tensors on the CPU that say they are elsewhere, and refuse to be mixed.

Values are real, so whole runs work. An operation on tensors of two devices raises, as on a GPU; so does numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

CPU = torch.device("cpu")
# They say or set something about a tensor, whatever its device.
_NO_ARITHMETIC = {
    "untyped_storage", "data_ptr", "size", "dim", "stride", "element_size", "numel", "storage_offset", "is_floating_point",
    "is_complex", "is_contiguous", "__len__", "__hash__", "__repr__", "__set__", "requires_grad_", "as_subclass",
    "_has_compatible_shallow_copy_type", "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "copy_",
    "expand_as", "view_as",
}  # fmt: skip
_FACTORIES = {"empty", "zeros", "ones", "full", "arange", "tensor", "randn", "rand", "randint", "randperm", "linspace", "eye",
              "as_tensor"}  # fmt: skip


class DeviceError(RuntimeError):
    """An operation on tensors of several devices."""


class _Pretending(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self._device: dict[int, torch.device] = {}  # by storage, which views share
        self._kept: list[Any] = []  # so that no storage is freed, and its address taken by another

    def of(self, tensor: Tensor) -> torch.device:
        with torch._C.DisableTorchFunction():
            return tensor.device if tensor.is_meta else self._device.get(tensor.untyped_storage()._cdata, CPU)

    def put(self, tensor: Tensor, device: torch.device) -> Tensor:
        with torch._C.DisableTorchFunction():
            if not tensor.is_meta and device.type != "meta":
                self._device[tensor.untyped_storage()._cdata] = device
                self._kept.append(tensor.untyped_storage())
        return tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            what = getattr(func.__self__, "__name__", "")
            found = {"device": lambda t: t, "is_cuda": lambda t: t.type == "cuda", "is_cpu": lambda t: t.type == "cpu"}
            return found[what](self.of(args[0])) if what in found else func(*args, **kwargs)
        if name in _NO_ARITHMETIC:
            return func(*args, **kwargs)
        if name in ("numpy", "__array__") and self.of(args[0]) != CPU:
            raise TypeError(f"a tensor on {self.of(args[0])} has no numpy array")
        if name in ("to", "cpu", "cuda"):
            return self._moved(name, func, args, kwargs)
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        if name in ("__getitem__", "__setitem__"):
            for index in (
                given[1:] if name == "__getitem__" else [t for t in tree_flatten(args[1])[0] if isinstance(t, Tensor)]
            ):
                if self.of(index) not in (CPU, self.of(args[0])):
                    raise DeviceError(f"a tensor on {self.of(args[0])} is indexed with one on {self.of(index)}")
            return self._on(func(*args, **kwargs), self.of(args[0]))
        if name == "__deepcopy__":
            return self._on(func(*args, **kwargs), self.of(args[0]))
        if name in _FACTORIES or "device" in kwargs or name.endswith("_like") or name.startswith("new_"):
            asked = kwargs.pop("device", None)
            device = _device(asked) if asked is not None else self.of(given[0]) if given else CPU
            real = {"device": "meta" if device.type == "meta" else "cpu"} if asked is not None or given else {}
            return self._on(func(*args, **{**kwargs, **real}), device)
        places = {self.of(t) for t in given if t.ndim}
        if len(places) > 1:
            raise DeviceError(f"{name} of tensors on {' and '.join(sorted(map(str, places)))}")
        scalars = {self.of(t) for t in given if not t.ndim} - {CPU}
        if places and not scalars <= places:
            raise DeviceError(f"{name} of tensors on {places} and {scalars}")
        return self._on(func(*args, **kwargs), next(iter(places or scalars), CPU))

    def _on(self, result: Any, device: torch.device) -> Any:
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, Tensor):
                self.put(tensor, device)
        return result

    def _moved(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        tensor, *rest = args
        kwargs.pop("non_blocking", None)
        target = kwargs.pop("device", None) if name == "to" else name
        others = [kwargs.pop("dtype")] if kwargs.get("dtype") is not None else []
        for value in rest:
            if isinstance(value, Tensor):
                target, others = self.of(value), [value.dtype]
            elif isinstance(value, str | torch.device):
                target = value
            elif isinstance(value, torch.dtype):
                others = [value]
        device = self.of(tensor) if target is None else _device(target)
        if "meta" in (device.type, self.of(tensor).type):
            return tensor.to("meta", *others) if device.type == "meta" else func(*args, **kwargs)
        made = Tensor.to(tensor, *others) if others else tensor
        if device == self.of(tensor):
            return self.put(made, device)
        return self.put(made.clone() if made is tensor else made, device)


def _device(name: Any) -> torch.device:
    device = torch.device(name)
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device


@contextmanager
def pretended_devices() -> Iterator[None]:
    """`cuda:0`, `cuda:1` and so on exist in the block. Directions come from the reference kernel: Triton would look for a GPU."""
    with patch("zorl.kernels._HAS_TRITON", False), _Pretending():
        yield
