"""Models larger than their device: weights that accelerate stores elsewhere and loads one module at a time.

With `device_map="auto"`, or after `accelerate.cpu_offload` or `disk_offload`, such a parameter is an empty shell on the meta
device except while its module runs. What is tuned is the stored tensor: an update is written there, and the next forward
loads what was written. Evaluation replaces the loaded weights, on the device that computes, and a stacked forward loads each
weight once for all its points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from torch import Tensor, nn


def is_offloaded(parameter: Tensor) -> bool:
    """Whether a parameter is a shell, whose values are stored elsewhere."""
    return parameter.device.type == "meta"


def stored(module: nn.Module, attribute: str) -> Tensor:
    """The values of a module's parameter, wherever they are; a copy if they are on disk.

    Raises:
        TypeError: it is a shell whose values accelerate does not know.
    """
    parameter = module._parameters[attribute]
    assert parameter is not None
    if not is_offloaded(parameter):
        return parameter
    hook = _mover(module)
    if hook is None or hook.weights_map is None:
        raise TypeError(
            f"a parameter of {type(module).__name__} is on the meta device, and accelerate has no values for it: load the model "
            "with its weights, by from_pretrained"
        )
    values: Tensor = hook.weights_map[attribute]
    return values


def named_stored(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Every parameter as (name, parameter, values), in the model's order. Tied weights appear once, under their first name."""
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
                if name not in tied:  # read from disk, tied weights have a new address each time
                    yield name, parameter, stored(module, attribute)
                continue
            values = stored(module, attribute)
            # Tied weights are several shells of the same values.
            place = (values.data_ptr(), values.shape) if is_offloaded(parameter) else id(values)
            if not is_offloaded(parameter) or place not in seen:
                yield name, parameter, values
            seen.add(place)


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()` with the values of offloaded parameters."""
    found: dict[str, Tensor] = dict(model.state_dict())
    for name, value in found.items():
        if is_offloaded(value):
            path, _, attribute = name.rpartition(".")
            found[name] = stored(model.get_submodule(path), attribute)
    return found


def can_be_written(module: nn.Module, attribute: str) -> bool:
    """Whether what is written into `stored` lasts. It does not for weights on disk, which are read anew each time."""
    parameter, hook = module._parameters[attribute], _mover(module)
    if parameter is None or not is_offloaded(parameter) or hook is None:
        return True
    stored_by_name = hook.weights_map
    if not isinstance(stored_by_name, PrefixedDataset) or not isinstance(
        stored_by_name.dataset, OffloadedWeightsLoader
    ):
        return True
    return stored_by_name.prefix + attribute in stored_by_name.dataset.state_dict


def computing_device(model: nn.Module) -> torch.device:
    """The device that a model's inputs belong on: that of its first module."""
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
    """A memo for `copy.deepcopy`, by which the copy's hooks share the model's weights instead of copying them."""
    hooks = [hook for module in model.modules() if (hook := _mover(module)) is not None]
    shared = [part for hook in hooks for part in (hook.weights_map, hook.tied_params_map) if part is not None]
    return {id(part): part for part in shared}


class ReplacedWeights:
    """Replaces a module's offloaded weights by others, from when accelerate has loaded them until it unloads them.

    Args:
        module: its hook is replaced, so it belongs to a replica.
        names: the canonical name of each attribute to replace.
        replacement: (canonical name, loaded weights) → what the module computes with; None: the loaded weights.
        discard: called with each replacement before the weights are unloaded.
    """

    def __init__(
        self,
        module: Any,
        names: Mapping[str, str],
        replacement: Callable[[str, Tensor], Tensor | None],
        discard: Callable[[Tensor], None] = lambda _: None,
    ) -> None:
        self._parameters = module._parameters
        self._names = names
        self._replacement, self._discard = replacement, discard
        self._shells = {attribute: module._parameters[attribute] for attribute in names}
        self._replaced: dict[str, tuple[Tensor, Tensor]] = {}  # (what was loaded, what stands for it)
        module._hf_hook = _Around(module._hf_hook, self._replace, self._restore)

    def reset(self) -> None:
        """Puts the shells back, which accelerate does not do after a forward that failed."""
        self._restore()
        self._parameters.update(self._shells)

    def _replace(self) -> None:
        for attribute, name in self._names.items():
            loaded = self._parameters[attribute]
            made = self._replacement(name, loaded)
            if made is not None:
                self._replaced[attribute] = loaded, made
                self._parameters[attribute] = made

    def _restore(self) -> None:
        for attribute, (loaded, made) in self._replaced.items():
            self._parameters[attribute] = loaded
            self._discard(made)
        self._replaced.clear()


class _Around(ModelHook):
    """accelerate's own hook, with a call after it has loaded a module's weights and another before it unloads them."""

    def __init__(self, inner: ModelHook, loaded: Callable[[], None], unloading: Callable[[], None]) -> None:
        self.inner, self.loaded, self.unloading = inner, loaded, unloading
        self.no_grad = inner.no_grad

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inputs = self.inner.pre_forward(module, *args, **kwargs)
        self.loaded()
        return inputs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.unloading()
        return self.inner.post_forward(module, output)


def _mover(module: nn.Module) -> AlignDevicesHook | None:
    """The hook that loads a module's own weights."""
    hook = getattr(module, "_hf_hook", None)
    hook = hook.inner if isinstance(hook, _Around) else hook
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((h for h in hooks if isinstance(h, AlignDevicesHook) and h.offload), None)
