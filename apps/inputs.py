"""Turns arguments into rows and a prompt, for training, evaluation and prediction."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from zorl.apps.arguments import InputArguments
from zorl.apps.launcher import is_first
from zorl.data import LABEL, TEXT, Rows, Split, load_rows
from zorl.models import ADAPTER, is_masked_checkpoint, trained_classes
from zorl.prompts import Prompt
from zorl.reward_functions import RewardFunction
from zorl.rewards import load_reward
from zorl.rewards.loading import load_file
from zorl.suggestions import check_columns
from zorl.tasks import Task, few_shot
from zorl.tasks import task as find_task
from zorl.wording import counted

DEFAULT_TEMPLATE = "{prompt}"  # the prompt column of TRL's data sets


def say(message: str) -> None:
    """Prints a message to stderr; stdout is for results."""
    if is_first():
        print(f"zorl: {message}", file=sys.stderr)


def number(value: float) -> float | None:
    """A number for JSON, which has neither NaN nor infinity: None where it is not finite, else rounded to float32's 7 digits."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def require(arguments: Any, *names: str) -> None:
    """Raises ValueError for the first of these arguments that is missing."""
    for name in names:
        if getattr(arguments, name) is None:
            raise ValueError(f"--{name} is required")


def check_model_folder(name: str) -> None:
    """Raises ValueError for a path that does not lead to a model: transformers would look for that name on the hub."""
    path = Path(name).expanduser()
    if path.is_dir() and not ((path / "config.json").is_file() or (path / ADAPTER).is_file()):
        if (path / "trajectory.zorl").is_file():
            raise ValueError(
                f"--model {name}: the run there is not finished; repeat its zorl train command, or use zorl replay"
            )
        raise ValueError(f"--model {name}: the folder has no config.json, so it holds no model")
    if not path.is_dir() and (path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"--model {name}: there is no such folder")


def load_task(name: str | None) -> Task | None:
    """The task that `--task` names: one of zorl's, or the `TASK` of a file. None if `name` is None.

    Raises:
        ValueError: there is no such task or file, or the file has no `TASK`. Errors in the file are raised as they are.
    """
    if name is None:
        return None
    if not name.endswith(".py"):
        try:
            return find_task(name)
        except ValueError as error:
            raise ValueError(f"--task: {error}, or give your own as path/file.py") from None
    found = getattr(load_file(Path(name)), "TASK", None)
    if not isinstance(found, Task):
        raise ValueError(f"--task {name}: the file has no TASK = zorl.tasks.Task(…), but {type(found).__name__}")
    return found


def check_source(arguments: InputArguments, task: Task | None) -> None:
    """Raises ValueError if nothing says which rows to read, or a flag contradicts the task."""
    require(arguments, "model")
    if task is None and arguments.dataset is None:
        raise ValueError("--task or --dataset is required")
    if task is not None and task.hub is None:
        require(arguments, "dataset")
    for name in ("text_column", "dataset_config"):
        if task is not None and getattr(arguments, name) is not None:
            raise ValueError(f"--{name} cannot be combined with --task, which has its own data set; leave it out")


def source_of(arguments: InputArguments, task: Task | None) -> str:
    """The name of the source of the rows."""
    if arguments.dataset is not None or task is None or task.hub is None:
        return str(arguments.dataset)
    return task.hub.name


def make_prompt(arguments: InputArguments, saved: Mapping[str, Any] | None = None, task: Task | None = None) -> Prompt:
    """The prompt that the flags describe. What they leave out is taken from the saved prompt of the model, or from the task.

    It has no label head: `Predictor.load` takes the saved one along where it belongs to the prompt.

    Raises:
        ValueError: template and label words do not fit together, a label word is not given as label=word, or the task does
            not support such a model.
    """
    column, options = arguments.text_column, arguments.options
    default = DEFAULT_TEMPLATE if column is None else f"{{{TEXT if column.isdecimal() else column}}}"
    words = _label_words(arguments.label_words)
    template = None if arguments.prompt is None else arguments.prompt.replace("\\n", "\n")
    if saved is not None:
        base = Prompt.from_dict(saved)
    elif task is not None:
        base = task.prompt(masked=template is None and is_masked_checkpoint(str(arguments.model)))
    else:
        template = default if template is None else template
        return Prompt(template, words, chat=arguments.chat, system=arguments.system, options=options)
    if words is None and options is None and (template is None or "{mask}" in template):
        words = None if base.label_words is None else dict(base.label_words)
        options = base.options
    return replace(
        base,
        template=base.template if template is None else template,
        label_words=words,
        chat=arguments.chat or base.chat,
        system=base.system if arguments.system is None else arguments.system,
        label_head=None,
        options=options,
    )


