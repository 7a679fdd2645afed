"""A language model's logits at given positions. Only these go through its head, which is most of a small model's work."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zorl.perturbation import output_embedding


class PositionLogits:
    """Runs a masked or causal language model and reads its logits at given positions.

    Args:
        module: what a forward calls (see `zorl.perturbation.Evaluator.module`).

    Raises:
        TypeError: the model has no language-model head, or is an encoder-decoder.
    """

    def __init__(self, module: Any) -> None:
        if module.config.is_encoder_decoder:
            raise TypeError(
                f"label words need a masked or a causal language model; {type(module).__name__} is an encoder-decoder"
            )
        if module.get_output_embeddings() is None:
            raise TypeError(
                f"{type(module).__name__} has no language-model head to score words with;"
                " load it with AutoModelForMaskedLM or AutoModelForCausalLM"
            )
        self._module = module
        self._head = _head(module)
        self._output = output_embedding(module)

    @property
    def width(self) -> int:
        """The width of the states that the output embedding reads."""
        return int(self._module.get_output_embeddings().weight.shape[1])

    def __call__(self, inputs: dict[str, Any], positions: Tensor) -> tuple[Any, Tensor, Tensor | None]:
        """Runs the model.

        Args:
            inputs: the model's keyword arguments, with `input_ids` of shape `(S, T)`.
            positions: where to read each input, `(S, K)`.

        Returns:
            What the model returns; the logits at the positions, `(S, K, vocabulary or head rows)`; and the states that they
            are computed from, `(S, K, H)`, or None if the head does not call the output embedding.
        """
        size, width = inputs["input_ids"].shape
        narrowed = False
        read: list[Tensor] = []

        def at_positions(hidden: Tensor) -> Tensor:  # (S, T, H) -> (S, K, H)
            virtual = hidden.shape[1] - width  # prompt tuning prepends tokens of its own
            index = (positions + virtual).unsqueeze(-1).to(hidden.device)  # the last layers may be on another device
            return hidden.gather(1, index.expand(-1, -1, hidden.shape[-1]))

        def narrow(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            nonlocal narrowed
            if not args or args[0].ndim != 3 or args[0].shape[0] != size or args[0].shape[1] < width:
                return None
            narrowed = True
            return (at_positions(args[0]), *args[1:])

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read.append(args[0] if args else next(iter(kwargs.values())))

        handles = []
        if self._output is not None:
            handles.append(self._output.register_forward_pre_hook(note, with_kwargs=True))
        if self._head is not None:
            handles.append(self._head.register_forward_pre_hook(narrow, prepend=True))
        try:
            output = self._module(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        states = read[0] if read else None  # a head may use the embedding's weight without calling it
        if narrowed:
            return output, output.logits, states
        return output, at_positions(output.logits), None if states is None else at_positions(states)


def is_masked(module: nn.Module) -> bool:
    """Whether the model, or the one that an adapter wraps, is one of transformers' masked language models."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )  # slow to import, and by now imported

    names = set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
    return any(kind.__name__ in names for inner in module.modules() for kind in type(inner).__mro__)


def _head(module: Any) -> nn.Module | None:
    """The largest module that contains the output embedding but not the input embedding.

    It treats each position by itself, so it can be given only the positions that are needed. It is `cls` in BERT and `lm_head`
    in RoBERTa and causal models, whatever wraps them. None if the two embeddings are one module.
    """
    embeddings, output = module.get_input_embeddings(), module.get_output_embeddings()
    inside = [m for m in module.modules() if output in m.modules()]  # from the outside in
    return next((m for m in inside if embeddings not in m.modules()), None)
