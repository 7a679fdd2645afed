"""`zorl compare`: runs several methods on the same rows, within the same budget of forward passes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from zorl.apps import compare_report
from zorl.apps.arguments import CompareArguments
from zorl.apps.compare_cells import ROWS, Cell, Comparison
from zorl.apps.compare_methods import METHODS, STANDARD
from zorl.apps.compare_processes import in_processes
from zorl.apps.inputs import say
from zorl.apps.partial_result import PartialResult
from zorl.suggestions import did_you_mean
from zorl.whole_files import read_json, write_json

LARGEST_SEED = 1 << 32  # numpy's global generator, which Trainer seeds, takes no larger ones
NOTE = "comparison.json"  # what a folder's cells have in common
# Arguments that two comparisons must share for their cells to stand in one table.
SAME = (
    "model", "task", "dataset", "eval_dataset", "test_dataset", "dataset_config", "dataset_split", "test_split", "text_column",
    "prompt", "label_words", "options", "chat", "system", "label_column", "k_shot", "sample", "test_rows", "budget", "batch_size",
    "metrics", "max_length", "max_completion_length", "stop", "published_rates",
)  # fmt: skip


def run(argv: Sequence[str]) -> str:
    """Runs the missing cells, writes the tables and the plot, and returns what to print.

    Raises:
        ValueError: an argument or the data does not fit, or the folder holds another comparison or a damaged file.
        PartialResult: some cells failed. The others are in the tables, which it holds.
        OSError: a file could not be read or written. The remaining cells would meet the same disk, so none of them runs.
        KeyboardInterrupt: with a sentence on how to continue. The tables hold the finished cells.
    """
    comparison = Comparison(argv)
    arguments, folder = comparison.arguments, comparison.folder
    methods = _chosen(arguments)
    same = json.loads(json.dumps({name: getattr(arguments, name) for name in SAME}))
    _check_same(folder, same)
    same |= comparison.contents()
    _check_same(folder, same)
    cells = [Cell(seed, name) for seed in arguments.seeds for name in methods]
    todo = [cell for cell in cells if not comparison.path(cell).exists()]
    say(
        f"{len(todo)} of {len(cells)} cells to run: {len(methods)} methods, {len(arguments.seeds)} "
        f"seeds, at most {arguments.budget} forward passes of {arguments.batch_size} rows each"
    )
    failed: list[dict[str, Any]] = []
    try:
        if todo:
            comparison.problem(todo[0].seed)  # a mistake in the arguments or the data does not claim the folder
            _claim(folder, same)
        several = arguments.jobs > 1 and len(todo) > 1
        with (
            tqdm(total=len(todo), unit="cell") as bar,
            closing(
                in_processes(argv, todo, arguments.jobs) if several else _in_turn(comparison, todo, bar)
            ) as running,
        ):
            for cell, error in running:
                if error is not None:
                    failed.append({"method": cell.method, "seed": cell.seed, "error": error})
                    title = METHODS[cell.method].title
                    say(f"{title}, seed {cell.seed}: {error} (ZORL_TRACEBACK=1 shows where)")
                bar.update()
    except KeyboardInterrupt:
        if (folder / "cells").exists():
            _report(comparison, failed)
        raise KeyboardInterrupt("stopped; finished cells are kept, and the same command continues") from None
    result = _report(comparison, failed)
    if failed:
        which = ", ".join(f"{cell['method']} with seed {cell['seed']}" for cell in failed)
        raise PartialResult(f"failed: {which}; the same command tries again", result)
    return result


def _in_turn(comparison: Comparison, cells: Sequence[Cell], bar: tqdm[Any]) -> Generator[tuple[Cell, str | None]]:
    """Runs the cells, and yields each with the reason why it failed, if it did. The bar names the one that runs."""
    for cell in cells:
        bar.set_postfix_str(f"{METHODS[cell.method].title}, seed {cell.seed}")
        yield cell, comparison.run(cell)


def _chosen(arguments: CompareArguments) -> list[str]:
    methods = list(dict.fromkeys(arguments.methods or STANDARD))
    unknown = next((name for name in methods if name not in METHODS), None)
    if unknown is not None:
        known = f"{did_you_mean(unknown, METHODS)} (methods: {', '.join(METHODS)})"
        raise ValueError(f"--methods: there is no {unknown!r}{known}")
    for name in ("budget", "batch_size", "test_rows", "max_length", "max_completion_length", "jobs"):
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
    changed = [name for name in same if same[name] != before.get(name, None if name in SAME else same[name])]
    if changed:
        name = changed[0]
        if name not in SAME:
            raise ValueError(
                f"{folder} holds a comparison, and {name} {'have' if name == ROWS else 'has'} changed since: one table cannot "
                "hold the results of both; choose another --output_dir"
            )
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


def _report(comparison: Comparison, failed: Sequence[dict[str, Any]]) -> str:
    """Writes the tables and the plot of all cells, including those of earlier calls, and returns what to print.

    Raises:
        ValueError: the file of a cell is damaged.
    """
    arguments, metrics, folder = comparison.arguments, comparison.metrics, comparison.folder
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
