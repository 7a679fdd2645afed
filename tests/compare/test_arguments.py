"""What may be asked of `zorl compare`, and which settings one folder holds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from compare_runs import cells, words

from zorl.apps.cli import main
from zorl.apps.commands import COMPARE
from zorl.apps.compare_methods import METHODS, PUBLISHED_RATES, STANDARD

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "mezzo"], "--methods: there is no 'mezzo'; did you mean 'mezo' or"),
        (["--budget", "0"], "--budget must be at least 1, got 0"),
        (["--k_shot", "20"], "the label '0' has 32 rows, and 20 to train on with 20 to validate on make 40"),
        (["--metrics", "acuracy"], "unknown reward 'acuracy'"),
        (["--prompt", "{txt} it was {mask} ."], "txt"),
        (["--seeds", "-1"], "--seeds must be at least 0 and below 2**32, got -1"),
        (["--published_rates", "1e-4", "-1"], "--published_rates must be positive, got -1.0"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--max_length", "0"], "--max_length must be at least 1, got 0"),
    ],
)
def test_bad_arguments_get_a_sentence(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
):
    assert main(words(files, tmp_path / "out", *more)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists(), "a mistake does not claim the folder"


def test_a_comparison_without_cells_may_be_given_other_arguments(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    more = ["--methods", "mezo", "--seeds", "3", "--metrics", f"{files / 'rewards.py'}:right"]
    trajectory = tmp_path / "runs" / "mezo-3" / "trajectory.zorl"
    (files / "stop").write_text(str(trajectory))
    assert main(words(files, tmp_path, *more)) == 130
    assert trajectory.exists()
    assert main(words(files, tmp_path, *more, "--k_shot", "4", "--methods", "zero_shot")) == 0
    assert "begun with other arguments" in capsys.readouterr().err
    assert not trajectory.exists()
    assert cells(tmp_path)["zero_shot-3"]["train_rows"] == 8


def test_cells_of_other_settings_are_not_put_in_one_table(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    assert main(words(files, out, "--methods", "zero_shot", "--seeds", "1")) == 0
    assert main(words(files, out, "--methods", "zero_shot", "--seeds", "1", "--test_rows", "7")) == 2
    assert "holds a comparison with --test_rows" in capsys.readouterr().err

    assert main(words(files, out, "--methods", "zero_shot", "--seeds", "1", "--text_column", "0")) == 2
    assert "holds a comparison with --text_column" in capsys.readouterr().err


def test_cells_of_other_rows_or_another_reward_are_not_put_in_one_table(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, out = tmp_path / "files", tmp_path / "out"
    shutil.copytree(files, folder)
    command = words(
        folder, out, "--methods", "zero_shot", "--seeds", "1", "--metrics", f"{folder / 'rewards.py'}:right"
    )
    assert main(command) == 0
    for name, before, after in (("rewards.py", "float(c == str(t))", "float(c != str(t))"), ("test.tsv", "\t1", "\t0")):
        whole = (folder / name).read_text()
        assert before in whole
        (folder / name).write_text(whole.replace(before, after, 1))
        capsys.readouterr()
        assert main(command) == 2
        said = " ".join(capsys.readouterr().err.split())
        changed = f"{folder / name} has changed" if name.endswith(".py") else "its rows have changed"
        assert f"{out} holds a comparison, and {changed} since: one table cannot hold the results of both" in said
        (folder / name).write_text(whole)
    assert main(command) == 0


def test_the_learning_rates_of_the_published_recipe_can_be_given(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = words(files, tmp_path, "--methods", "mezo_published", "--seeds", "1", "--published_rates")
    assert main([*command, "3e-6"]) == 0
    found = cells(tmp_path)["mezo_published-1"]
    assert found["chosen"]["learning_rate"] == 3e-6
    assert found["forwards"] == 24 + 6
    assert main([*command, "1e-4"]) == 2
    assert "holds a comparison with --published_rates [3e-06], not [0.0001]" in capsys.readouterr().err
    assert all(f"{rate:.0e}".replace("e-0", "e-") in COMPARE.help() for rate in PUBLISHED_RATES)


def test_a_default_may_be_spelt_out_in_a_folder_that_was_begun_without_it(files: Path, tmp_path: Path):
    command = words(files, tmp_path, "--methods", "zero_shot", "--seeds", "1")
    assert main(command) == 0
    spelt_out = ["--test_rows", "1000", "--max_completion_length", "64", "--published_rates", "1e-5", "1e-4", "1e-3"]
    assert main([*command, *spelt_out]) == 0
    assert main([*command, "--test_rows", "999"]) == 2


def test_help_names_every_method():
    about = COMPARE.help()
    assert [name for name in METHODS if name not in about] == []
    assert set(STANDARD) <= set(METHODS)
