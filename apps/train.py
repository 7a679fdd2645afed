"""`zorl train`: tunes a model on a metric, from the command line."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from zorl import MeZOConfig, MeZOTrainer, processes
from zorl.apps.arguments import TrainArguments
from zorl.apps.command_line import build, parse
from zorl.apps.commands import TRAIN
from zorl.apps.elapsed import NAME as SECONDS
from zorl.apps.elapsed import Elapsed
from zorl.apps.inputs import (
    check_model_folder,
    check_source,
    describe,
    draw,
    label_of,
    load,
    load_rewards,
    load_task,
    make_prompt,
    number,
    say,
    source_of,
    stop_of,
    with_trained_classes,
)
from zorl.apps.launcher import is_first
from zorl.apps.memory import peak_memory_mb
from zorl.apps.report import Begin
from zorl.classifier_models import sorted_labels
from zorl.data import hold_out
from zorl.interrupts import terminated_as_interrupted
from zorl.prompts import Prompt
from zorl.reward_functions import RewardError
from zorl.rewards import load_judge
from zorl.run_folder import RunFolder
from zorl.stopping import CONFIDENCE, looks_of, outlook
from zorl.tables import extension
from zorl.tasks import Task
from zorl.trajectory import TrajectoryError, read
from zorl.whole_files import read_json, write_json
from zorl.wording import counted

DEFAULT_STEPS = 250
HOUR = 3600.0
OUTPUT_DIR = "zorl_output"
Flags = Mapping[str, str | list[str] | None]  # of a command, by name


def run(argv: Sequence[str]) -> str:
    """Trains, and returns what to print.

    Raises:
        ValueError: an argument, the data or the run in `--output_dir` does not fit.
        KeyboardInterrupt: with a sentence on how to continue.
    """
    given = parse(TRAIN, argv)
    arguments = build(TrainArguments, given)
    task = load_task(arguments.task)
    check_source(arguments, task)
    assert arguments.model is not None
    if task is not None and all(goal is None for goal in (arguments.reward, arguments.judge, arguments.loss)):
        arguments.reward = [task.metric]
    _check_goal(arguments)
    check_model_folder(arguments.model)
    given.setdefault("output_dir", OUTPUT_DIR)
    folder = Path(given["output_dir"])
    if folder.resolve() == Path(arguments.model).resolve():
        raise ValueError(
            f"--output_dir {folder} is the model's own folder: the base would be overwritten; choose another"
        )

    prompt = with_trained_classes(make_prompt(arguments, task=task), arguments.model)
    asked_label = given.get("label_column")
    train_rows, eval_rows, label_column, prompt = _rows(arguments, given, prompt, task)
    if label_column is not None:
        given["label_column"] = label_column
    known = asked_label is not None or prompt.chooses or arguments.loss is not None or task is not None
    truth = label_column if known else None
    rewards = load_rewards(arguments.reward, truth)
    if arguments.metrics is None and label_column is not None and prompt.chooses:
        metrics = load_rewards(["accuracy", "f1"] if prompt.labels else ["accuracy"], label_column)
    else:
        metrics = load_rewards(arguments.metrics, truth)
    judge = (
        None if arguments.judge is None else load_judge(arguments.judge, column=truth, judgments=arguments.judgments)
    )

    resuming = RunFolder(folder).trajectory.exists()
    given["stop"] = stop_of(given.get("stop"), task)
    config = build(MeZOConfig, _with_defaults(given, eval_rows is not None))
    begin = Begin()
    with _no_empty(folder):
        trainer = MeZOTrainer(
            arguments.model,
            rewards or None,
            judge=judge,
            loss=arguments.loss,
            args=config,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            prompt=prompt,
            metrics=metrics or None,
            callbacks=[begin],
        )
        result = _train(trainer, resuming, begin)
    processes.leave()
    if arguments.json:
        return json.dumps(result)
    data = {"task": arguments.task, **_unseen(arguments, task), "text_column": arguments.text_column}
    scored = {"label_column": asked_label, "reward": None if prompt.chooses else arguments.reward or arguments.metrics}
    commands = _next_commands(result, arguments.model, data, scored, scorable=prompt.chooses or task is not None)
    return f"{_table(result)}\n\nTry next\n{commands}"


def _check_goal(arguments: TrainArguments) -> None:
    goals = ("reward", "judge", "loss")
    given = [f"--{name}" for name in goals if getattr(arguments, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise ValueError(f"give exactly one of --reward, --judge and --loss, such as --reward f1; got {found}")
    if arguments.judgments is not None and arguments.judge is None:
        raise ValueError("--judgments is only for --judge human: give both, or leave it out")
    if arguments.head not in (None, "classifier"):
        raise ValueError(f"--head takes classifier, got {arguments.head!r}")
    if arguments.head is not None and arguments.label_words is not None:
        raise ValueError("--head classifier and --label_words exclude each other: leave one of them out")


def _rows(
    arguments: TrainArguments, given: dict[str, Any], prompt: Prompt, task: Task | None
) -> tuple[Dataset, Dataset | None, str | None, Prompt]:
    """The training rows, the held-out rows (None if nothing is evaluated), the name of the label column, and the prompt.

    The classes of a new head are the labels of the rows.
    """
    wished = given.get("label_column")
    source = source_of(arguments, task)
    loaded = load(arguments, prompt, wished, task=task)
    new_head = arguments.head is not None and not prompt.labels
    label_column = label_of(loaded, prompt, source, needed=arguments.loss is not None or new_head)
    if new_head:
        prompt = replace(prompt, classes=sorted_labels(loaded.dataset[label_column]))
    train_rows, eval_rows = loaded.dataset, None
    classes = label_column if prompt.labels else None
    seed = int(given.get("seed", MeZOConfig.seed))
    own = arguments.eval_dataset is not None or arguments.eval_split is not None
    shots = draw(train_rows, arguments.k_shot, arguments.sample, seed=seed, label_column=classes, held_out=not own)
    if shots is not None:
        train_rows = shots.train
    if own:
        if arguments.judge is not None and not arguments.metrics:
            raise ValueError(
                "a judge yields no score to evaluate: name rewards with --metrics, or leave out --eval_dataset"
            )
        held = load(
            arguments,
            prompt,
            wished,
            task=task,
            source=arguments.eval_dataset,
            split=arguments.eval_split,
            task_split="validation",
        )
        needed = label_column is not None and (prompt.chooses or arguments.loss is not None)
        label_of(held, prompt, str(arguments.eval_dataset or source), needed=needed)
        eval_rows = held.dataset
        origin = arguments.eval_dataset or f"{source}, {arguments.eval_split}"
        say(f"{origin}: {describe(eval_rows, classes)} to evaluate on")
    elif given.get("eval_strategy") != "no" and (arguments.judge is None or arguments.metrics):
        train_rows, eval_rows = shots or hold_out(train_rows, classes)
        how = "stratified by label" if classes else "drawn at random"
        absent = set(prompt.labels) - ({str(label) for label in eval_rows[classes]} if classes else set(prompt.labels))
        say(f"no --eval_dataset: {len(eval_rows)} of {len(loaded.dataset)} rows are held out to evaluate on, {how}")
        if absent:
            say(
                f"none of them has the label {' or '.join(map(repr, sorted(absent)))}, so scores on them say nothing about it"
            )
    say(f"{source}: {describe(train_rows, classes)} to train on")
    return train_rows, eval_rows, label_column, prompt


def _with_defaults(given: dict[str, Any], evaluated: bool) -> dict[str, Any]:
    """The given settings and the defaults of the command line: ten evaluations and the start, of which the best is kept."""
    values = dict(given)
    if "num_train_epochs" not in values:
        values.setdefault("max_steps", DEFAULT_STEPS)
    strategy = values.get("eval_strategy", "steps")
    if not evaluated or strategy == "no":
        return values
    values |= {"eval_strategy": strategy, "eval_on_start": values.get("eval_on_start", True)}
    if strategy == "steps":
        # Ten times. With epochs the number of steps is not known yet, so Trainer gets a share.
        values.setdefault("eval_steps", math.ceil(values["max_steps"] / 10) if values.get("max_steps", 0) > 0 else 0.1)
        values.setdefault("save_steps", values["eval_steps"])
    if values.setdefault("save_strategy", strategy) == strategy:  # Trainer keeps no best step otherwise
        values.setdefault("load_best_model_at_end", True)
    return values


@contextmanager
def _no_empty(folder: Path) -> Iterator[None]:
    """Removes the folder of a new run that fails before its first step. Files that are not the run's own stay."""
    new, run = not folder.exists(), RunFolder(folder)
    try:
        yield
    except BaseException:
        if new and is_first() and folder.exists():
            with suppress(TrajectoryError, OSError), run.claimed():  # or another run has taken the folder since
                if not (run.trajectory.exists() and read(run.trajectory)[1]):
                    for path in (run.trajectory, run.init, run.state, folder / SECONDS, *folder.glob("*.lock")):
                        path.unlink(missing_ok=True)
                    folder.rmdir()
        raise


