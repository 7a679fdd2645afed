"""Which rows are learnt from, chosen by and reported on."""

from __future__ import annotations

from pathlib import Path

import pytest
from compare_runs import words

from zorl.apps.arguments import CompareArguments
from zorl.apps.cli import main
from zorl.apps.command_line import build, parse
from zorl.apps.commands import COMPARE
from zorl.apps.compare_cells import Comparison, _draw
from zorl.apps.inputs import load_task, make_prompt

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "data",
    [
        ["--dataset", "{folder}/train.tsv"],  # a file is one split, whatever a task calls for
        ["--dataset", "{folder}/train.tsv", "--test_dataset", "{folder}/train.tsv"],
        ["--dataset", "{folder}", "--dataset_split", "test"],
        ["--dataset", "{folder}"],
    ],
)
@pytest.mark.parametrize("more", [[], ["--k_shot", "4"]])
def test_no_row_is_reported_on_that_was_learnt_from(tmp_path: Path, files: Path, data: list[str], more: list[str]):
    for split in ("train", "test"):
        rows = [f"the {split} film number {i} was fine\t{i % 2}" for i in range(40)]
        (tmp_path / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n", encoding="utf-8")
    given = ["--model", str(files / "bert"), "--task", "sst2", *(word.format(folder=tmp_path) for word in data), *more]
    arguments = build(CompareArguments, parse(COMPARE, given))
    task = load_task("sst2")
    drawn, _ = _draw(arguments, make_prompt(arguments, task=task), task, seed=13)
    parts = [{row["text"] for row in part} for part in drawn]
    assert all(parts)
    assert sum(map(len, parts)) == len(set().union(*parts)), "a row is in two of them"
    assert ("test film" in next(iter(parts[2]))) == (data[-1] in ("{folder}", "test"))


@pytest.mark.parametrize(
    ("evaluated", "tested", "message"),
    [
        ("train.tsv", "test.tsv", "chosen on the 64 rows that are there to learn from"),
        ("test.tsv", "test.tsv", "chosen on the 30 rows that are there to report on"),
        ("test.tsv", "../{folder}/test.tsv", "chosen on the 30 rows that are there to report on"),
    ],
)
def test_settings_are_not_chosen_on_rows_that_are_learnt_from_or_reported_on(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], evaluated: str, tested: str, message: str
):
    more = ["--eval_dataset", str(files / evaluated), "--test_dataset", str(files / tested.format(folder=files.name))]
    assert main([*words(files, tmp_path / "out"), *more]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_file_is_the_same_under_another_name(files: Path, tmp_path: Path):
    again = str(files / ".." / files.name / "train.tsv")
    problem, test = Comparison([*words(files, tmp_path)[1:], "--test_dataset", again, "--k_shot", "4"]).problem(13)
    assert (len(problem.train), len(test)) == (8, 13)


def test_rows_of_ones_own_to_choose_on_leave_all_others_to_be_drawn(files: Path, tmp_path: Path):
    (tmp_path / "dev.tsv").write_text("text\tlabel\nthe film was great\t1\n", encoding="utf-8")
    own = ["--eval_dataset", str(tmp_path / "dev.tsv")]
    problem, _ = Comparison([*words(files, tmp_path)[1:], "--k_shot", "32", *own]).problem(13)
    assert (len(problem.train), len(problem.dev)) == (64, 1)
    few = Comparison([*words(files, tmp_path)[1:], "--k_shot", "16", *own]).problem(13)[0]
    assert few.train == Comparison([*words(files, tmp_path)[1:], "--k_shot", "16"]).problem(13)[0].train


@pytest.mark.parametrize(("drawn", "learnt"), [(["--k_shot", "4"], 8), (["--sample", "10", "6"], 10)])
def test_rows_are_drawn_beside_development_rows_of_ones_own(tmp_path: Path, files: Path, drawn: list[str], learnt: int):
    for split in ("train", "dev", "test"):
        rows = [f"the {split} film number {i} was fine\t{i % 2}" for i in range(40)]
        (tmp_path / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n", encoding="utf-8")
    given = ["--model", str(files / "bert"), "--task", "sst2", "--dataset", str(tmp_path), *drawn]
    task = load_task("sst2")
    for own, dev in (([], learnt if "--k_shot" in drawn else 6), (["--eval_dataset", str(tmp_path / "dev.tsv")], 40)):
        arguments = build(CompareArguments, parse(COMPARE, [*given, *own]))
        rows, _ = _draw(arguments, make_prompt(arguments, task=task), task, seed=13)
        assert (len(rows.train), len(rows.dev), len(rows.test)) == (learnt, dev, 40)
        assert all("train film" in row["text"] for row in rows.train)
        assert all(("dev film" in row["text"]) == bool(own) for row in rows.dev)
