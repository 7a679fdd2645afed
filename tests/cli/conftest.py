"""The `zorl` command on tiny random models and files made here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cli_runs import REWARDS, Files, Outcome, sentences

from zorl.apps.cli import main


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory, parts: Callable[[str], Any]) -> Files:
    folder = tmp_path_factory.mktemp("files")
    for kind in ("bert", "gpt2"):
        parts(kind).model.save_pretrained(folder / kind)
        parts(kind).tokenizer.save_pretrained(folder / kind)
    for seed, (name, size) in enumerate({"train": 60, "dev": 24, "test": 30}.items()):
        rows = list(sentences(size, seed))
        lines = [f"{text}\t{label}" for text, label in rows]
        (folder / f"{name}.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
        (folder / f"{name}_bare.tsv").write_text("\n".join(lines) + "\n")
    (folder / "rewards.py").write_text(REWARDS)
    return Files(folder, str(folder / "bert"), str(folder / "gpt2"), str(folder / "rewards.py"))


@pytest.fixture
def zorl(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs a command in this process."""

    def run(*words: str | list[str]) -> Outcome:
        capsys.readouterr()
        code = main([w for word in words for w in (word if isinstance(word, list) else [word])])
        return Outcome(code, *capsys.readouterr())

    return run