def _train(trainer: MeZOTrainer, resuming: bool, begin: Begin) -> dict[str, Any]:
    """Trains and saves the model. Returns the results of the run."""
    folder = trainer.folder.path
    if resuming:
        say(f"{folder} already holds a run: the same settings continue it, another --output_dir starts a new one")
    elapsed = Elapsed(folder, time.perf_counter())
    if is_first():
        trainer.add_callback(elapsed)
    try:
        with terminated_as_interrupted():
            trainer.train(resume_from_checkpoint=resuming)
    except KeyboardInterrupt:
        if trainer.mezo is None or not trainer.mezo.steps:
            raise KeyboardInterrupt("stopped before the first step; nothing was changed") from None
        raise KeyboardInterrupt(
            f"stopped after step {trainer.mezo.steps}; nothing is lost: the same command continues from there"
        ) from None
    except RewardError as error:
        if trainer.mezo is None or not trainer.mezo.steps:
            raise
        kept = counted(trainer.mezo.steps, "step is", "steps are")
        raise RewardError(f"{error}; {kept} kept, and the same command continues from there") from error
    seconds = elapsed.seconds
    assert trainer.mezo is not None
    stored = folder / "result.json"
    if begin.step >= trainer.state.max_steps:
        steps = trainer.mezo.steps
        say(
            f"the run in {folder} is finished: it has {counted(steps, 'step', 'steps')}. To extend it, repeat the command with a "
            f"larger --max_steps, such as {2 * steps}; for a new run, choose another --output_dir"
        )
        if stored.is_file():
            result: dict[str, Any] = read_json(stored, "remove it, and the same command writes it again")
            if result.get("weights_sha256") == trainer.tuned.sha256():
                return result
    trainer.save_model()
    result = _result(trainer, seconds)
    if is_first():
        write_json(stored, result)
    return result


