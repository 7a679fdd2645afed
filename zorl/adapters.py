"""Which parameters a run tunes: all of the model's, those of an adapter, or the output embedding's alone.

MeZO does as well with few parameters as with many (Malladi et al. 2023, section 3), and each kind has its own scale: a
step or a perturbation that suits weights of 0.05 is too small for a prefix, whose keys and values are around 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zorl.directions import canonical_name, derive_seed
from zorl.offload import computing_device, is_offloaded
from zorl.parameters import plain_parameters
from zorl.perturbation import output_embedding
from zorl.quantization import is_quantized
from zorl.whole_files import whole_file

if TYPE_CHECKING:
    from zorl.config import MeZOConfig

Tune = Literal["full", "lora", "prefix", "head"]


class Scale(NamedTuple):
    """Settings that suit a kind of parameters.

    Attributes:
        learning_rate: the typical change of a weight in one step of one direction, at most (see `default_learning_rate`).
        length: the length of a step, relative to a full model's. Low-rank adapters move a weight by a product of two factors.
        epsilon: ε.
    """

    learning_rate: float
    length: float
    epsilon: str


# Found on masked and causal models of 0.3M and 22M parameters, for normalized updates.
SCALES: dict[str, Scale] = {
    "full": Scale(3e-3, 1.0, "auto"),
    "lora": Scale(1e-2, 0.5, "auto"),
    "prefix": Scale(3e-2, 1.0, "0.1"),
    "head": Scale(3e-3, 1.0, "auto"),
}
_RATE, _SIZE = 3e-4, 22_744_506  # at 3e-4 per weight, a step on a model of this size has length 1.43
ALL_LINEAR = "all-linear"


def prepare(model: Any, args: MeZOConfig) -> Any:
    """The model prepared for `args.tune`, with `requires_grad` on what is tuned. The model is changed in place.

    Raises:
        ValueError: the model is a PeftModel, is quantised and would be written, has no output embedding, or is of a kind that
            peft does not know.
    """
    if args.tune == "full" and not is_quantized(model):
        return model
    if is_peft(model):
        if args.tune == "full":
            return model
        raise ValueError(f"the model is already a PeftModel: leave tune={args.tune!r} out, or pass the base model")
    if is_quantized(model) and args.tune in ("full", "head"):
        raise ValueError(
            f"the model is quantised, and tune={args.tune!r} would write its weights: tune a LoRA adapter on it with "
            "tune='lora', or a prefix with tune='prefix'"
        )
    if args.tune == "head":
        return head_alone(model)
    if args.tune == "prefix":
        return add_prefix(model, args.prefix_tokens, args.seed)
    return add_lora(model, args.lora_rank, args.lora_alpha, args.lora_targets, args.seed)


def default_learning_rate(tune: str, parameters: int) -> float:
    """The typical change of a weight in one step of one direction, for so many tuned parameters (`update="normalized"`).

    All steps of a kind have the same length: the more weights are tuned, the less each of them moves, so the rate falls with
    the square root of their number (docs/what_pays.md).
    """
    scale = SCALES[tune]
    return min(scale.learning_rate, scale.length * _RATE * math.sqrt(_SIZE / parameters))


def is_peft(model: Any) -> bool:
    """Whether peft already wraps the model."""
    from peft import PeftModel  # takes a second, and most runs do not need it

    return isinstance(model, PeftModel)


def adapt(model: Any, config: Any) -> Any:
    """peft's `get_peft_model`, without warnings about what is intended."""
    from peft import get_peft_model

    with quiet():
        return get_peft_model(model, config)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences peft's use of an old name in transformers, and its warning about GPT-2's transposed layers, which it handles."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing.", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        yield


def save(
    model: Any, folder: Path, not_in_checkpoint: Collection[str], state_dict: dict[str, Any] | None = None
) -> None:
    """Writes a model to a folder: all of it, or its adapter and what else the base checkpoint does not hold, a classifier's head.

    Both are in peft's own file, where it keeps a resized embedding too, so `PeftModel.from_pretrained` puts both back.

    Args:
        not_in_checkpoint: canonical names of the parameters that the base checkpoint does not hold.
        state_dict: the model's, where it is not the one to save.
    """
    model.save_pretrained(folder, state_dict=state_dict)
    if not not_in_checkpoint or not is_peft(model):
        return
    adapter = model.active_adapter
    rest = {
        name: values.detach().cpu().contiguous().clone()
        for name, values in plain_parameters(model)
        # what bears the adapter's name, a head that peft tunes among it, is saved already
        if canonical_name(name) in not_in_checkpoint and adapter not in name.split(".")
    }
    if rest:
        saved = (folder if adapter == "default" else folder / adapter) / "adapter_model.safetensors"
        with whole_file(saved) as new:
            save_file(load_file(saved) | rest, new, metadata={"format": "pt"})


