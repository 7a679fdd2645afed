"""Loading a language model by name or path, as a user of transformers would."""

from __future__ import annotations

from pathlib import Path
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

from zorl.quantization import is_plain, quantization_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
ADAPTER = "adapter_config.json"


def load_model(name: str, dtype: str = "float32", *, quantize: str | None = None, **options: Any) -> PreTrainedModel:
    """A masked or causal language model, by what its configuration says it is. Code in a checkpoint is never run.

    Args:
        name: of a model on the hub, or the path of a folder. A folder with an adapter gives its base with the adapter on it.
        dtype: float32, bfloat16, float16, or auto (as saved).
        quantize: int8 or int4: see `zorl.quantization`. A model that was saved quantised is loaded as it is.
        options: passed on to `from_pretrained`, such as `revision`.

    Raises:
        ValueError: the dtype is none of these, quantize is neither, or nothing in the model can be quantised.
        ImportError: the package that quantises is not installed.
        OSError: there is no such model, or only pickled weights.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if (Path(name) / ADAPTER).is_file():
        return _load_adapter(name, dtype, quantize)
    config = AutoConfig.from_pretrained(name, **options)
    if quantize is not None:
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"{name} was saved quantised and is used as it is: leave quantize={quantize!r} out")
        options["quantization_config"] = quantization_config(quantize)
    architecture = (config.architectures or [""])[0]
    if architecture.endswith("ForMaskedLM"):
        loader: Any = AutoModelForMaskedLM
    elif architecture.endswith(("ForCausalLM", "LMHeadModel")):
        loader = AutoModelForCausalLM
    else:  # a bare encoder or decoder: encoders are listed as masked language models
        loader = (
            AutoModelForMaskedLM if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else AutoModelForCausalLM
        )
    model: PreTrainedModel = loader.from_pretrained(name, dtype=DTYPES[dtype], use_safetensors=True, **options)
    if quantize is not None and all(map(is_plain, model.parameters())):
        raise ValueError(
            f"{quantize} quantises linear layers, and {name} has none that it knows ({type(model).__name__}): leave it out"
        )
    return model


def _load_adapter(name: str, dtype: str, quantize: str | None) -> Any:
    """The base of an adapter with the adapter on it, as a PeftModel."""
    from peft import PeftConfig, PeftModel

    from zorl.adapters import quiet

    base = PeftConfig.from_pretrained(name).base_model_name_or_path
    if not base:
        raise ValueError(f"{Path(name) / ADAPTER} names no base model: it was made in memory, so load it in a script")
    model = load_model(base, dtype, quantize=quantize)
    with quiet():
        return PeftModel.from_pretrained(model, name)


def load_processing_class(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **options)
    return tokenizer