def _result(trainer: MeZOTrainer, seconds: float) -> dict[str, Any]:
    """The results of a run: `start_*` before training, `eval_*` with the weights that were saved."""
    mezo = trainer.mezo
    assert mezo is not None
    step = trainer.step
    log = [entry for entry in trainer.state.log_history if "eval_runtime" in entry]
    figures: dict[str, Any] = {}
    for prefix, at in (("start", 0), ("eval", step)):
        entry = next((entry for entry in log if entry["step"] == at), {})
        for name, value in entry.items():
            if name.startswith("eval_") and name not in ("eval_runtime", "eval_samples_per_second", "eval_forwards"):
                figures[f"{prefix}_{name.removeprefix('eval_')}"] = number(value)
    share = mezo.informative_share
    forwards, scores = looks_of(trainer.state.log_history, trainer.metric)
    hour = outlook(forwards, scores, times=1.0 + HOUR / max(seconds, 1e-9))
    hour = hour if hour is not None and hour.can_be_told(scores) else None
    return {
        **figures,
        "another_hour": None if hour is None else [number(round(x, 5)) for x in (hour.gain, hour.low, hour.high)],
        "objective": trainer.objective_name,
        "steps": mezo.steps,
        "saved_step": step,
        "forwards": trainer.forwards,
        "seconds": round(seconds, 2),
        "peak_memory_mb": round(peak_memory_mb()),
        "informative_share": number(round(share, 4)),
        "seed": trainer.args.seed,
        "output_dir": str(trainer.folder.path),
        "weights_sha256": trainer.tuned.sha256(),
    }