def stop_of(stop: str | None, task: Task | None) -> str | None:
    """The text before which answers end: that of `--stop`, where \\n stands for a line break, else the task's."""
    if stop is not None:
        return stop.replace("\\n", "\n")
    return None if task is None else task.stop


def with_trained_classes(prompt: Prompt, model: str) -> Prompt:
    """The prompt with the classes of the model's sequence-classification head; unchanged if the model has none."""
    if prompt.labels:
        return prompt
    return replace(prompt, classes=trained_classes(model))


def load(
    arguments: InputArguments,
    prompt: Prompt,
    label_column: str | None,
    *,
    task: Task | None = None,
    source: str | None = None,
    split: str | None = None,
    task_split: str = "train",
) -> Rows:
    """The rows of `--dataset` (or of `source`), with the columns that the prompt needs.

    Args:
        label_column: name or position of a column that must exist.
        task: the task that the rows belong to.
        task_split: the split of the task, if neither `split` nor `--dataset_split` is given.

    Raises:
        ValueError: a column is missing; see `zorl.data.load_rows` and `Task.load`.
    """
    if task is not None:
        called = split or arguments.dataset_split or task_split
        dataset = Dataset.from_list(task.load(called, source or arguments.dataset))  # type: ignore[arg-type]  # checked there
        wanted = task.label_column if label_column is None else label_column
        check_columns(f"the task {task.name!r}", [wanted], dataset.column_names)
        prompt.check_columns(dataset.column_names)
        return Rows(dataset, None, wanted)
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
            f"--prompt is required: a template over the columns {columns}, such as "
            f"'{{{rows.dataset.column_names[0]}}} It was {{mask}}.' with --label_words or --options, or without {{mask}} for text"
        )
    prompt.check_columns(rows.dataset.column_names)
    return rows


def label_of(rows: Rows, prompt: Prompt, source: str, *, needed: bool) -> str | None:
    """The name of the label column in loaded rows: the requested one, or 'label' if there is such a column.

    Raises:
        ValueError: it is needed, and missing.
    """
    if rows.label_column is not None:
        return rows.label_column
    if needed:
        check_columns(source, [LABEL], rows.dataset.column_names)
    return LABEL if (needed or prompt.chooses) and LABEL in rows.dataset.column_names else None


def draw(
    rows: Dataset,
    k_shot: int | None,
    sizes: Sequence[int] | None,
    *,
    seed: int,
    label_column: str | None,
    held_out: bool = True,
) -> Split | None:
    """The rows that `--k_shot` or `--sample` draws, to train on and to hold out; None if neither is given.

    Args:
        held_out: False draws the same rows to train on, and holds out none.

    Raises:
        ValueError: both are given, `sizes` is not two numbers of at least 1, or there are too few rows.
    """
    if k_shot is None and sizes is None:
        return None
    if k_shot is not None and sizes is not None:
        raise ValueError("--k_shot and --sample are two ways of drawing rows: give only one")
    if k_shot is not None:
        shots = few_shot.k_shot(rows.to_list(), k_shot, seed=seed, label_column=label_column, validation=held_out)
        return Split(Dataset.from_list(shots.train), Dataset.from_list(shots.validation))
    assert sizes is not None
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"--sample takes two numbers, of rows to train on and of rows to hold out, got {list(sizes)}")
    wanted = (sizes[0], sizes[1] * held_out, 0)
    if sum(wanted) > len(rows):
        raise ValueError(f"--sample {sizes[0]} {sizes[1]} needs {sum(wanted)} rows, but there are only {len(rows)}")
    drawn = few_shot.sample(rows.to_list(), wanted, seed=seed, label_column=label_column)
    return Split(Dataset.from_list(drawn.train), Dataset.from_list(drawn.validation))


def load_rewards(names: list[str] | None, label_column: str | None) -> list[RewardFunction]:
    """Reward functions by name. zorl's own read the true label from `label_column`, if it is given."""
    return [load_reward(name, column=label_column) for name in names or []]


def describe(dataset: Dataset, label_column: str | None) -> str:
    """The number of rows, in total and per label, as in `4000 rows (0: 2000, 1: 2000)`."""
    rows = counted(len(dataset), "row", "rows")
    if label_column is None:
        return rows
    labels = [str(label) for label in dataset[label_column]]
    counts = [f"{label}: {labels.count(label)}" for label in sorted(set(labels))]
    return f"{rows} ({', '.join(counts[:10])}{', …' if len(counts) > 10 else ''})"


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
