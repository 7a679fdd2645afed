"""Files that are written whole or not at all, even if the process is killed or the disk is full."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

_WHAT_TO_DO = "make sure that there is room and permission to write, then start again; nothing is lost"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to. It replaces `path` when the block ends, and is deleted if the block raises.

    Raises:
        OSError: it could not be written, as on a full disk. `path` is unchanged.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        with writing(path):
            yield new
            with new.open("r+b") as file:  # Windows syncs only what it may write
                os.fsync(file.fileno())  # otherwise a power cut could leave the new name on an empty file
            new.replace(path)
    except BaseException:
        with suppress(OSError):  # the folder cannot be written to, so there is nothing to delete
            new.unlink(missing_ok=True)
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns whatever goes wrong in writing `path` into one sentence.

    Raises:
        OSError: with the path, and what to do.
    """
    try:
        yield
    except SafetensorError as error:  # a disk error as well, for which it has no class of its own
        raise OSError(f"{path} could not be written: {error}; {_WHAT_TO_DO}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"could not be written: {reason}; {_WHAT_TO_DO}", str(path)) from error


def write_json(path: Path, values: Any, indent: int | None = 2) -> None:
    """Writes values as JSON, whole or not at all.

    Raises:
        OSError: as for `whole_file`.
    """
    with whole_file(path) as new:
        new.write_text(json.dumps(values, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, loss: str) -> Any:
    """The values of a JSON file that was written here.

    Args:
        loss: what to do if it is damaged, and what that costs.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {loss}") from None
