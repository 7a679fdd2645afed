"""One bias per token on the output embedding: the smallest set of parameters that steers what a language model says.

Serving programs call it `logit_bias`. A model of any size has one for each token of its vocabulary, and perturbing them only
needs a forward of the last layer. What it learns is saved as
`sequence_bias` in `generation_config.json`, so that plain transformers generates with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def add_output_bias(model: Any) -> nn.Parameter:
    """Gives the model's output embedding a bias of zeros, and returns it; an existing one is returned as it is.

    Args:
        model: a transformers language model. Weights tied to the input embedding stay tied.

    Raises:
        TypeError: the output embedding is not a linear layer.
    """
    head = _head(model)
    if head.bias is None:
        head.bias = nn.Parameter(torch.zeros(head.weight.shape[0], dtype=head.weight.dtype, device=head.weight.device))
    bias: nn.Parameter = head.bias
    return bias


def output_bias_name(model: Any) -> str:
    """The bias's name among the model's parameters, such as `lm_head.bias`: the pattern that tunes only it.

    Raises:
        TypeError: the output embedding is not a linear layer.
        ValueError: it has no bias.
    """
    head = _head(model)
    names = [name for name, parameter in model.named_parameters() if parameter is head.bias]
    if not names:
        raise ValueError("the output embedding has no bias; call add_output_bias(model) first")
    return names[0]


def move_output_bias_to_generation_config(model: Any) -> None:
    """Removes the bias from the output embedding and writes it into the model's generation config.

    `model.save_pretrained` then saves all of it, and `from_pretrained` followed by `generate` gives the same text. A plain
    forward no longer has the bias. Tokens whose bias is zero are left out.

    Raises:
        TypeError: the output embedding is not a linear layer.
        ValueError: it has no bias, or the generation config already has a `sequence_bias`.
    """
    output_bias_name(model)
    head = _head(model)
    if model.generation_config.sequence_bias:
        raise ValueError("the model's generation config already has a sequence_bias, which would be overwritten")
    biases = head.bias.detach().float().tolist()
    head.register_parameter("bias", None)
    model.generation_config.sequence_bias = [[[token], bias] for token, bias in enumerate(biases) if bias] or None


def _head(model: Any) -> nn.Linear:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise TypeError(
            f"{type(model).__name__} has no linear output embedding ({type(head).__name__}) that a bias could be added to"
        )
    return head
