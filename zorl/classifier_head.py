"""Labels from a sequence-classification model's own head, at points around θ: no label words are needed.

Encoders (BERT, RoBERTa and similar) read their first token, decoders (OPT, GPT-2, Llama, Qwen) the last token that is not
padding. The scores are those of transformers' own `forward`, so a saved model gives the same answers anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from zorl import processes
from zorl.choosing import Choosing
from zorl.classifier_models import check_number, is_classifier, last_linear
from zorl.encoding import ContextTokenizer, Encoded, PromptEncoder, length_buckets, longest_input, padded
from zorl.fitting_forwards import FittingForwards
from zorl.offload import computing_device
from zorl.probe import CENTRE
from zorl.prompts import Answer, Prompt, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zorl.perturbation import Evaluator
    from zorl.probe import Point


class ClassifierHead(Choosing):
    """Answers rows with the class that the head of a sequence-classification model finds most likely.

    A text is tokenised with the tokenizer's own special tokens, a pair (`{sep}` in the template) by its pair encoding, and both
    are padded on the right. Values that are too long are cut at the end, as with transformers' `truncation=True`.

    Args:
        evaluator: runs the model at points.
        processing_class: the model's tokenizer. Its padding side does not matter.
        prompt: with classes, in the order of the model's logits.
        batch_size: maximum inputs per forward pass, counting those of all points that it evaluates.
        max_length: maximum tokens per input; by default the most that the model reads.

    Attributes:
        head: the linear layer of the evaluator's module that makes the logits; None where there is none.

    Raises:
        ValueError: the prompt has no classes, or not as many as the model; or the model has no padding token.
        TypeError: the model is not a sequence-classification model.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        processing_class: PreTrainedTokenizerBase,
        prompt: Prompt,
        *,
        batch_size: int = 64,
        max_length: int | None = None,
    ) -> None:
        module = evaluator.module
        if prompt.classes is None:
            raise ValueError(f"the prompt {prompt.template!r} has no classes for the model's head to choose from")
        if not is_classifier(module):
            raise TypeError(
                f"the prompt has classes, which need a sequence-classification model; {type(module).__name__} is not one: "
                "load it with AutoModelForSequenceClassification"
            )
        config = module.config.get_text_config()
        if config.pad_token_id is None:
            raise ValueError("the model's configuration has no pad_token_id, without which it reads one text at a time")
        check_number(prompt.classes, module.config)
        config.use_cache = False  # the evaluator's own copy of the configuration: nothing is generated
        self.evaluator = evaluator
        self.prompt = prompt
        self.forwards = FittingForwards(evaluator, batch_size)
        self.head = last_linear(module, len(prompt.classes))
        self._tokenizer = processing_class
        self._contexts = ContextTokenizer(processing_class, prompt)
        self._pad_id: int = config.pad_token_id
        # BERT's two kinds of tokens, where its tokenizer tells them apart; RoBERTa has one kind, decoders have none.
        typed = "token_type_ids" in processing_class.model_input_names
        self._segments = typed and getattr(config, "type_vocab_size", 0) > 1
        self._encode = PromptEncoder(
            prompt,
            self._tokenise,
            max_length=longest_input(module, processing_class) if max_length is None else max_length,
            keep="start",
            vocabulary=module.get_input_embeddings().weight.shape[0],
        )

    @property
    def label_names(self) -> list[str]:
        """The classes in the order of the scores' last dimension."""
        return list(self.prompt.labels)

    def scores(self, rows: Sequence[Mapping[str, Any]], points: Sequence[Point]) -> Tensor:
        """Log-probabilities of the classes.

        Returns:
            float32 of shape `(len(points), len(rows), classes)`. NaN where the logits are.
        """
        parts = processes.share(rows, lambda mine: {"logits": self._logits(self._encode(mine), points)[0]})
        return torch.cat([part["logits"] for part in parts], dim=1).log_softmax(dim=-1)

    def every_answer(self, rows: Sequence[Mapping[str, Any]]) -> list[list[Answer]]:
        """Each class as the answer to each row, as `[row][class]`."""
        return [[Answer(name, []) for name in self.prompt.labels] for _ in rows]

    def words_and_states(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor | None]:
        """What a head is fitted to: the classes' log-probabilities at θ, and the state that the last linear layer reads.

        Returns:
            Log-probabilities of shape `(rows, classes)`, and states of shape `(rows, width)`, both float32 on the CPU. No
            states where the logits are not those of a linear layer.
        """
        parts = processes.share(rows, self._logits_and_states)
        logits, states = [part["logits"] for part in parts], [part["states"] for part in parts if "states" in part]
        return torch.cat(logits).log_softmax(dim=-1), torch.cat(states) if states else None

    def _logits_and_states(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        logits, states = self._logits(self._encode(rows), [CENTRE])
        return {"logits": logits[0].cpu()} | ({} if states is None else {"states": states[0].cpu()})

    def _logits(self, encoded: Sequence[Encoded], points: Sequence[Point]) -> tuple[Tensor, Tensor | None]:
        """Logits `(points, rows, classes)`, and the states that they are computed from, `(points, rows, width)`."""
        device = computing_device(self.evaluator.module)
        if not encoded or not points:
            return torch.empty(len(points), len(encoded), len(self.prompt.labels), device=device), None

        def prepare(size: int) -> Callable[[int], list[tuple[Tensor, Tensor | None]]]:
            buckets = length_buckets([one.length for one in encoded], size)
            batches = [self._inputs([encoded[i] for i in bucket], device) for bucket in buckets]
            back = torch.tensor([i for bucket in buckets for i in bucket], device=device).argsort()

            def forward(copies: int) -> list[tuple[Tensor, Tensor | None]]:
                parts = [self._forward(inputs, copies) for inputs in batches]
                logits = torch.cat([part for part, _ in parts], dim=1)[:, back]
                known = [part for _, part in parts if part is not None]
                states = torch.cat(known, dim=1)[:, back.to(known[0].device)] if known else [None] * copies
                return list(zip(logits, states, strict=True))

            return forward

        found = self.forwards(points, prepare, inputs=len(encoded))
        states = [of_point for _, of_point in found if of_point is not None]
        return torch.stack([logits for logits, _ in found]), torch.stack(states) if states else None

    def _forward(self, inputs: Mapping[str, Tensor], copies: int) -> tuple[Tensor, Tensor | None]:
        """Logits `(copies, n, classes)` and states `(copies, n, width)` of a batch."""
        repeated = {name: tensor.repeat(copies, 1) for name, tensor in inputs.items()}
        read: list[Tensor] = []
        handle = None
        if self.head is not None:
            handle = self.head.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        try:
            logits = self.evaluator.module(**repeated).logits.float()
        finally:
            if handle is not None:
                handle.remove()
        states = read[-1].float() if read else None
        if states is not None and states.ndim == 3:  # a decoder's head reads all positions, and one is chosen then
            if states.shape[1] != repeated["input_ids"].shape[1]:
                raise ValueError(
                    "a soft prompt hides from the model where a text ends, so it would read padding: tune LoRA or a prefix"
                )
            last = self._last(repeated["input_ids"]).to(states.device)  # the head may be on another device
            states = states[torch.arange(len(states), device=states.device), last]
        return logits.view(copies, -1, logits.shape[-1]), None if states is None else states.view(
            copies, -1, states.shape[-1]
        )

    def _last(self, input_ids: Tensor) -> Tensor:
        """The position of the last token that is not padding, as transformers finds it; shape `(n,)`."""
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        return (position * (input_ids != self._pad_id)).argmax(dim=1)

    def _inputs(self, encoded: Sequence[Encoded], device: torch.device) -> dict[str, Tensor]:
        input_ids, mask = padded([one.ids for one in encoded], self._pad_id, "right", device)
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        if self._segments:
            second = torch.tensor([one.position for one in encoded], device=device)
            after = torch.arange(input_ids.shape[1], device=device) >= second[:, None]
            inputs["token_type_ids"] = (after & mask.bool()).long()
        return inputs

    def _tokenise(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """Tokens; their `position` is where a pair's second text begins."""
        if self.prompt.is_pair:
            first, second = [one.before.rstrip() for one in rendered], [one.after.lstrip() for one in rendered]
            pairs = self._tokenizer(
                first, second, return_token_type_ids=True, return_attention_mask=False, verbose=False
            )
            return [
                self._encoded(ids, [*types, 1].index(1))
                for ids, types in zip(pairs["input_ids"], pairs["token_type_ids"], strict=True)
            ]
        texts = [self._contexts.text(one) for one in rendered]
        chat = [bool(one.messages) for one in rendered]  # a chat template writes the special tokens itself
        found = {
            kind: iter(
                self._contexts.plain([t for t, k in zip(texts, chat, strict=True) if k == kind], special=not kind)
            )
            for kind in (False, True)
        }
        return [self._encoded(ids, len(ids)) for ids in (next(found[kind]) for kind in chat)]

    def _encoded(self, ids: Sequence[int], second: int) -> Encoded:
        return Encoded(np.array(list(ids) or [self._pad_id], dtype=np.int32), second)
