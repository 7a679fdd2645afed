"""What `zorl` alone and `--help` say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
from cli_runs import Files, Outcome

from zorl.apps.commands import COMMANDS, TRAIN

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_zorl_alone_teaches(zorl: Callable[..., Outcome], words: list[str]) -> None:
    outcome = zorl(words)
    assert outcome.code == 0
    for name in COMMANDS:
        assert f"zorl {name}" in outcome.out


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from zorl.apps.cli import main; main([]); main(['eval', '--help']); main(['replay', '--help']); "
        "assert not {'torch', 'transformers', 'sklearn', 'datasets'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_what_is_loaded_on_the_way_keeps_quiet(files: Files) -> None:
    """torchao and bitsandbytes, where they are installed, tell of kernels that they did not find."""
    words = [sys.executable, "-m", "zorl.apps.cli", "train", "--model", files.gpt2, "--dataset", "nowhere.tsv"]
    done = subprocess.run(
        [*map(str, words), "--reward", "f1"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if not line.startswith("zorl: ")] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_flag_of_a_command_that_matters(zorl: Callable[..., Outcome], name: str) -> None:
    outcome = zorl(name, "--help")
    assert outcome.code == 0
    for flags in COMMANDS[name].sections.values():
        for flag in flags.split():
            assert re.search(rf"^  --{flag}\b", outcome.out, re.MULTILINE)
    assert "Examples" in outcome.out


def test_help_of_train_leaves_inherited_flags_to_help_all(zorl: Callable[..., Outcome]) -> None:
    assert "--torch_compile_backend" not in zorl("train", "--help").out
    everything = zorl("train", "--help_all").out
    assert all(f"  --{name}" in everything for name in TRAIN.fields())
