"""Tiny random models, and rows that two words tell apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runs import sentences
from compare_runs import REWARDS


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, parts: Callable[[str], Any]) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for kind in ("bert", "gpt2"):
        parts(kind).model.save_pretrained(folder / kind)
        parts(kind).tokenizer.save_pretrained(folder / kind)
    for seed, (name, size) in enumerate({"train": 64, "test": 30}.items()):
        rows = [f"{text}\t{label}" for text, label in sentences(size, seed)]
        (folder / f"{name}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")
    (folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
    return folder
