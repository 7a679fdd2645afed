"""Loading a language model by name or path, as a user of transformers would."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}


def load_model(name: str, dtype: str = "float32", **options: Any) -> PreTrainedModel:
    """A masked or causal language model, by what its configuration says it is. Code in a checkpoint is never run.

    Args:
        name: of a model on the hub, or the path of a folder.
        dtype: float32, bfloat16, float16, or auto (as saved).
        options: passed on to `from_pretrained`, such as `revision`.

    Raises:
        ValueError: the dtype is none of these.
        OSError: there is no such model, or only pickled weights.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    loader: Any = AutoModelForMaskedLM if is_masked(name, **options) else AutoModelForCausalLM
    model: PreTrainedModel = loader.from_pretrained(name, dtype=DTYPES[dtype], use_safetensors=True, **options)
    return model


def is_masked(name: str, **options: Any) -> bool:
    """Whether a model's configuration says that it is a masked language model; a causal one otherwise.

    Args:
        name: of a model on the hub, or the path of a folder.
        options: passed on to `from_pretrained`, such as `revision`.

    Raises:
        OSError: there is no such model.
    """
    config = AutoConfig.from_pretrained(name, **options)
    architecture = (config.architectures or [""])[0]
    if architecture.endswith(("ForMaskedLM", "ForCausalLM", "LMHeadModel")):
        return bool(architecture.endswith("ForMaskedLM"))
    # A bare encoder or decoder: encoders are listed as masked language models.
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def load_processing_class(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **options)
    return tokenizer
