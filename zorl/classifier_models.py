"""Sequence-classification models: which models are, the names of their classes, and what of them a checkpoint lacks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from zorl.directions import canonical_name
from zorl.encoding import pad_token_id
from zorl.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def is_classifier(module: nn.Module) -> bool:
    """Whether the model, or what an adapter wraps, is one of transformers' sequence-classification models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as MODELS

    names = set(MODELS.values())
    return any(kind.__name__ in names for inner in module.modules() for kind in type(inner).__mro__)


def has_new_head(model: nn.Module) -> bool:
    """Whether the head was made when the model was loaded: the checkpoint, if there is one, is of another kind of model.

    Ask before the model is saved, which makes it one of its own kind.
    """
    base = unwrapped(model)
    return type(base).__name__ not in (base.config.architectures or [])


def class_names(config: Any, labels: Iterable[Any] = (), *, new_head: bool = False) -> tuple[str, ...]:
    """The names of a model's classes, in the order of its logits.

    They come from its `id2label`. Where that only says LABEL_0, LABEL_1, …, the names are the distinct labels of the data,
    sorted, for a new head, and 0, 1, … for a trained one.
    """
    named = [str(config.id2label[i]) for i in range(config.num_labels)]
    if named != [f"LABEL_{i}" for i in range(config.num_labels)]:
        return tuple(named)
    return (sorted_labels(labels) if new_head else ()) or tuple(map(str, range(config.num_labels)))


def sorted_labels(labels: Iterable[Any]) -> tuple[str, ...]:
    """The distinct labels as text: whole numbers sorted by value, others alphabetically."""
    names = {str(label) for label in labels}
    numbers = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=int) if numbers else sorted(names))


def prepare_classifier(
    model: nn.Module, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, labels: Iterable[Any] = ()
) -> Prompt:
    """The prompt with the names of the classes, which are also written into the model's configuration and saved with it.

    A configuration without a padding token gets one: a decoder finds the end of a text by it, and without it reads only one
    text at a time.

    Args:
        labels: those of the training rows, for a new head whose classes have no names yet.

    Raises:
        ValueError: the model has another number of classes, or the same in another order; or the prompt has label words.
    """
    base = unwrapped(model)
    config: Any = base.config
    if prompt.label_words is not None:
        raise ValueError(
            f"the prompt has label words, and {type(base).__name__} is a sequence-classification model: leave them and "
            "{mask} out, or load a language model"
        )
    if prompt.classes is None:
        names = class_names(config, labels, new_head=has_new_head(model))
        check_number(names, config)
        prompt = replace(prompt, classes=names)
    check_number(prompt.labels, config)
    check_order(prompt.labels, config)
    config.id2label = dict(enumerate(prompt.labels))
    config.label2id = {name: i for i, name in enumerate(prompt.labels)}
    if config.get_text_config().pad_token_id is None:
        config.pad_token_id = config.get_text_config().pad_token_id = pad_token_id(tokenizer)
    return prompt


def check_number(classes: Sequence[str], config: PreTrainedConfig) -> None:
    """Raises ValueError unless there are at least two classes, and as many as the model has logits."""
    if len(classes) != config.num_labels or len(classes) < 2:
        raise ValueError(
            f"the model's head has {config.num_labels} outputs, and there are {len(classes)} classes "
            f"({', '.join(map(repr, classes[:5]))}); give one name for each output, and at least two"
        )


def check_order(classes: Sequence[str], config: Any) -> None:
    """Raises ValueError if these are the model's own classes in another order, which would give each output another's name."""
    named = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    if tuple(classes) != named and sorted(classes) == sorted(named):
        raise ValueError(
            f"the classes {', '.join(map(repr, classes))} are the model's own in another order than its outputs have: give them "
            f"as {', '.join(map(repr, named))}, or leave them out"
        )


def parameters_not_in_checkpoint(model: nn.Module) -> set[str]:
    """Canonical names of the parameters of a classifier that its checkpoint does not hold, such as a new head's.

    The head is always among them, since a linear probe may write it. Only the names in the checkpoint are read, not its values.
    """
    from transformers.utils import logging

    base: Any = unwrapped(model)
    missing: set[str] = set()
    if has_new_head(base) and base.config._name_or_path:
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it said so when the model was loaded
        config = copy.deepcopy(base.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # its values are of no interest here, and would be quantised
        try:
            _, info = type(base).from_pretrained(
                base.config._name_or_path,
                config=config,
                use_safetensors=True,
                output_loading_info=True,
                device_map="meta",
            )
        except OSError:  # the checkpoint is gone, or is pickled
            return {canonical_name(name) for name, _ in model.named_parameters()}
        finally:
            logging.set_verbosity(verbosity)
        missing = set(info["missing_keys"])
    head = last_linear(model, base.config.num_labels)
    found = set() if head is None else {id(parameter) for parameter in head.parameters()}
    # peft keeps the head as it was beside the one that it tunes
    found |= {
        id(p) for name, p in base.named_parameters() if canonical_name(name).replace("original_module.", "") in missing
    }
    return {canonical_name(name) for name, parameter in model.named_parameters() if id(parameter) in found}


def unwrapped(model: nn.Module) -> Any:
    """The transformers model that an adapter wraps."""
    from peft import PeftModel  # slow

    return model.get_base_model() if isinstance(model, PeftModel) else model


def last_linear(module: nn.Module, outputs: int) -> nn.Linear | None:
    """The last linear layer with this number of outputs: a head's, or peft's copy of it where there is one.

    The matrices of an adapter on the head are none: they may have as many outputs.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # slow

    adapted = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    parts = [part for layer in adapted for name, part in layer.named_children() if name != "base_layer"]
    added = {id(inner) for part in parts for inner in part.modules()}
    linear = [m for m in module.modules() if isinstance(m, nn.Linear) and id(m) not in added]
    found = [layer for layer in linear if layer.out_features == outputs]
    return found[-1] if found else None
