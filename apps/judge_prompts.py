"""The prompts that the model answers while people judge: from a file, or those that ship with zorl."""

from __future__ import annotations

from pathlib import Path

from zorl.tables import EXTENSIONS, extension, read_table
from zorl.tasks import reviews
from zorl.text_files import read_text

COLUMN = "prompt"
LONGEST = 20_000  # characters


def built_in_prompts() -> list[str]:
    """Beginnings of film reviews for the embedded model, in words that it knows."""
    subjects = [*reviews.PARTS, *reviews.KINDS]
    return [f"the {subject} was" for subject in subjects] + [f"although the {part} was" for part in reviews.PARTS]


def read_prompts(path: Path) -> list[str]:
    """Prompts from a .txt file, one per line, or from the column `prompt` of a table, without duplicates.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds no prompt, or a prompt is not text; the message names the file and the row.
    """
    if extension(path) == ".txt":
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {str(path)!r}")
        values: list[object] = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    elif extension(path) in EXTENSIONS:
        table, (name,) = read_table(path, [COLUMN], [COLUMN])
        values = table.column(name).to_pylist()
    else:
        raise ValueError(
            f"{path}: expected a .txt file with one prompt per line, or {', '.join(EXTENSIONS)} with 'prompt'"
        )
    prompts = []
    for row, value in enumerate(values, 1):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{path}, prompt {row}: expected a text, found {value!r}")
        if len(value) > LONGEST:
            raise ValueError(f"{path}, prompt {row}: {len(value)} characters; expected at most {LONGEST}")
        prompts.append(value)
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return list(dict.fromkeys(prompts))
