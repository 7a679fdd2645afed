"""`zorl eval` and `zorl predict`: scores of a model on a file, and its answers."""

from __future__ import annotations

import csv
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from zorl.apps.arguments import AnswerArguments, EvalArguments, PredictArguments
from zorl.apps.command_line import build, parse
from zorl.apps.commands import EVAL, PREDICT
from zorl.apps.inputs import (
    check_model_folder,
    check_source,
    label_of,
    load,
    load_rewards,
    load_task,
    make_prompt,
    number,
    require,
    say,
    source_of,
    stop_of,
    with_trained_classes,
)
from zorl.config import ANSWERING
from zorl.data import checked_rows
from zorl.objectives import columns_of
from zorl.predictor import Predictor
from zorl.prompts import Prompt
from zorl.reward_functions import RewardFunctions
from zorl.reward_models import text_of
from zorl.reward_objective import score_answers
from zorl.rewards import accuracy, f1
from zorl.run_folder import RunFolder
from zorl.tasks import Task
from zorl.wording import counted

PREDICTION = "prediction"
_CHUNK = 1024  # rows between two updates of the progress bar


def run_eval(argv: Sequence[str]) -> str:
    """Evaluates, and returns what to print.

    Raises:
        ValueError: an argument or the data does not fit.
    """
    arguments = build(EvalArguments, parse(EVAL, argv))
    task = load_task(arguments.task)
    check_source(arguments, task)
    settings = _settings(arguments)
    prompt = with_trained_classes(make_prompt(arguments, settings.get("prompt"), task), str(arguments.model))
    wished = arguments.label_column
    if wished is None and prompt.chooses and task is None:
        wished = settings.get("label_column")
    loaded = load(arguments, prompt, wished, task=task, task_split="test")
    label_column = label_of(loaded, prompt, str(arguments.dataset), needed=prompt.chooses)
    if arguments.reward is None and task is not None and not prompt.chooses:
        arguments.reward = [task.metric]
    asked = load_rewards(arguments.reward, label_column)
    if not asked and not prompt.chooses:
        raise ValueError(
            "--reward is required, such as squad_f1: without label words or options there is no accuracy to compute"
        )
    rows = checked_rows(loaded.dataset, "--dataset", prompt, label_column or "label")
    predictor = _predictor(arguments, settings, prompt, task)
    start = time.perf_counter()
    answers = predictor.answers(rows)
    result: dict[str, Any] = {}
    column = str(label_column)
    answered = [answer.completion for answer in answers]
    keywords = {**columns_of(rows), "completions": answered, "label_names": list(prompt.labels) or None}
    if prompt.chooses:
        result["accuracy"] = statistics.fmean(accuracy(column)(**keywords))
    if prompt.labels:
        found = {str(row[column]).strip() for row in rows}
        absent = [label for label in prompt.labels if label not in found]
        if absent:
            say(f"no row has the label {' or '.join(map(repr, absent))}: macro_f1 is the mean over the others")
        result["macro_f1"] = f1(column=column)(**keywords)
        result["f1"] = {label: f1(column=column, pos_label=label)(**keywords) for label in prompt.labels}
    if asked:
        values = score_answers(RewardFunctions(asked, arguments.reward_weights), prompt, rows, answers)
        result["rewards"] = {name: number(value) for name, value in values.means().items()}
        result["reward"] = number(values.total.nanmean().item())
    seconds = round(time.perf_counter() - start, 2)
    result |= {"n": len(rows), "seconds": seconds, "model": arguments.model, "dataset": source_of(arguments, task)}
    return json.dumps(result, ensure_ascii=False) if arguments.json else _table(result)


def run_predict(argv: Sequence[str]) -> str:
    """Writes the answers, and returns what to print.

    Raises:
        ValueError: an argument or the data does not fit, or the output file exists.
    """
    arguments = build(PredictArguments, parse(PREDICT, argv))
    task = load_task(arguments.task)
    check_source(arguments, task)
    require(arguments, "output")
    output = Path(str(arguments.output))
    if output.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"--output {output}: the name must end in .jsonl or .csv")
    if output.exists() and not arguments.overwrite:
        raise ValueError(f"--output {output} exists: choose another name, or replace it with --overwrite")
    settings = _settings(arguments)
    prompt = with_trained_classes(make_prompt(arguments, settings.get("prompt"), task), str(arguments.model))
    dataset = load(arguments, prompt, None, task=task, task_split="test").dataset
    if PREDICTION in dataset.column_names:
        raise ValueError(f"{source_of(arguments, task)} has a column {PREDICTION!r} already; rename it")
    rows = dataset.to_list()
    predictor = _predictor(arguments, settings, prompt, task)
    with tqdm(total=len(rows), unit="row") as bar:
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            for row, completion in zip(chunk, predictor(chunk), strict=True):
                row[PREDICTION] = text_of(completion)
            bar.update(len(chunk))
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", encoding="utf-8", newline="") as file:
        if output.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    counts = {label: sum(row[PREDICTION] == label for row in rows) for label in prompt.labels}
    if arguments.json:
        return json.dumps({"n": len(rows), "output": str(output), "predicted": counts or None}, ensure_ascii=False)
    shares = f" ({', '.join(f'{label}: {count}' for label, count in counts.items())})" if counts else ""
    return f"{counted(len(rows), 'prediction', 'predictions')}{shares} written to {output}"


def _settings(arguments: AnswerArguments) -> dict[str, Any]:
    """The settings that zorl saved with the model; empty for any other model."""
    check_model_folder(str(arguments.model))
    settings = RunFolder(Path(str(arguments.model)).expanduser()).read_settings()
    if settings and arguments.prompt is None:
        say(f"prompt of {arguments.model}: {settings['prompt']['template']!r}")
    return settings


def _predictor(arguments: AnswerArguments, settings: dict[str, Any], prompt: Prompt, task: Task | None) -> Predictor:
    given = {key: getattr(arguments, key) for key in ("forward_batch_size", "use_cpu", *ANSWERING)}
    given["stop"] = stop_of(arguments.stop, None if "stop" in settings else task)
    computing = {key: value for key, value in given.items() if value is not None}
    return Predictor.load(str(arguments.model), prompt=prompt, dtype=arguments.dtype, **computing)


def _table(result: dict[str, Any]) -> str:
    figures: dict[str, float | None] = {name: result[name] for name in ("accuracy", "macro_f1") if name in result}
    figures |= {f"F1 of {label}": value for label, value in result.get("f1", {}).items()}
    figures |= {name: value for name, value in result.get("rewards", {}).items() if name not in figures}
    if len(result.get("rewards", {})) > 1:
        figures["reward (sum)"] = result["reward"]
    width = max(map(len, figures))
    lines = [f"{result['dataset']}, {counted(result['n'], 'row', 'rows')}, {result['seconds']:.1f} s"]
    lines += [f"{name:<{width}}  {'—' if value is None else f'{value:.4f}'}" for name, value in figures.items()]
    return "\n".join(lines)