def _table(result: dict[str, Any]) -> str:
    """The results as a table for people."""
    names = [name.removeprefix("eval_") for name in result if name.startswith("eval_")]
    width = max(map(len, [*names, "held out"]))
    lines = [f"{'held out':<{width}}  {'start':>8}  {'step ' + str(result['saved_step']):>9}"] if names else []
    for name in names:
        before, after = result.get(f"start_{name}"), result[f"eval_{name}"]
        lines.append(f"{name:<{width}}  {_shown(before):>8}  {_shown(after):>9}")
    share = result["informative_share"]
    if share == 0.0:
        lines.append(
            "No direction made a difference to what is optimised, so the model is as it was: try a larger --epsilon."
        )
    elif names and not result["saved_step"]:
        lines.append(
            "No step did better on the held-out rows than the start, so the start is what was saved: train longer or with larger "
            "batches."
        )
    figures = [
        counted(result["steps"], "step", "steps"),
        f"{counted(result['forwards'], 'forward pass', 'forward passes')} of a batch",
        f"{result['seconds']:.0f} s",
        f"peak memory {result['peak_memory_mb']} MB",
        *([] if share is None else [f"{share:.0%} of the directions informative"]),
    ]
    if (hour := result.get("another_hour")) is not None and None not in hour:
        lines.append(
            f"Another hour would probably change the held-out score by {hour[0]:+.3f} ({CONFIDENCE:.0%}: {hour[1]:+.3f} to "
            f"{hour[2]:+.3f}), if the trend of the later evaluations continues."
        )
    saved = f"saved in {result['output_dir']}: the weights of step {result['saved_step']}"
    return "\n".join([*lines, ", ".join(figures), f"{saved} (SHA-256 {result['weights_sha256'][:16]}…)"])


def _shown(value: float | None) -> str:
    return "—" if value is None else f"{value:.4f}"


def _next_commands(result: dict[str, Any], model: str, data: Flags, scored: Flags, *, scorable: bool) -> str:
    """Commands that score, apply and rewind the tuned model.

    Args:
        data: flags that say which rows to read.
        scored: further flags of `zorl eval`.
        scorable: whether `zorl eval` knows what to compute without `--reward`.
    """
    out, until = result["output_dir"], max(1, result["saved_step"] // 2)
    tuned, folder = {"model": out}, out.rstrip("/")
    commands: dict[str, Flags] = {
        "eval": {**tuned, **data, **scored},
        "predict": {**tuned, **data, "output": "predictions.jsonl"},
        "replay": {
            "model": model,
            "trajectory": f"{folder}/trajectory.zorl",
            "until": str(until),
            "output_dir": f"{folder}-step{until}",
        },
    }
    if not scorable and scored["reward"] is None:
        del commands["eval"]
    return "\n".join(f"  {shlex.join(['zorl', name, *_words(flags)])}" for name, flags in commands.items())


def _unseen(arguments: TrainArguments, task: Task | None) -> dict[str, str | None]:
    """Flags that name rows to score that were not trained on: a placeholder where the command had none."""
    dataset, split = arguments.eval_dataset or arguments.dataset, arguments.eval_split
    path = Path(str(dataset))
    if arguments.eval_dataset is None and split is None and path.is_file():
        dataset = f"TEST{extension(path)}"
    elif arguments.eval_dataset is None and split is None and task is None:
        split = "TEST"
    elif split is None and task is None:
        split = arguments.dataset_split
    # A task without a split is scored on its test split.
    return {"dataset": dataset, "dataset_config": arguments.dataset_config, "dataset_split": split}


def _words(flags: Flags) -> list[str]:
    """Flags as words of a command line, without those that have no value."""
    words = []
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}", *([value] if isinstance(value, str) else value)]
    return words
