"""The cells of a comparison: a method and a seed each."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from zorl.apps.arguments import CompareArguments
from zorl.apps.command_line import build, parse
from zorl.apps.commands import COMPARE
from zorl.apps.compare_methods import METHODS, PUBLISHED_RATES, Method
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
from zorl.baselines.problem import NotApplicable, Problem
from zorl.data import hold_out, rows_sha256
from zorl.prompts import Prompt
from zorl.reward_functions import RewardFunctions
from zorl.rewards import load_reward
from zorl.tasks import Task
from zorl.whole_files import write_json

ROWS = "its rows"  # in messages, and in the note on what cells have in common


class Cell(NamedTuple):
    """One run of one method."""

    seed: int
    method: str


class Rows(NamedTuple):
    """The rows that one seed draws."""

    train: list[dict[str, Any]]
    dev: list[dict[str, Any]]
    test: list[dict[str, Any]]


class Comparison:
    """What the cells of a call of `zorl compare` have in common, and the rows of the latest seed.

    Args:
        argv: the call's arguments.

    Attributes:
        arguments: with the defaults that depend on the task or the prompt.
        metrics: the names of the rewards that are reported; methods maximise the first.
        folder: where cells and tables are kept.

    Raises:
        ValueError: an argument or the data does not fit.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        self.arguments = arguments = build(CompareArguments, parse(COMPARE, argv))
        self.task = load_task(arguments.task)
        check_source(arguments, self.task)
        check_model_folder(str(arguments.model))
        arguments.stop = stop_of(arguments.stop, self.task)
        arguments.published_rates = arguments.published_rates or list(PUBLISHED_RATES)
        self.prompt = make_prompt(arguments, task=self.task)
        self._rewards = arguments.metrics = arguments.metrics or _default_metrics(self.prompt, self.task)
        self.metrics = [RewardFunctions(load_reward(reward)).names[0] for reward in self._rewards]
        self.folder = Path(arguments.output_dir)
        self._drawn: tuple[Problem, list[dict[str, Any]]] | None = None

    def problem(self, seed: int) -> tuple[Problem, list[dict[str, Any]]]:
        """What the methods are given with a seed, and the rows to report on.

        Raises:
            ValueError: the data does not fit.
        """
        if self._drawn is None or self._drawn[0].seed != seed:
            arguments = self.arguments
            rows, label_column = _draw(arguments, self.prompt, self.task, seed)
            problem = Problem(
                model=str(arguments.model), prompt=self.prompt, train=rows.train, dev=rows.dev, label_column=label_column,
                batch_size=arguments.batch_size, budget=arguments.budget, seed=seed,
                reward=load_reward(self._rewards[0], column=label_column),
                max_length=arguments.max_length, max_completion_length=arguments.max_completion_length,
                stop=arguments.stop or None,
            )  # fmt: skip
            self._drawn = problem, rows.test
        return self._drawn

    def contents(self) -> dict[str, str]:
        """The SHA-256 of the rows, as a seed of no cell draws them, and of the files of rewards and the task, by name."""
        rows, _ = _draw(self.arguments, self.prompt, self.task, seed=0)
        named = [reward.rpartition(":")[0] for reward in self._rewards] + [str(self.arguments.task)]
        files = sorted({name for name in named if name.endswith(".py")})
        read = {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in files}
        return {ROWS: rows_sha256([*rows.train, *rows.dev, *rows.test]), **read}

    def path(self, cell: Cell) -> Path:
        """Where a cell's results are, once it has run."""
        return self.folder / "cells" / f"{cell.method}-{cell.seed}.json"

    def run(self, cell: Cell) -> str | None:
        """Runs a cell and writes its results. Returns why it failed, if it did.

        Raises:
            ValueError: the data does not fit.
            OSError: a file could not be read or written, which would stop the other cells, too.
        """
        problem, test = self.problem(cell.seed)
        method, work = METHODS[cell.method], self.folder / "runs" / f"{cell.method}-{cell.seed}"
        try:
            results = self._results(method, problem, test, work)
        except OSError:
            raise
        except Exception as error:
            if os.environ.get("ZORL_TRACEBACK"):
                raise
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
        path = self.path(cell)
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"method": cell.method, "title": method.title, "seed": cell.seed, **results})
        shutil.rmtree(work, ignore_errors=True)
        return None

    def _results(self, method: Method, problem: Problem, test: list[dict[str, Any]], work: Path) -> dict[str, Any]:
        fit = partial(method.fit, rates=self.arguments.published_rates) if method.takes_rates else method.fit
        before = elapsed(work)  # of a run that continues
        start = time.perf_counter()
        try:
            with peak_memory(problem.device) as peak:
                fitted = fit(problem, work)
                learning = before + time.perf_counter() - start
                answers = fitted.answers(test)
        except NotApplicable as error:
            return {"not_applicable": str(error)}
        judged = [replace(problem, reward=load_reward(r, column=problem.label_column)) for r in self._rewards]
        scores = [one.score(test, answers) for one in judged]
        return {
            **{name: number(round(score, 6)) for name, score in zip(self.metrics, scores, strict=True)},
            "forwards": fitted.forwards, "seconds": round(learning, 1),
            "peak_memory_mb": None if peak.megabytes is None else round(peak.megabytes), "chosen": fitted.chosen,
            "train_rows": len(problem.train), "test_rows": len(test),
        }  # fmt: skip


