"""The model that a run tunes: loaded or given, perhaps with an adapter, and how it differs from its base checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from zorl.adapters import adapt, is_peft, prepare
from zorl.classifier_models import has_new_head, is_classifier, parameters_not_in_checkpoint
from zorl.config import MeZOConfig
from zorl.directions import canonical_name
from zorl.models import load_model
from zorl.parameters import ParameterSet, base_sha256, select


@dataclass(frozen=True, slots=True)
class TunedModel:
    """A model, what is tuned of it, and how much of it its base checkpoint holds.

    Attributes:
        module: the model, within a PeftModel where an adapter is tuned.
        base_name: name or path of the base checkpoint; empty for a model made in memory.
        given_by_name: whether the model was loaded by that name. An object may have been changed since.
        parameters: what is tuned.
        added: canonical names of the parameters that were put in to be tuned: an adapter's, or an untied output embedding's.
        new_head: whether it is a classifier whose head was made when the model was loaded.
        not_in_checkpoint: canonical names of a classifier's parameters that its checkpoint does not hold.
    """

    module: Any
    base_name: str
    given_by_name: bool
    parameters: ParameterSet
    added: frozenset[str]
    new_head: bool
    not_in_checkpoint: frozenset[str]

    @classmethod
    def prepare(cls, model: Any, args: MeZOConfig, classes: Sequence[str] | None, peft_config: Any) -> TunedModel:
        """Loads a model that is given by name, and puts in what is to be tuned.

        Args:
            model: a name or path, a model, or a PeftModel.
            args: the settings of the run.
            classes: those of a classifier, by their prompt.
            peft_config: an adapter to tune; None for what `args.tune` says.

        Raises:
            ValueError: two arguments both say what is tuned or how the model is loaded, or it does not suit them.
            OSError: there is no such model.
        """
        given_by_name = isinstance(model, str)
        base_name = model if given_by_name else str(getattr(model.config, "_name_or_path", "") or "")
        if args.quantize is not None and not given_by_name:
            raise ValueError(
                f"quantize={args.quantize!r} is for a model given by name: quantise this one as you load it"
            )
        module: Any = model
        if given_by_name:
            placed = {} if args.device_map is None else {"device_map": args.device_map}
            module = load_model(model, args.dtype, classes=classes, quantize=args.quantize, **placed)
        in_base = {id(parameter) for parameter in module.parameters()}
        if peft_config is not None:
            if is_peft(module):
                raise ValueError("the model is a PeftModel already: leave peft_config out, or pass the base model")
            if args.tune != "full":
                raise ValueError(f"peft_config and tune={args.tune!r} both say what is tuned: leave one of them out")
            module = adapt(module, peft_config)
        module = prepare(module, args)
        classifier = is_classifier(module)
        return cls(
            module=module,
            base_name=base_name,
            given_by_name=given_by_name,
            parameters=ParameterSet(select(module, args.parameters)),
            added=frozenset(canonical_name(n) for n, p in module.named_parameters() if id(p) not in in_base),
            new_head=classifier and has_new_head(module),
            not_in_checkpoint=frozenset(parameters_not_in_checkpoint(module) if classifier else ()),
        )

    @property
    def dtype(self) -> str:
        """The base model's, such as `"float32"`."""
        return str(self.module.dtype).removeprefix("torch.")

    def not_in_base(self, classes: Sequence[str] | None) -> set[str]:
        """What the base checkpoint does not hold: an adapter, a new or untied head, and what was changed in memory.

        A model given as an object is compared with its checkpoint, which is loaded for that: no value is saved twice.

        Args:
            classes: those of a classifier.
        """
        first = {*self.not_in_checkpoint, *self.added}
        if peft_to_json(self.module) is not None:
            return first | set(self.parameters)
        rest = {name: tensor for name, tensor in self.parameters.items() if name not in first}
        if rest and not self.given_by_name:
            first |= changed_since_saved(rest, self.base_name, self.dtype, classes)
        return first

    def header(self) -> dict[str, Any]:
        """What a trajectory's header says of how the base is rebuilt."""
        adapter = peft_to_json(self.module)
        return {
            "model": self.base_name,
            "peft": adapter,
            "dtype": None if adapter is None else self.dtype,  # else it is that of what is tuned
            "untied": True if adapter is None and self.added else None,
            "base_sha256": base_sha256(self.module),
        }


def changed_since_saved(
    tensors: Mapping[str, Tensor], name: str, dtype: str, classes: Sequence[str] | None
) -> set[str]:
    """Names of a model's tensors that its checkpoint does not hold with these very values: all where none can be loaded.

    Args:
        tensors: by canonical name.
        name: name or path of the checkpoint; empty for a model made in memory.
        dtype: that of the model.
        classes: those of a classifier.
    """
    try:
        loaded = load_model(name, dtype, classes=classes) if name else torch.nn.Module()
    except (OSError, ValueError, ImportError):
        return set(tensors)
    saved = {canonical_name(key): tensor for key, tensor in loaded.named_parameters()}
    return {
        key
        for key, tensor in tensors.items()
        if key not in saved or saved[key].dtype != tensor.dtype or not torch.equal(saved[key], tensor.cpu())
    }


def peft_to_json(model: Any) -> dict[str, Any] | None:
    """The adapter's configuration as JSON values; None for a model without an adapter."""
    configs = getattr(model, "peft_config", None)  # transformers models may carry one as well as PeftModel
    if not configs:
        return None

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, set | tuple | list):
            return sorted(map(plain, value)) if isinstance(value, set) else [plain(v) for v in value]
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        return value if isinstance(value, str | int | float | bool | None) else None

    result: dict[str, Any] = plain(next(iter(configs.values())).to_dict())
    return result
