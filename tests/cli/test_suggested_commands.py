"""The commands that training prints at its end."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import QUESTION, SHORT, Files, Outcome, train

pytestmark = pytest.mark.usefixtures("one_thread")


def suggested(text: str) -> list[list[str]]:
    """The commands that training prints at its end."""
    return [shlex.split(line)[1:] for line in text.partition("Try next")[2].splitlines() if line]


@pytest.mark.parametrize(
    "columns",
    [["--text_column", "text", "--label_column", "label"], ["--label_column", "label"], ["--text_column", "text"], []],
)
def test_the_commands_that_training_suggests_work(
    zorl: Callable[..., Outcome], files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = suggested(zorl(train(files, "out", *columns)).out)
    assert [words[0] for words in commands] == ["eval", "predict", "replay"]
    assert [zorl(words).code for words in commands] == [0, 0, 0]


def test_suggested_commands_read_the_same_split_of_a_data_set(
    zorl: Callable[..., Outcome], files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for split, name in (("train", "train"), ("validation", "dev")):
        (tmp_path / "data" / "two").mkdir(parents=True, exist_ok=True)
        shutil.copy(files.path(f"{name}.tsv"), tmp_path / "data" / "two" / f"{split}.tsv")
    card = 'configs:\n- config_name: two\n  sep: "\\t"\n  data_files:\n' + "".join(
        f"  - split: {split}\n    path: two/{split}.tsv\n" for split in ("train", "validation")
    )
    (tmp_path / "data" / "README.md").write_text(f"---\n{card}---\n")
    data = ["--dataset", "data", "--dataset_config", "two", "--eval_split", "validation"]
    outcome = zorl("train", "--model", files.bert, *data, *QUESTION, *SHORT, "--reward", "f1", "--output_dir", "out")
    assert outcome.code == 0, outcome.err
    score, predict, _ = suggested(outcome.out)
    assert zorl([*score, "--json"]).json["n"] == 24
    assert zorl([*predict, "--json"]).json["n"] == 24


@pytest.mark.parametrize(
    ("goal", "names"),
    [
        (["--reward", "squad_f1", "--label_column", "label"], ["eval", "predict", "replay"]),
        (["--loss", "cross_entropy"], ["predict", "replay"]),
    ],
)
def test_where_answers_are_text_training_suggests_eval_with_the_reward_or_not_at_all(
    zorl: Callable[..., Outcome],
    files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    goal: list[str],
    names: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    question = ["--prompt", "{text} it was", "--max_completion_length", "4", "--max_steps", "2"]
    outcome = zorl("train", "--model", files.gpt2, "--dataset", files.path("train.tsv"), *question, *goal)
    assert outcome.code == 0, outcome.err
    commands = suggested(outcome.out)
    assert [words[0] for words in commands] == names
    # Not the rows that were trained on: a name to fill in.
    assert all(words[words.index("--dataset") + 1] == "TEST.tsv" for words in commands if words[0] != "replay")
    shutil.copy(files.path("dev.tsv"), "TEST.tsv")
    assert {zorl(words).code for words in commands} == {0}
