"""Models larger than their device: weights that accelerate keeps elsewhere and brings in one module at a time.

With `device_map="auto"`, or after `accelerate.cpu_offload` and `disk_offload`, such a parameter is an empty shell on the meta
device but for the moment in which its module runs. What is tuned is the tensor that it is brought in from: an update is
written there, and the next forward brings in what was written. Evaluation moves the weights that were brought in, on the
device that computes, and each is loaded once for all the points of a stacked forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from torch import Tensor, nn


def is_offloaded(parameter: Tensor) -> bool:
    """Whether a parameter is a shell, whose values are elsewhere."""
    return parameter.device.type == "meta"


def stored(module: nn.Module, attribute: str) -> Tensor:
    """The values of a module's parameter, wherever they are. From disk they are a copy.

    Raises:
        TypeError: it is a shell, and nobody knows its values.
    """
    parameter = module._parameters[attribute]
    assert parameter is not None
    if not is_offloaded(parameter):
        return parameter
    hook = _mover(module)
    if hook is None or hook.weights_map is None:
        raise TypeError(
            f"a parameter of {type(module).__name__} is on the meta device, and accelerate does not bring it in: load the model "
            "with its weights, by from_pretrained"
        )
    values: Tensor = hook.weights_map[attribute]
    return values


def named_stored(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """(name, parameter, its values) of all parameters, in the model's order. Tied weights appear once, under their first name."""
    tied = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, "all_tied_weights_keys", None) or ()
    }
    seen: set[Any] = set()
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            name = f"{prefix}.{attribute}" if prefix else attribute
            seen.add(id(parameter))
            if is_offloaded(parameter) and not can_be_written(module, attribute):
                if name not in tied:  # each time they are read they have another address
                    yield name, parameter, stored(module, attribute)
                continue
            values = stored(module, attribute)
            # Tied weights are several shells of the same values.
            place = (values.data_ptr(), values.shape) if is_offloaded(parameter) else id(values)
            if not is_offloaded(parameter) or place not in seen:
                yield name, parameter, values
            seen.add(place)


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()` with the values of parameters that are away."""
    found: dict[str, Tensor] = dict(model.state_dict())
    for name, value in found.items():
        if is_offloaded(value):
            path, _, attribute = name.rpartition(".")
            found[name] = stored(model.get_submodule(path), attribute)
    return found


def can_be_written(module: nn.Module, attribute: str) -> bool:
    """Whether what is written into `stored` stays: not of weights that lie on disk, which are read anew each time."""
    parameter, hook = module._parameters[attribute], _mover(module)
    if (
        parameter is None
        or not is_offloaded(parameter)
        or hook is None
        or not isinstance(hook.weights_map, PrefixedDataset)
    ):
        return True
    source = hook.weights_map.dataset
    return not isinstance(source, OffloadedWeightsLoader) or hook.weights_map.prefix + attribute in source.state_dict


def computing_device(model: nn.Module) -> torch.device:
    """Where a model's inputs belong: the device of its first module."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            hook = _mover(module)
            if is_offloaded(parameter) and hook is not None and hook.execution_device is not None:
                return torch.device(hook.execution_device)
            if not is_offloaded(parameter):
                return parameter.device
    return torch.device("cpu")


def what_hooks_share(model: nn.Module) -> dict[int, Any]:
    """For `copy.deepcopy`: what a copy's hooks have in common with the model's, so that no weight exists twice."""
    hooks = [hook for module in model.modules() if (hook := _mover(module)) is not None]
    shared = [part for hook in hooks for part in (hook.weights_map, hook.tied_params_map) if part is not None]
    return {id(part): part for part in shared}


def move_when_brought_in(module: nn.Module, enter: Callable[[], None], leave: Callable[[], None]) -> None:
    """Calls `enter` when a module's weights have been brought in, and `leave` before they go."""
    module._hf_hook = _Around(module._hf_hook, enter, leave)


class _Around(ModelHook):
    def __init__(self, inner: ModelHook, enter: Callable[[], None], leave: Callable[[], None]) -> None:
        self.inner, self.enter, self.leave = inner, enter, leave
        self.no_grad = inner.no_grad

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        brought = self.inner.pre_forward(module, *args, **kwargs)
        self.enter()
        return brought

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.leave()
        return self.inner.post_forward(module, output)


def _mover(module: nn.Module) -> AlignDevicesHook | None:
    """What brings a module's own weights in."""
    hook = getattr(module, "_hf_hook", None)
    hook = hook.inner if isinstance(hook, _Around) else hook
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((h for h in hooks if isinstance(h, AlignDevicesHook) and h.offload), None)