def add_lora(model: Any, rank: int, alpha: int, targets: list[str] | None, seed: int) -> Any:
    """Low-rank adapters W + α/r · B A (Hu et al. 2021), A at random and B = 0, so that tuning starts from the model itself.

    On a quantised base only B is tuned and A stays as it is: the update, which cannot be written into W, accumulates in the
    span of A.

    Args:
        targets: names of linear layers, `["all-linear"]`, or None for the queries and values of the attention, as in the
            MeZO paper.
        seed: seeds A.

    Raises:
        ValueError: targets is None, and peft does not know where this kind of model has its queries and values.
    """
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    kind = model.config.model_type
    if targets is None and kind not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        raise ValueError(
            f"peft does not know where a {kind!r} model has its queries and values: name linear layers in lora_targets, or "
            f"give lora_targets={ALL_LINEAR}"
        )
    where = ALL_LINEAR if targets == [ALL_LINEAR] else targets
    task = "CAUSAL_LM" if _generates(model) else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "lora"))
        adapted = adapt(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=where, task_type=task))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "lora"))
        _bring_adapters_in(adapted)
    if is_quantized(model):
        for name, parameter in adapted.named_parameters():
            if ".lora_A." in name or ".lora_embedding_A." in name:
                parameter.requires_grad_(False)
    return adapted


def _bring_adapters_in(adapted: Any) -> None:
    """Puts new adapters where the inputs are if their layer is offloaded: there, peft would leave them empty shells."""
    from peft.tuners.lora import LoraLayer

    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_A:
                halves = module.lora_A[name], module.lora_B[name]
                if any(is_offloaded(parameter) for half in halves for parameter in half.parameters()):
                    for half in halves:
                        half.to_empty(device=computing_device(adapted))
                    module.reset_lora_parameters(name, init_lora_weights=True)


@torch.no_grad()
def add_prefix(model: Any, tokens: int, seed: int) -> Any:
    """Puts keys and values in front of every text, in every layer (Li and Liang 2021).

    They start as those that the model computes for random tokens of its vocabulary: without these *real activations*
    prefix tuning by forward passes hardly learns (Malladi et al. 2023, appendix on prefix tuning).

    Args:
        tokens: the length of the prefix.
        seed: seeds the choice of tokens.

    Raises:
        ValueError: the model keeps no keys and values, or not the same number in every layer.
    """
    from peft import PrefixTuningConfig

    ids = torch.randint(
        model.get_input_embeddings().num_embeddings,
        (1, tokens),
        generator=torch.Generator().manual_seed(derive_seed(seed, "prefix")),
    )
    start = _activations(model, ids)
    # peft calls a masked model with a prefix only if it is declared a feature extractor.
    task = "CAUSAL_LM" if _generates(model) else "FEATURE_EXTRACTION"
    adapted = adapt(model, PrefixTuningConfig(num_virtual_tokens=tokens, task_type=task))
    encoder = adapted.prompt_encoder[adapted.active_adapter]
    if encoder.embedding.weight.shape != start.shape:
        raise ValueError(
            f"peft's prefix for {type(model).__name__} has shape {tuple(encoder.embedding.weight.shape)}, the model's keys and "
            f"values {tuple(start.shape)}: its layers differ, so tune another way, such as tune='lora'"
        )
    if is_offloaded(encoder.embedding.weight):  # peft has put it where it takes the model to be
        encoder.to_empty(device=start.device)
    encoder.load_prompt_embeddings(start)
    return adapted


def _activations(model: Any, ids: Tensor) -> Tensor:
    """The keys and values of tokens `(1, n)` as peft lays them out: `(n, layers · 2 · heads · width)`, float32."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    ids = ids.to(computing_device(model))
    was_training = model.training
    model.eval()
    try:
        # Masked models return no cache, but fill one that they are given.
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
    finally:
        model.train(was_training)
    cached: Any = cache.layers
    # A model may be spread over several devices.
    layers = [tensor.to(ids.device) for layer in cached for tensor in (layer.keys, layer.values)]
    if not layers or len({tensor.shape for tensor in layers}) > 1:
        found = "no keys and values" if not layers else "layers that differ in their keys and values"
        raise ValueError(
            f"{type(model).__name__} has {found}, so it cannot take a prefix: tune another way, such as tune='lora'"
        )
    return torch.cat(layers).float().permute(2, 0, 1, 3).reshape(ids.shape[1], -1)


def head_alone(model: Any) -> Any:
    """Freezes all but the output embedding, and unties it from the input embedding if the two are shared.

    Raises:
        ValueError: the model has no output embedding.
    """
    if output_embedding(model) is None:
        raise ValueError(f"{type(model).__name__} has no output embedding to tune: tune='head' is for language models")
    untie_output_embedding(model)
    head = model.get_output_embeddings()
    model.requires_grad_(False)
    head.requires_grad_(True)
    return model


def untie_output_embedding(model: Any) -> bool:
    """Gives the output embedding tensors of its own if it shares them, so that moving it moves nothing else.

    The model saves them, and its configuration says so. They take memory for one more vocabulary.

    Returns:
        Whether anything was shared.
    """
    head = model.get_output_embeddings()
    elsewhere = {id(p) for module in model.modules() if module is not head for p in module._parameters.values()}
    if not any(id(p) in elsewhere for p in head.parameters()):
        return False
    for name, parameter in head.named_parameters(recurse=False):
        head.register_parameter(name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False
    return True


def _generates(model: Any) -> bool:
    """Whether the model continues texts: causal models do, masked ones do not."""
    return bool(model.can_generate())