def _default_metrics(prompt: Prompt, task: Task | None) -> list[str]:
    if not prompt.labels:
        return ["squad_f1", "exact_match"] if task is None else [task.metric]
    return list(dict.fromkeys([*([] if task is None else [task.metric]), "accuracy", "f1"]))


def _draw(arguments: CompareArguments, prompt: Prompt, task: Task | None, seed: int) -> tuple[Rows, str]:
    """The rows of a seed, and the name of the label column.

    Raises:
        ValueError: the data does not fit, or the rows of --eval_dataset are those to learn from, or to report on.
    """
    wished, source = arguments.label_column, source_of(arguments, task)
    train = load(arguments, prompt, wished, task=task)
    label_column = label_of(train, prompt, source, needed=True) or "label"
    classes = label_column if prompt.labels else None
    train_rows = train.dataset
    split = arguments.test_split or (None if task is None else "test")
    tested = load(arguments, prompt, wished, task=task, source=arguments.test_dataset, split=split).dataset
    if _same(train_rows, tested):
        train_rows, tested = hold_out(train_rows, classes)
        say(f"no --test_dataset: {len(tested)} of {len(train.dataset)} rows are held out to report on")
    dev = None
    if arguments.eval_dataset is not None:
        split = None if task is None else "validation"
        dev = load(arguments, prompt, wished, task=task, source=arguments.eval_dataset, split=split).dataset
        for rows, what in ((train.dataset, "to learn from"), (tested, "to report on")):
            if _same(dev, rows):
                raise ValueError(
                    f"--eval_dataset: settings would be chosen on the {len(dev)} rows that are there {what}; name other rows, or "
                    "leave it out, and some of --dataset are held out"
                )
    shots = draw(train_rows, arguments.k_shot, arguments.sample, seed=seed, label_column=classes, held_out=dev is None)
    if dev is None:
        learnt, dev = shots or hold_out(train_rows, classes)
    else:
        learnt = train_rows if shots is None else shots.train
    rows = tested.to_list()
    if len(rows) > arguments.test_rows:
        rows = random.Random(0).sample(rows, arguments.test_rows)  # the same rows for all seeds
    return Rows(learnt.to_list(), dev.to_list(), rows), label_column


def _same(first: Dataset, second: Dataset) -> bool:
    """Whether two sources, however they are named, hold the same rows. A file has only one split."""
    return len(first) == len(second) and first.to_list() == second.to_list()
