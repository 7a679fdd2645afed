"""`zorl compare`: runs several methods on the same rows, within the same budget of forward passes."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from zorl.apps import compare_report
from zorl.apps.arguments import CompareArguments
from zorl.apps.command_line import build, parse
from zorl.apps.commands import COMPARE
from zorl.apps.compare_methods import METHODS, PUBLISHED_RATES, STANDARD
from zorl.apps.elapsed import elapsed
from zorl.apps.inputs import (
    check_model_folder,
    check_source,
    draw,
    label_of,
    load,
    load_task,
    make_prompt,
    number,
    say,
    source_of,
    stop_of,
)
from zorl.apps.memory import peak_memory
from zorl.apps.partial_result import PartialResult
from zorl.baselines.problem import NotApplicable, Problem
from zorl.data import hold_out
from zorl.prompts import Prompt
from zorl.reward_functions import RewardFunctions
from zorl.rewards import load_reward
from zorl.suggestions import did_you_mean
from zorl.tasks import Task
from zorl.whole_files import read_json, write_json

LARGEST_SEED = 1 << 32  # numpy's global generator, which Trainer seeds, takes no larger ones
NOTE = "comparison.json"  # what a folder's cells have in common
# Arguments that two comparisons must share for their cells to stand in one table.
SAME = (
    "model", "task", "dataset", "eval_dataset", "test_dataset", "dataset_config", "dataset_split", "test_split", "text_column",
    "prompt", "label_words", "options", "chat", "system", "label_column", "k_shot", "sample", "test_rows", "budget", "batch_size",
    "metrics", "max_length", "max_completion_length", "stop", "published_rates",
)  # fmt: skip


class Rows(NamedTuple):
    """The rows that one seed draws."""

    train: list[dict[str, Any]]
    dev: list[dict[str, Any]]
    test: list[dict[str, Any]]


def run(argv: Sequence[str]) -> str:
    """Runs the missing cells, writes the tables and the plot, and returns what to print.

    Raises:
        ValueError: an argument or the data does not fit, or the folder holds another comparison or a damaged file.
        PartialResult: some cells failed. The others are in the tables, which it holds.
        OSError: a file could not be read or written. The remaining cells would meet the same disk, so none of them runs.
        KeyboardInterrupt: with a sentence on how to continue. The tables hold the finished cells.
    """
    arguments = build(CompareArguments, parse(COMPARE, argv))
    task = load_task(arguments.task)
    check_source(arguments, task)
    check_model_folder(str(arguments.model))
    methods = _chosen(arguments)
    arguments.stop = stop_of(arguments.stop, task)
    arguments.published_rates = arguments.published_rates or list(PUBLISHED_RATES)
    prompt = make_prompt(arguments, task=task)
    metrics = arguments.metrics or ([task.metric] if task is not None else [])
    metrics = metrics or (["accuracy", "f1"] if prompt.labels else ["squad_f1", "exact_match"])
    if prompt.labels and not arguments.metrics:
        metrics = list(dict.fromkeys([*metrics, "accuracy", "f1"]))
    arguments.metrics = metrics
    names = [RewardFunctions(load_reward(metric)).names[0] for metric in metrics]
    folder = Path(arguments.output_dir)
    same = json.loads(json.dumps({name: getattr(arguments, name) for name in SAME}))
    _check_same(folder, same)
    todo = [(seed, name) for seed in arguments.seeds for name in methods if not _cell(folder, name, seed).exists()]
    say(
        f"{len(todo)} of {len(methods) * len(arguments.seeds)} cells to run: {len(methods)} methods, {len(arguments.seeds)} "
        f"seeds, at most {arguments.budget} forward passes of {arguments.batch_size} rows each"
    )
    failed: list[dict[str, Any]] = []
    try:
        with tqdm(total=len(todo), unit="cell") as bar:
            for seed in dict.fromkeys(seed for seed, _ in todo):
                rows, label_column = _draw(arguments, prompt, task, seed)
                problem = Problem(
                    model=str(arguments.model), prompt=prompt, train=rows.train, dev=rows.dev, label_column=label_column,
                    batch_size=arguments.batch_size, budget=arguments.budget, seed=seed,
                    reward=load_reward(metrics[0], column=label_column),
                    max_length=arguments.max_length, max_completion_length=arguments.max_completion_length,
                    stop=arguments.stop or None,
                )  # fmt: skip
                _claim(folder, same)
                for name in [name for at, name in todo if at == seed]:
                    bar.set_postfix_str(f"{METHODS[name].title}, seed {seed}")
                    try:
                        _run_cell(folder, name, problem, rows.test, metrics, arguments.published_rates)
                    except OSError:  # a full disk, or a model that cannot be read: it would stop the other cells, too
                        raise
                    except Exception as error:
                        if os.environ.get("ZORL_TRACEBACK"):
                            raise
                        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                        failed.append({"method": name, "seed": seed, "error": reason})
                        say(f"{METHODS[name].title}, seed {seed}: {reason} (ZORL_TRACEBACK=1 shows where)")
                    bar.update()
    except KeyboardInterrupt:
        if (folder / "cells").exists():
            _report(folder, arguments, names, failed)
        raise KeyboardInterrupt("stopped; finished cells are kept, and the same command continues") from None
    result = _report(folder, arguments, names, failed)
    if failed:
        which = ", ".join(f"{cell['method']} with seed {cell['seed']}" for cell in failed)
        raise PartialResult(f"failed: {which}; the same command tries again", result)
    return result


def _chosen(arguments: CompareArguments) -> list[str]:
    methods = list(dict.fromkeys(arguments.methods or STANDARD))
    unknown = next((name for name in methods if name not in METHODS), None)
    if unknown is not None:
        known = f"{did_you_mean(unknown, METHODS)} (methods: {', '.join(METHODS)})"
        raise ValueError(f"--methods: there is no {unknown!r}{known}")
    for name in ("budget", "batch_size", "test_rows", "max_length", "max_completion_length"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    bad = next((rate for rate in arguments.published_rates or () if not 0.0 < rate < math.inf), None)
    if bad is not None:
        raise ValueError(f"--published_rates must be positive, got {bad}")
    arguments.seeds = list(dict.fromkeys(arguments.seeds))
    if not arguments.seeds:
        raise ValueError("--seeds needs at least one number")
    wrong = next((seed for seed in arguments.seeds if not 0 <= seed < LARGEST_SEED), None)
    if wrong is not None:
        raise ValueError(f"--seeds must be at least 0 and below 2**32, got {wrong}")
    return methods


def _check_same(folder: Path, same: dict[str, Any]) -> None:
    """Checks that the folder's cells, if there are any, were run with the same arguments.

    Raises:
        ValueError: they were run with other arguments, or the file that says so is damaged.
    """
    note = folder / NOTE
    if not note.exists() or not any((folder / "cells").glob("*.json")):
        return
    before = read_json(note, "remove the folder, and the same command starts afresh")
    changed = [name for name in same if same[name] != before.get(name)]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{folder} holds a comparison with --{name} {before.get(name)!r}, not {same[name]!r}: one table cannot hold "
            "the results of both; choose another --output_dir"
        )


def _claim(folder: Path, same: dict[str, Any]) -> None:
    """Writes down what the folder's cells will have in common. Runs that were begun with other arguments are removed.

    Raises:
        ValueError: the file from before is damaged.
    """
    note, runs = folder / NOTE, folder / "runs"
    before = read_json(note, "remove the folder, and the same command starts afresh") if note.exists() else None
    if before == same:
        return
    if before is not None and runs.exists() and any(before.get(name) != value for name, value in same.items()):
        say(f"{runs}: runs that were begun with other arguments, and not finished, are removed")
        shutil.rmtree(runs)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(note, same)


def _draw(arguments: CompareArguments, prompt: Prompt, task: Task | None, seed: int) -> tuple[Rows, str]:
    """The rows of a seed, and the name of the label column."""
    wished, source = arguments.label_column, source_of(arguments, task)
    train = load(arguments, prompt, wished, task=task)
    label_column = label_of(train, prompt, source, needed=True) or "label"
    classes = label_column if prompt.labels else None
    train_rows = train.dataset
    if _tests_on_other_rows(arguments, task):
        split = arguments.test_split or (None if task is None else "test")
        tested = load(arguments, prompt, wished, task=task, source=arguments.test_dataset, split=split).dataset
    else:
        train_rows, tested = hold_out(train_rows, classes)
        say(f"no --test_dataset: {len(tested)} of {len(train.dataset)} rows are held out to report on")
    shots = draw(train_rows, arguments.k_shot, arguments.sample, seed=seed, label_column=classes)
    if arguments.eval_dataset is not None:
        split = None if task is None else "validation"
        dev = load(arguments, prompt, wished, task=task, source=arguments.eval_dataset, split=split).dataset
        learnt = train_rows if shots is None else shots.train
    else:
        learnt, dev = shots or hold_out(train_rows, classes)
    rows = tested.to_list()
    if len(rows) > arguments.test_rows:
        rows = random.Random(0).sample(rows, arguments.test_rows)  # the same rows for all seeds
    return Rows(learnt.to_list(), dev.to_list(), rows), label_column


def _tests_on_other_rows(arguments: CompareArguments, task: Task | None) -> bool:
    """Whether the rows to report on come from another file or split than those to learn from. A file has only one split."""
    if arguments.test_dataset is not None and arguments.test_dataset != arguments.dataset:
        return True
    learnt = arguments.dataset_split or "train"
    tested = arguments.test_split or ("test" if task is not None else learnt)
    a_file = task is not None and arguments.dataset is not None and Path(arguments.dataset).is_file()
    return tested != learnt and not a_file


def _run_cell(
    folder: Path,
    name: str,
    problem: Problem,
    test: list[dict[str, Any]],
    metrics: Sequence[str],
    rates: Sequence[float],
) -> None:
    """Runs one method with one seed and writes its results.

    Args:
        rates: the learning rates that the published recipe tries.
    """
    method = METHODS[name]
    fit = partial(method.fit, rates=rates) if method.takes_rates else method.fit
    work = folder / "runs" / f"{name}-{problem.seed}"
    cell: dict[str, Any] = {"method": name, "title": method.title, "seed": problem.seed}
    before = elapsed(work)  # of a run that continues
    start = time.perf_counter()
    try:
        with peak_memory(problem.device) as peak:
            fitted = fit(problem, work)
            learning = before + time.perf_counter() - start
            answers = fitted.answers(test)
        for metric in metrics:
            judged = replace(problem, reward=load_reward(metric, column=problem.label_column))
            cell[judged.rewards.names[0]] = number(round(judged.score(test, answers), 6))
        cell |= {
            "forwards": fitted.forwards, "seconds": round(learning, 1),
            "peak_memory_mb": None if peak.megabytes is None else round(peak.megabytes), "chosen": fitted.chosen,
            "train_rows": len(problem.train), "test_rows": len(test),
        }  # fmt: skip
    except NotApplicable as error:
        cell["not_applicable"] = str(error)
    path = _cell(folder, name, problem.seed)
    path.parent.mkdir(exist_ok=True)
    write_json(path, cell)
    shutil.rmtree(work, ignore_errors=True)


def _cell(folder: Path, name: str, seed: int) -> Path:
    return folder / "cells" / f"{name}-{seed}.json"


def _report(folder: Path, arguments: CompareArguments, metrics: Sequence[str], failed: Sequence[dict[str, Any]]) -> str:
    """Writes the tables and the plot of all cells, including those of earlier calls, and returns what to print.

    Raises:
        ValueError: the file of a cell is damaged.
    """
    advice = "remove it, and the same command runs the cell again"
    cells = [read_json(path, advice) for path in sorted((folder / "cells").glob("*.json"))]
    order = {name: i for i, name in enumerate(METHODS)}
    cells.sort(key=lambda cell: (order.get(cell["method"], len(order)), cell["seed"]))
    rows = compare_report.summary(cells, metrics)
    (folder / "table.md").write_text(compare_report.markdown(rows, metrics), encoding="utf-8")
    compare_report.write_csv(rows, metrics, folder / "table.csv")
    name = arguments.task or Path(str(arguments.dataset)).name
    compare_report.plot(rows, cells, metrics[0], f"{name}, {Path(str(arguments.model)).name}", folder / "table.png")
    if arguments.json:
        return json.dumps({"rows": rows, "failed": list(failed), "output_dir": str(folder)}, ensure_ascii=False)
    return f"{compare_report.text(rows, metrics)}\n\n{folder}: table.md, table.csv, table.png, and one file per cell in cells/"
