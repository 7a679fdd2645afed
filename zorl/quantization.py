"""Models with weights of eight or four bits, by transformers' own quantisers.

Such weights are only read. What is tuned is an adapter, whose parameters are floating-point numbers.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

# int8: one scale per row. Activations are not quantised, so that small perturbations are not rounded away.
# int4: NF4, one scale per 64 weights (QLoRA, Dettmers et al. 2023).
PACKAGES = {"int8": "torchao", "int4": "bitsandbytes"}


def quantization_config(kind: str) -> Any:
    """The argument for `from_pretrained(quantization_config=…)`.

    Raises:
        ValueError: the kind is neither int8 nor int4.
        ImportError: the package that quantises is not installed.
    """
    if kind not in PACKAGES:
        raise ValueError(f"quantize must be int8 or int4, got {kind!r}")
    package = PACKAGES[kind]
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"quantize={kind!r} needs the package {package}: pip install {package}")
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def is_quantized(model: Any) -> bool:
    """Whether transformers loaded the model, or the one that an adapter wraps, with quantised weights."""
    return bool(getattr(model, "is_quantized", False))  # only set on models that are


@torch.no_grad()
def check_layers(model: Any) -> None:
    """Calls one quantised layer of each shape: that a width does not suit a quantiser's kernel only shows in a call.

    Raises:
        ValueError: a layer cannot be called.
    """
    shapes = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or is_plain(layer.weight) or layer.weight.is_meta:
            continue
        shape = (layer.in_features, layer.out_features)
        if shape in shapes:
            continue
        shapes.add(shape)
        try:
            layer(torch.zeros(2, layer.in_features, dtype=model.dtype, device=layer.weight.device))
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"the quantised layer {name}, of {shape[0]} inputs and {shape[1]} outputs, cannot be computed here "
                f"({str(error) or type(error).__name__}): int4 needs widths that are multiples of 64, quantize='int8' takes any"
            ) from error


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds its values as they are. Quantised ones have a class of their own, or store integers."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point()
