"""The paper's tasks by name. Each is a file here that defines one `TASK`; to add a task, add a file."""

from __future__ import annotations

import importlib
import pkgutil

from zorl.suggestions import did_you_mean
from zorl.tasks.source import Hub as Hub
from zorl.tasks.task import Task as Task

_NO_TASKS = ("few_shot", "fields", "reviews", "source", "task")  # reviews: rows made for the demonstration


def names() -> list[str]:
    """The names of all tasks, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NO_TASKS)


def task(name: str) -> Task:
    """A task by the name of its file. No other task is imported.

    Raises:
        ValueError: there is no such task.
    """
    known = names()
    if name not in known:
        raise ValueError(f"there is no task {name!r}{did_you_mean(name, known)} (tasks: {', '.join(known)})")
    found: Task = importlib.import_module(f"zorl.tasks.{name}").TASK
    return found
