"""Cells are run once, kept, and gone on with; a cell that fails keeps no other one from its place."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from compare_runs import cells, words

from zorl.apps.cli import main
from zorl.apps.compare_methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_cells_are_run_once_and_make_one_table(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    assert main(words(files, out, "--methods", "zero_shot", "threshold", "--seeds", "1", "2")) == 0
    shown = capsys.readouterr().out
    assert "zero-shot" in shown
    assert "one fitted threshold per label" in shown
    first = {path: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}
    assert {path.stem for path in first} == {"zero_shot-1", "zero_shot-2", "threshold-1", "threshold-2"}

    assert main(words(files, out, "--methods", "zero_shot", "mezo", "--seeds", "1", "2", "--json")) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {path: path.stat().st_mtime_ns for path in first} == first, "what is done is not done again"
    rows = {row["method"]: row for row in answer["rows"]}
    assert list(rows) == ["zero_shot", "threshold", "mezo"], "cells of earlier calls stand in the table too"
    found = cells(out)
    assert rows["mezo"]["accuracy"] == pytest.approx((found["mezo-1"]["accuracy"] + found["mezo-2"]["accuracy"]) / 2)
    assert all(
        cell["forwards"] <= 24 and cell["train_rows"] == 16 and cell["test_rows"] == 30 for cell in found.values()
    )
    assert found["zero_shot-1"]["forwards"] == 0 < found["mezo-1"]["forwards"]
    assert not list((out / "runs").iterdir()), "a finished run leaves its figures alone behind"

    with (out / "table.csv").open(encoding="utf-8", newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["zero_shot", "threshold", "mezo"]
    assert (out / "table.md").read_text(encoding="utf-8").count("\n") == 5
    assert (out / "table.png").read_bytes().startswith(b"\x89PNG")


def test_a_cell_that_was_cut_short_goes_on_and_ends_the_same(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    more = ["--methods", "zero_shot", "mezo", "--seeds", "3", "--metrics", f"{files / 'rewards.py'}:right", "accuracy"]
    assert main(words(files, tmp_path / "straight", *more)) == 0
    trajectory = tmp_path / "broken" / "runs" / "mezo-3" / "trajectory.zorl"
    (files / "stop").write_text(str(trajectory))
    assert main(words(files, tmp_path / "broken", *more)) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert trajectory.exists()
    assert set(cells(tmp_path / "broken")) == {"zero_shot-3"}
    assert "| zero-shot |" in (tmp_path / "broken" / "table.md").read_text(encoding="utf-8")
    spent = trajectory.with_name("seconds.json")
    assert json.loads(spent.read_text(encoding="utf-8")) > 0.0
    spent.write_text("1000.0", encoding="utf-8")
    assert main(words(files, tmp_path / "broken", *more)) == 0
    expected, found = cells(tmp_path / "straight")["mezo-3"], cells(tmp_path / "broken")["mezo-3"]
    assert found["right"] == found["accuracy"]
    assert found["seconds"] > 1000.0, "the time before it was cut short counts"
    measured = ("seconds", "peak_memory_mb")
    assert {k: v for k, v in found.items() if k not in measured} == {
        k: v for k, v in expected.items() if k not in measured
    }


def test_a_cell_that_fails_is_named_and_tried_again_and_the_others_run(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    more = ["--methods", "zero_shot", "mezo", "--seeds", "1", "--json", "--metrics", f"{files / 'rewards.py'}:failing"]
    (files / "fail").touch()
    assert main(words(files, tmp_path, "--methods", "mezo", *more[3:])) == 2, "there is not one cell to report"
    capsys.readouterr()
    assert main(words(files, tmp_path, *more)) == 2
    shown = capsys.readouterr()
    (failed,) = json.loads(shown.out)["failed"]
    assert (failed["method"], failed["seed"]) == ("mezo", 1)
    assert "nothing to divide by" in failed["error"]
    assert failed["error"] in " ".join(shown.err.split())
    assert "zorl: error: failed: mezo with seed 1; the same command tries again" in shown.err
    assert set(cells(tmp_path)) == {"zero_shot-1"}
    assert "| zero-shot |" in (tmp_path / "table.md").read_text(encoding="utf-8")

    (files / "fail").unlink()
    assert main(words(files, tmp_path, *more)) == 0
    assert set(cells(tmp_path)) == {"zero_shot-1", "mezo-1"}


def test_a_file_that_cannot_be_written_stops_at_once(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "cells").touch()  # where the folder of that name belongs
    assert main(words(files, tmp_path, "--methods", "zero_shot", "threshold", "--seeds", "1")) == 2
    said = capsys.readouterr().err
    assert "File exists" in said
    assert "failed: " not in said
    assert "2 of 2 cells to run" in said
    assert f"{METHODS['threshold'].title}, seed 1" not in said, "the next cell was not begun"


def test_a_damaged_file_is_named_with_what_to_do(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    command = words(files, out, "--methods", "zero_shot", "--seeds", "1")
    assert main(command) == 0
    before = cells(out)
    note, cell = out / "comparison.json", out / "cells" / "zero_shot-1.json"
    whole = {path: path.read_text(encoding="utf-8") for path in (note, cell)}
    for path, advice in (
        (note, "remove the folder, and the same command starts afresh"),
        (cell, "remove it, and the same command runs the cell again"),
    ):
        path.write_text(whole[path][:20], encoding="utf-8")
        capsys.readouterr()
        assert main(command) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"{path} is damaged" in said
        assert advice in said
        path.write_text(whole[path], encoding="utf-8")
    cell.unlink()  # as advised
    assert main(command) == 0
    assert cells(out)["zero_shot-1"]["accuracy"] == before["zero_shot-1"]["accuracy"]
