"""From arguments to rows and a prompt: what training, evaluation and prediction begin with."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from zorl.apps.arguments import InputArguments
from zorl.data import LABEL, TEXT, Rows, load_rows
from zorl.models import ADAPTER
from zorl.prompts import Prompt
from zorl.reward_functions import RewardFunction
from zorl.rewards import load_reward
from zorl.tables import check_columns

DEFAULT_TEMPLATE = "{prompt}"  # the column that TRL's data sets have


def say(message: str) -> None:
    """A message for people; stdout is for results."""
    print(f"zorl: {message}", file=sys.stderr)


def number(value: float) -> float | None:
    """For JSON, which has no NaN: null stands for a reward that applied to no row. Rewards are float32: seven digits."""
    return None if math.isnan(value) else float(f"{value:.7g}")


def require(arguments: Any, *names: str) -> None:
    """Raises ValueError for the first of these arguments that was not given."""
    for name in names:
        if getattr(arguments, name) is None:
            raise ValueError(f"--{name} is needed")


def check_model_folder(name: str) -> None:
    """Raises ValueError where a path was meant for a model and is none: transformers would look for it on the hub."""
    path = Path(name).expanduser()
    if path.is_dir() and not ((path / "config.json").is_file() or (path / ADAPTER).is_file()):
        if (path / "trajectory.zorl").is_file():
            raise ValueError(
                f"--model {name}: the run there is not finished; repeat its zorl train, or use zorl replay"
            )
        raise ValueError(f"--model {name}: the folder has no config.json, so it holds no model")
    if not path.is_dir() and (path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"--model {name}: there is no such folder")


def make_prompt(arguments: InputArguments, saved: Mapping[str, Any] | None = None) -> Prompt:
    """The prompt that flags describe, over the one that was saved with a model.

    Where they describe the saved one, its label head stays; it means nothing for another.

    Raises:
        ValueError: template and label words do not fit together, or a label word is not given as label=word.
    """
    column = arguments.text_column
    default = DEFAULT_TEMPLATE if column is None else f"{{{TEXT if column.isdecimal() else column}}}"
    remembered = Prompt.from_dict(saved) if saved is not None else None
    words = _label_words(arguments.label_words)
    template = None if arguments.prompt is None else arguments.prompt.replace("\\n", "\n")
    if remembered is None:
        template = default if template is None else template
        return Prompt(template, words, chat=arguments.chat, system=arguments.system)
    if words is None and (template is None or "{mask}" in template):
        words = None if remembered.label_words is None else dict(remembered.label_words)
    asked = replace(
        remembered,
        template=remembered.template if template is None else template,
        label_words=words,
        chat=arguments.chat or remembered.chat,
        system=remembered.system if arguments.system is None else arguments.system,
        label_head=None,
    )
    return remembered if asked == replace(remembered, label_head=None) else asked


def load(
    arguments: InputArguments,
    prompt: Prompt,
    label_column: str | None,
    *,
    source: str | None = None,
    split: str | None = None,
) -> Rows:
    """The rows of `--dataset` (or of `source`), with the columns that the prompt needs.

    Args:
        label_column: name or position of a column that must be there.

    Raises:
        ValueError: a column is missing; see `zorl.data.load_rows`.
    """
    text_column = arguments.text_column
    guessed = text_column is None and prompt.template == DEFAULT_TEMPLATE
    if text_column is None and len(prompt.fields) == 1 and not guessed:
        (text_column,) = prompt.fields
    assert arguments.dataset is not None
    rows = load_rows(
        source or arguments.dataset,
        text_column=text_column,
        label_column=label_column,
        split=split or arguments.dataset_split,
        config=arguments.dataset_config,
    )
    if guessed and prompt.fields[0] not in rows.dataset.column_names:
        columns = ", ".join(map(repr, rows.dataset.column_names))
        raise ValueError(
            f"--prompt is needed: a template over the columns {columns}, such as "
            f"'{{{rows.dataset.column_names[0]}}} It was {{mask}}.' with --label_words, or without {{mask}} for text"
        )
    prompt.check_columns(rows.dataset.column_names)
    return rows


def label_of(rows: Rows, prompt: Prompt, source: str, *, needed: bool) -> str | None:
    """The name of the label column in loaded rows: the one asked for, or 'label' where it is there.

    Raises:
        ValueError: it is needed and missing.
    """
    if rows.label_column is not None:
        return rows.label_column
    if needed:
        check_columns(source, [LABEL], rows.dataset.column_names)
    return LABEL if prompt.labels and LABEL in rows.dataset.column_names else None


def load_rewards(names: list[str] | None, label_column: str | None) -> list[RewardFunction]:
    """Reward functions by name; the shipped ones read the truth from `label_column`, where it is given."""
    return [load_reward(name, column=label_column) for name in names or []]


def describe(dataset: Dataset, label_column: str | None) -> str:
    """`4000 rows (0: 2000, 1: 2000)`."""
    if label_column is None:
        return f"{len(dataset)} rows"
    labels = [str(label) for label in dataset[label_column]]
    counts = [f"{label}: {labels.count(label)}" for label in sorted(set(labels))]
    return f"{len(dataset)} rows ({', '.join(counts[:10])}{', …' if len(counts) > 10 else ''})"


def _label_words(given: list[str] | Mapping[str, str] | None) -> dict[str, str] | None:
    if given is None or isinstance(given, Mapping):
        return None if given is None else dict(given)
    words: dict[str, str] = {}
    for pair in given:
        label, equals, word = pair.partition("=")
        if not equals:
            raise ValueError(f"--label_words takes label=word pairs such as 0=terrible 1=great, got {pair!r}")
        if label in words:
            raise ValueError(f"--label_words has the label {label!r} twice")
        words[label] = word
    return words
