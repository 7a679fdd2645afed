"""A saved model in use: rows in, answers out, with the prompt and the label head that it was tuned with."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zorl.choosing import Choosing
from zorl.classifier_models import prepare_classifier
from zorl.config import ANSWERING, MeZOConfig
from zorl.data import as_rows
from zorl.models import load_model, load_processing_class
from zorl.parameters import ParameterSet, plain_parameters
from zorl.perturbation import Scratch
from zorl.policies import Policy, make_policy
from zorl.probe import CENTRE
from zorl.prompts import Answer, Prompt
from zorl.run_folder import RunFolder


class Predictor:
    """Answers rows with a model, as `zorl predict` does.

    The `from_pretrained` of transformers reads the weights alone; the prompt and the label head, which may be most of what a
    run has learned, are in the `zorl.json` beside them.

    Attributes:
        policy: what answers.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @classmethod
    def load(
        cls, model: str | Path, *, prompt: Prompt | None = None, dtype: str | None = None, **settings: Any
    ) -> Predictor:
        """Loads a model and what a run saved with it.

        Args:
            model: the folder that `MeZOTrainer.save_model` or `zorl train` wrote, or any model's name or path.
            prompt: by default the one that the model was tuned with. Its label head is kept if only the columns have other names.
            dtype: of the weights, such as "bfloat16"; by default that of the run, or for another model float32.
            settings: other fields of `MeZOConfig`, such as `temperature=0.0`, `forward_batch_size=32` or `use_cpu=True`. Those
                that decide how prompts are read and answered are by default the run's.

        Raises:
            ValueError: no run saved this model and there is no prompt, or the prompt does not suit the model.
            OSError: there is no such model.
        """
        saved = RunFolder(Path(model).expanduser()).read_settings()
        if prompt is None:
            if not saved:
                raise ValueError(f"{str(model)!r} was not saved by zorl, so it has no prompt: give one")
            prompt = Prompt.from_dict(saved["prompt"])
        elif saved:
            tuned = Prompt.from_dict(saved["prompt"])
            prompt = prompt.with_head_of(tuned)
            if prompt.label_head is None and tuned.label_head is not None and prompt.labels:
                warnings.warn(
                    f"the label head of {model}, which may be most of what its run learned, belongs to the prompt "
                    f"{tuned.template!r} and its label words: it is left out with {prompt.template!r}",
                    stacklevel=2,
                )
        remembered = {name: saved[name] for name in ANSWERING if saved.get(name) is not None}
        args = MeZOConfig(**{**remembered, **settings})
        dtype = dtype or saved.get("dtype") or ("auto" if saved else "float32")
        name = str(model)
        module = load_model(name, dtype, classes=prompt.classes, quantize=saved.get("quantize")).eval().to(args.device)
        tokenizer = load_processing_class(name)
        if prompt.classes is not None:
            prompt = prepare_classifier(module, prompt, tokenizer)
        evaluator = Scratch(module, ParameterSet(plain_parameters(module)))
        return cls(make_policy(evaluator, tokenizer, prompt, args))

    def answers(self, rows: Iterable[Mapping[str, Any]]) -> list[Answer]:
        """The answer to each row, with its tokens.

        Args:
            rows: dictionaries with the prompt's columns, a data set, or a table of pandas.

        Raises:
            ValueError: they are something else, or a row does not suit the prompt.
        """
        (answers,) = self.policy.answers(as_rows(rows, "rows"), [CENTRE])
        return answers

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> list[Any]:
        """The completion of each row, as for `answers`: its label, its best option, or generated text."""
        return [answer.completion for answer in self.answers(rows)]

    def probabilities(self, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
        """How likely each answer to choose from is, by its text, for each row; they sum to 1.

        Raises:
            ValueError: the answers are generated, so there is nothing to choose from.
        """
        if not isinstance(self.policy, Choosing):
            raise ValueError(
                f"the prompt {self.policy.prompt.template!r} is answered with generated text, not with a choice"
            )
        listed = as_rows(rows, "rows")
        every, (scores,) = self.policy.every_answer(listed), self.policy.scores(listed, [CENTRE])
        return [
            {str(answer.completion): value for answer, value in zip(choices, values, strict=False)}
            for choices, values in zip(every, scores.exp().tolist(), strict=True)
        ]
