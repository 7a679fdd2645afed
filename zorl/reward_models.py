"""Sequence-classification models as scorers of text, and reward models as TRL users pass them: a name or a module."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zorl.devices import best_device
from zorl.encoding import longest_input

Messages = Sequence[Mapping[str, Any]]


def text_of(text: str | Messages) -> str:
    """The text itself, or of a conversation (`[{"role", "content"}, …]`) the content of its last message."""
    return text if isinstance(text, str) else str(text[-1]["content"]) if text else ""


class SequenceClassifier:
    """The logits of a `transformers` sequence-classification model over texts.

    A model given as an object is switched to eval mode and stays on its device; one given by name or path is read in
    float32 (ties between close texts would be frequent in half precision) and put on the accelerator, if there is one.
    Only safetensors weights are read, and no code that comes with a checkpoint is run.

    Args:
        model: a name or path that `AutoModelForSequenceClassification` knows, or the module.
        processing_class: its tokenizer; by default the one saved with the model.
        batch_size: texts per forward.

    Raises:
        ValueError: the model cannot be loaded, or its classification head is not in the checkpoint.
    """

    def __init__(self, model: str | Path | nn.Module, processing_class: Any = None, *, batch_size: int = 32) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        module = model if isinstance(model, nn.Module) else _load(model)
        config = getattr(module, "config", None)  # absent from a module that is not a transformers model
        source = str(model) if not isinstance(model, nn.Module) else getattr(config, "_name_or_path", "")
        self.name = source.rstrip("/").split("/")[-1] or type(module).__name__
        self.tokenizer = processing_class if processing_class is not None else _load_tokenizer(source, self.name)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if config is not None:  # causal classifiers read the last token that is not padding, so they must know which is
            config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.config = config
        self.batch_size = batch_size
        self.module = module.eval()
        limit = self.tokenizer.model_max_length if config is None else longest_input(module, self.tokenizer)
        self._longest = limit if limit < sys.maxsize else None  # transformers' "unknown" is 1e30

    def logits(self, texts: Sequence[str], *, special_tokens: bool = True, truncation: bool = True) -> Tensor:
        """Scores every text.

        Args:
            texts: any number of them, at least one.
            special_tokens: let the tokenizer add its own ([CLS], …); off for text that a chat template wrote.
            truncation: cut texts to the longest input that the model and its tokenizer allow.

        Returns:
            float32 tensor on the CPU, shape `(texts, labels)`.
        """
        if not special_tokens or not self.tokenizer.num_special_tokens_to_add():
            texts = [text or self.tokenizer.pad_token for text in texts]  # a model needs a token to look at
        # Texts of similar length share a batch, so that little of it is padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        device = next(self.module.parameters()).device
        chunks = []
        for start in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(
                text=[texts[i] for i in order[start : start + self.batch_size]],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                truncation=truncation and self._longest is not None,
                max_length=self._longest if truncation else None,
                add_special_tokens=special_tokens,
            )
            with torch.no_grad():
                chunks.append(self.module(**batch.to(device)).logits.float().cpu())
        sorted_logits = torch.cat(chunks)  # (texts, labels) in the order of length
        logits = torch.empty_like(sorted_logits)
        logits[order] = sorted_logits
        return logits


class RewardModel:
    """A reward model, in TRL's sense, as a reward function: the one logit of a `num_labels=1` sequence classifier.

    As in TRL it reads prompt and completion as one text, without special tokens, and conversations through the
    tokenizer's chat template.

    Raises:
        ValueError: the model cannot be loaded, or has more than one label.
    """

    def __init__(self, model: str | Path | nn.Module, processing_class: Any = None) -> None:
        self.classifier = SequenceClassifier(model, processing_class)
        self.__name__ = self.classifier.name
        labels = 1 if self.classifier.config is None else self.classifier.config.num_labels
        if labels != 1:
            raise ValueError(
                f"reward model {self.__name__!r} has {labels} labels where a reward model has one; choose the label to "
                f"be rewarded with zorl.rewards.classifier(model, label=…)"
            )

    def __call__(
        self, prompts: Sequence[str | Messages], completions: Sequence[str | Messages], **columns: Any
    ) -> list[float]:
        """One logit per completion."""
        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        logits = self.classifier.logits(texts, special_tokens=False, truncation=False)
        if logits.shape[1] != 1:
            raise ValueError(f"the module returns {logits.shape[1]} logits per text where a reward model returns one")
        return [float(logit) for logit in logits[:, 0]]

    def _text(self, prompt: str | Messages, completion: str | Messages) -> str:
        if isinstance(prompt, str):
            return prompt + text_of(completion)
        answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
        return str(self.classifier.tokenizer.apply_chat_template([*prompt, *answer], tokenize=False))


def _load(name: str | Path) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    try:
        module, info = AutoModelForSequenceClassification.from_pretrained(
            str(name), dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:
        raise ValueError(
            f"cannot load {str(name)!r} as a sequence-classification model (a reward function is given as a callable, "
            f"not by name): {error}"
        ) from error
    if missing := ", ".join(sorted(info["missing_keys"])):
        raise ValueError(f"{str(name)!r} is not a trained sequence classifier: its checkpoint lacks {missing}")
    classifier: nn.Module = module.to(best_device())
    return classifier


def _load_tokenizer(source: str, name: str) -> Any:
    from transformers import AutoTokenizer

    if not source:
        raise ValueError(f"model {name!r} does not say where its tokenizer is; pass it as processing class")
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"cannot load the tokenizer of {source!r} (pass it as processing class): {error}") from error
