"""A trained classifier's opinion of a completion, as its reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted
from torch import nn

from zorl.reward_functions import RewardFunction
from zorl.reward_models import Messages, SequenceClassifier, text_of

Output = Literal["probability", "log_probability", "logit"]
# scikit-learn's estimators do give probability 0, whose logarithm is not a reward.
_LEAST_PROBABILITY = 1e-12


def classifier(
    model: str | Path | nn.Module | BaseEstimator,
    label: str | int | None = None,
    *,
    output: Output = "probability",
    include_prompt: bool = False,
    processing_class: Any = None,
    batch_size: int = 32,
) -> RewardFunction:
    """The score that a classifier gives one label, per sample. It reads the completion alone, or prompt and completion.

    Args:
        model: a `transformers` sequence classifier (its name or path, from which only safetensors are read, or the
            module), or a fitted scikit-learn estimator or pipeline over texts. zorl unpickles nothing, so load
            estimators yourself.
        label: the rewarded label, by name; or by number, if that is not a name. None for a model with a single logit.
        output: probability, log_probability, or logit (scikit-learn: the decision function). The labels share a probability of
            one, unless the model's `problem_type` is multi_label_classification: then each has its own. A single logit is
            returned as it is, whatever the choice.
        include_prompt: read prompt and completion as one text.
        processing_class: the model's tokenizer; by default the one saved with it.
        batch_size: texts per forward of a `transformers` model.

    Raises:
        ValueError: the model cannot be loaded, is not fitted, lacks the label, or cannot give this output.
        TypeError: the model is neither.
    """
    if output not in get_args(Output):
        raise ValueError(f"output must be one of {', '.join(get_args(Output))}, got {output!r}")
    if isinstance(model, str | Path) and Path(model).suffix in {".pkl", ".pickle", ".joblib"}:
        raise ValueError(
            f"{str(model)!r} looks like a pickle, which can run any code; load it yourself and pass the estimator"
        )
    if isinstance(model, str | Path | nn.Module):
        scorer = SequenceClassifier(model, processing_class, batch_size=batch_size)
        return _TransformersReward(scorer, label, output, include_prompt)
    if isinstance(model, BaseEstimator):
        return _SklearnReward(model, label, output, include_prompt)
    raise TypeError(
        f"model must be a sequence classifier (name, path or module) or a scikit-learn estimator, got {type(model)}"
    )


class _TransformersReward:
    def __init__(
        self, scorer: SequenceClassifier, label: str | int | None, output: Output, include_prompt: bool
    ) -> None:
        if scorer.config is None:
            raise TypeError(f"{scorer.name} has no configuration that lists its labels; pass a transformers model")
        self.scorer = scorer
        self.output = output
        self.include_prompt = include_prompt
        # A multi-label model gives every label a probability of its own, so they need not sum to one.
        self.exclusive = scorer.config.problem_type != "multi_label_classification"
        labels = [str(scorer.config.id2label[i]) for i in range(scorer.config.num_labels)]
        self.index: int | None = None
        if len(labels) > 1:
            self.index = _index(label, labels, scorer.name)
        elif label is not None and _index(label, labels, scorer.name) != 0:
            raise ValueError(f"{scorer.name!r} has one logit, got label={label!r}")
        self.__name__ = scorer.name if self.index is None else f"{scorer.name}_{labels[self.index]}"

    def __call__(
        self, prompts: Sequence[str | Messages], completions: Sequence[str | Messages], **columns: Any
    ) -> list[float]:
        logits = self.scorer.logits(_texts(prompts, completions, self.include_prompt)).double()  # (completions, labels)
        if self.index is None:
            values = logits[:, 0]
        elif self.output == "logit":
            values = logits[:, self.index]
        else:
            values = logits.log_softmax(dim=1) if self.exclusive else nn.functional.logsigmoid(logits)
            values = values[:, self.index]
            values = values if self.output == "log_probability" else values.exp()
        return [float(value) for value in values]


class _SklearnReward:
    def __init__(self, estimator: BaseEstimator, label: str | int | None, output: Output, include_prompt: bool) -> None:
        name = type(estimator[-1] if type(estimator).__name__ == "Pipeline" else estimator).__name__
        try:
            check_is_fitted(estimator)
        except NotFittedError as error:
            raise ValueError(f"the {name} is not fitted; call its fit(texts, labels) first") from error
        method = "decision_function" if output == "logit" else "predict_proba"
        if not callable(getattr(estimator, method, None)):
            other = "'probability'" if output == "logit" else "'logit'"
            raise ValueError(f"{name} has no {method}, which output={output!r} needs; try output={other}")
        labels = [str(value) for value in estimator.classes_]
        self.estimator = estimator
        self.output = output
        self.include_prompt = include_prompt
        self.index = _index(label, labels, name)
        self.__name__ = f"{name}_{labels[self.index]}"

    def __call__(
        self, prompts: Sequence[str | Messages], completions: Sequence[str | Messages], **columns: Any
    ) -> list[float]:
        texts = _texts(prompts, completions, self.include_prompt)
        if self.output == "logit":
            scores = np.asarray(self.estimator.decision_function(texts))  # (completions,) for two classes: the second's
            if scores.ndim == 1:
                scores = np.stack([-scores, scores], axis=1)
            return [float(score) for score in scores[:, self.index]]
        probabilities = np.asarray(self.estimator.predict_proba(texts), dtype=np.float64)[:, self.index]
        if self.output == "log_probability":
            return [float(value) for value in np.log(np.maximum(probabilities, _LEAST_PROBABILITY))]
        return [float(value) for value in probabilities]


def _index(label: str | int | None, labels: Sequence[str], model: str) -> int:
    if str(label) in labels:
        return labels.index(str(label))
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(labels):
        return label
    choices = ", ".join(map(repr, labels))
    if label is None:
        raise ValueError(f"{model!r} has several labels; choose the rewarded one with label=…, of {choices}")
    raise ValueError(f"{model!r} has no label {label!r}; it has {choices}")


def _texts(prompts: Sequence[str | Messages], completions: Sequence[str | Messages], include_prompt: bool) -> list[str]:
    answers = [text_of(completion) for completion in completions]
    if not include_prompt:
        return answers
    return [_whole(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)]


def _whole(prompt: str | Messages) -> str:
    """A prompt as text; a conversation as the contents of its messages, each on its own line."""
    return prompt if isinstance(prompt, str) else "".join(f"{message['content']}\n" for message in prompt)
