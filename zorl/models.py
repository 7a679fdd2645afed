"""Loading a language model by name or path, as a user of transformers would."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from zorl.classifier_models import check_order, class_names
from zorl.quantization import check_layers, is_plain, quantization_config

_CLASSIFIER = "ForSequenceClassification"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
ADAPTER = "adapter_config.json"


def load_model(
    name: str,
    dtype: str = "float32",
    *,
    classes: Sequence[str] | None = None,
    quantize: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A masked or causal language model, or a classifier, as its configuration says. No code in a checkpoint is run.

    Args:
        name: a model's name on the hub, or the path of a folder. A folder with an adapter gives its base with the adapter on it.
        dtype: float32, bfloat16, float16, or auto (as saved).
        classes: load it as a sequence-classification model of these classes. A checkpoint without such a head
            gets a new one, the same each time.
        quantize: int8 or int4: see `zorl.quantization`. A model that was saved quantised is loaded as it is.
        options: passed on to `from_pretrained`, such as `revision`.

    Raises:
        ValueError: dtype or quantize is not one of these, the model is a classifier of another number of classes, or of the same
            in another order, or needs code of its own, a language model's weights are missing, nothing in the model can be
            quantised, the width of a layer does not suit the quantiser, or its weights are damaged or do not fit its
            configuration.
        ImportError: the package that quantises is not installed.
        OSError: there is no such model, or only pickled weights.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if (Path(name) / ADAPTER).is_file():
        return _load_adapter(name, dtype, classes, quantize)
    config = _config(name, **options)
    if quantize is not None:
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"{name} was saved quantised and is used as it is: leave quantize={quantize!r} out")
        options["quantization_config"] = quantization_config(quantize)
    if classes is not None or _architecture(config).endswith(_CLASSIFIER):
        model = _load_classifier(name, dtype, config, classes, options)
        check_layers(model)
        return model
    loader: Any = AutoModelForMaskedLM if _reads_masks(config) else AutoModelForCausalLM
    with _sound_weights(name):
        model, info = loader.from_pretrained(
            name,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    _check_that_nothing_is_random(name, model, info["missing_keys"])
    check_layers(model)
    if quantize is not None and all(map(is_plain, model.parameters())):
        raise ValueError(
            f"{quantize} quantises linear layers, and {name} has none that it supports ({type(model).__name__}): leave it out"
        )
    return model


def is_masked_checkpoint(name: str) -> bool:
    """Whether a model is a masked language model, by its configuration; otherwise it is a causal one.

    Args:
        name: a model's name on the hub, or the path of a folder.

    Raises:
        OSError: there is no such model.
    """
    return _reads_masks(_config(name))


def trained_classes(name: str) -> tuple[str, ...] | None:
    """The classes of a checkpoint with a sequence-classification head (see `class_names`); None for other models."""
    config = _config(name)
    return class_names(config) if _architecture(config).endswith(_CLASSIFIER) else None


def _check_that_nothing_is_random(name: str, model: PreTrainedModel, missing: Collection[str]) -> None:
    """Raises ValueError if matrices are missing in the checkpoint, which transformers draws anew at each load.

    A missing vector is a bias or the weight of a norm: zeros or ones, the same each time.
    """
    random = sorted(key for key, parameter in model.named_parameters() if key in missing and parameter.ndim > 1)
    if random:
        more = f" and {len(random) - 3} more" if len(random) > 3 else ""
        raise ValueError(
            f"{name} is not a language model: of {type(model).__name__} it lacks {', '.join(random[:3])}{more}, which would be "
            "random; choose a masked or causal language model, or make it a classifier (--head classifier, or a Prompt with "
            "classes)"
        )


def _load_adapter(name: str, dtype: str, classes: Sequence[str] | None, quantize: str | None) -> Any:
    """The base of an adapter with the adapter on it, as a PeftModel."""
    from peft import PeftConfig, PeftModel

    from zorl.adapters import quiet

    base = PeftConfig.from_pretrained(name).base_model_name_or_path
    if not base:
        raise ValueError(
            f"{Path(name) / ADAPTER} names no base model: it was made in memory, so load it in a script of your own"
        )
    model = load_model(base, dtype, classes=classes, quantize=quantize)
    try:
        with quiet(), _sound_weights(name):
            return PeftModel.from_pretrained(model, name)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        of = "" if classes is None else f" with {len(classes)} classes"
        raise ValueError(
            f"the weights of the adapter {name} have sizes other than those of {base}{of}: give the base model and the classes "
            "that it was tuned with"
        ) from error


def _load_classifier(
    name: str, dtype: str, config: PreTrainedConfig, classes: Sequence[str] | None, options: dict[str, Any]
) -> PreTrainedModel:
    if classes is not None:
        if _architecture(config).endswith(_CLASSIFIER) and config.num_labels != len(classes):
            raise ValueError(
                f"the model {name!r} is a classifier of {config.num_labels} classes, and {len(classes)} are asked for"
            )
        check_order(classes, config)
        options = {**options, "id2label": dict(enumerate(classes)), "label2id": {c: i for i, c in enumerate(classes)}}
    with torch.random.fork_rng(devices=[]), _sound_weights(name):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False, **options
        )
    return model


def _config(name: str, **options: Any) -> PreTrainedConfig:
    """A model's configuration. transformers asks at the terminal whether to run a checkpoint's own code; here it is never run."""
    try:
        with _no_code_of(name):
            config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
    except OSError as error:
        if not isinstance(error.__cause__, LocalEntryNotFoundError):
            raise
        raise OSError(f"the model {name!r} is neither a folder here nor reachable on the hub") from None
    return config


@contextmanager
def _no_code_of(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name} needs code of its own (auto_map in its configuration), and code from a checkpoint is never run here: choose "
            "a model of a kind that transformers has"
        ) from None


@contextmanager
def _sound_weights(name: str) -> Iterator[None]:
    """Turns failures to load weights into one sentence. Running out of memory is a RuntimeError too, and is raised as it is."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"the weights of {name} are damaged ({error}): download them again") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"the weights of {name} have sizes other than its config.json says (the report above names them): they do not belong "
            "together, so download both again"
        ) from error


def _architecture(config: PreTrainedConfig) -> str:
    return (config.architectures or [""])[0]


def _reads_masks(config: PreTrainedConfig) -> bool:
    architecture = _architecture(config)
    if architecture.endswith(("ForMaskedLM", "ForCausalLM", "LMHeadModel")):
        return architecture.endswith("ForMaskedLM")
    # A bare encoder or decoder: encoders are listed as masked language models.
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def load_processing_class(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ValueError: it needs code of its own, which is not run, or its files are damaged.
        OSError: there is no such model.
    """
    try:
        with _no_code_of(name):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        if not _of_a_damaged_file(error):
            raise
        raise ValueError(
            f"{name} holds no tokenizer that can be read ({type(error).__name__}: {error}): download its tokenizer.json and "
            "tokenizer_config.json again"
        ) from error
    return tokenizer


def _of_a_damaged_file(error: Exception) -> bool:
    """Whether a tokenizer's file is not JSON, or not the right JSON: transformers reads it without checks."""
    damaged = (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError)
    return isinstance(error, damaged) or type(error) is Exception  # all that the tokenizers library raises
