"""`zorl compare`: cells that are kept, one table, and what each method is given."""

from __future__ import annotations

import csv
import json
import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoModelForMaskedLM

from zorl import MeZOConfig, Prompt
from zorl.apps import compare_methods
from zorl.apps.arguments import CompareArguments
from zorl.apps.cli import main
from zorl.apps.command_line import build, parse
from zorl.apps.commands import COMPARE
from zorl.apps.compare_cells import Comparison, _draw
from zorl.apps.compare_methods import METHODS, PUBLISHED_RATES, STANDARD, _calibration_rows
from zorl.apps.compare_report import markdown, summary, text
from zorl.apps.inputs import load_task, make_prompt
from zorl.baselines.problem import Problem

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = {"0": ("bad", "terrible"), "1": ("good", "great")}
QUESTION = ["--prompt", "{text} it was {mask} .", "--label_words", "0=terrible", "1=great"]
REWARDS = '''
import os
import signal
import time
from pathlib import Path

def right(completions, label, **columns):
    """The share that is right; it stops the process once, when the file that `stop` names is there."""
    stop = Path(__file__).with_name("stop")
    if stop.exists() and Path(stop.read_text()).exists():
        stop.unlink()
        raise KeyboardInterrupt
    return [float(c == str(t)) for c, t in zip(completions, label)]

def failing(completions, label, **columns):
    """Fails outside of the 30 test rows, as long as the file `fail` is there."""
    if len(completions) != 30 and Path(__file__).with_name("fail").exists():
        raise ZeroDivisionError("nothing to divide by")
    return right(completions, label)

def gpu(completions, **columns):
    return [float(os.environ["CUDA_VISIBLE_DEVICES"][:1]) for _ in completions]

def slow(completions, label, **columns):
    time.sleep(0.5)
    return right(completions, label)

def killed(completions, label, **columns):
    """Kills its process outside of the 30 test rows, as long as the file `fail` is there."""
    if len(completions) != 30 and Path(__file__).with_name("fail").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return right(completions, label)

def inapplicable(completions, **columns):
    return [None] * len(completions)
'''


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, parts: Callable[[str], Any]) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for kind in ("bert", "gpt2"):
        parts(kind).model.save_pretrained(folder / kind)
        parts(kind).tokenizer.save_pretrained(folder / kind)
    for seed, (name, size) in enumerate({"train": 64, "test": 30}.items()):
        rng = random.Random(seed)
        rows = [
            f"the {rng.choice(['film', 'plot'])} was {rng.choice(WORDS[label])}\t{label}"
            for label in "01" * (size // 2)
        ]
        (folder / f"{name}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")
    (folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
    return folder


def words(files: Path, out: Path, *more: str, model: str = "bert") -> list[str]:
    data = ["--dataset", str(files / "train.tsv"), "--test_dataset", str(files / "test.tsv"), "--k_shot", "8"]
    size = ["--budget", "24", "--batch_size", "8"]
    return ["compare", "--model", str(files / model), *data, *QUESTION, *size, "--output_dir", str(out), *more]


def cells(out: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (out / "cells").glob("*.json")}


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


def test_every_method_for_label_words_learns_or_says_why_not(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    methods = [name for name in METHODS if name != "mezo_f1"]  # `mezo` with a reward that takes longer
    assert main(words(files, out, "--methods", *methods, "--seeds", "1")) == 0
    shown, found = capsys.readouterr().out, cells(out)
    assert set(found) == {f"{name}-1" for name in methods}
    assert {name for name, cell in found.items() if "not_applicable" in cell} == {"grpo-1", "mezo_expectation-1"}
    assert found["grpo-1"]["not_applicable"] in shown
    evaluation = ["eval", "--model", str(files / "bert"), "--dataset", str(files / "test.tsv"), *QUESTION, "--json"]
    assert main(evaluation) == 0
    assert found["zero_shot-1"]["accuracy"] == json.loads(capsys.readouterr().out)["accuracy"]
    right = [cell["accuracy"] * 30 for cell in found.values() if "not_applicable" not in cell]
    assert right == pytest.approx([round(n) for n in right])
    for tuned in ("mezo-1", "mezo_lora-1", "mezo_one_point-1", "lp_mezo-1", "fine_tuning-1", "mezo_n_spsa-1",
                  "mezo_variance-1", "mezo_forward_gradient-1"):  # fmt: skip
        assert 0 < found[tuned]["forwards"] <= 24
    assert found["mezo_published-1"]["forwards"] <= 24 + 3 * 6


@pytest.mark.parametrize("budget", [2, 9])
def test_no_run_spends_more_than_the_budget(files: Path, tmp_path: Path, budget: int):
    methods = ["label_head", "threshold", "mezo", "mezo_two_sided", "mezo_published", "lp_mezo"]
    # The training rows, which the calibration would read as a whole, are 16 forwards.
    rows = ["--batch_size", "2", "--k_shot", "16", "--test_rows", "4", "--budget", str(budget)]
    assert main(words(files, tmp_path, *rows, "--methods", *methods, "--seeds", "1")) == 0
    found = cells(tmp_path)
    assert set(found) == {f"{name}-1" for name in methods}
    refused = {
        name.removesuffix("-1"): cell["not_applicable"] for name, cell in found.items() if "forwards" not in cell
    }
    assert all("raise it" in reason for reason in refused.values())
    assert ("mezo" in refused) == (budget < 3)
    assert ("mezo_published" in refused) == (budget < 8)
    assert not {"label_head", "threshold"} & set(refused)
    for name, cell in found.items():
        if "forwards" in cell:  # the published recipe tries three rates first, each with a quarter of the budget
            limit = budget + 3 * (budget // 4) if "published" in name else budget
            assert 0 < cell["forwards"] <= limit, name


def test_measuring_gradient_norms_is_paid_for(files: Path, tmp_path: Path):
    more = ["--methods", "mezo_expectation", "--seeds", "1", "--budget"]
    assert main(words(files, tmp_path / "small", *more, "24")) == 0
    assert "raise it" in cells(tmp_path / "small")["mezo_expectation-1"]["not_applicable"]
    model = AutoModelForMaskedLM.from_pretrained(files / "bert")
    enough = 2 + 2 * len(list(model.parameters())) + 5  # to calibrate, to measure, and for two steps of two
    assert main(words(files, tmp_path / "large", *more, str(enough))) == 0
    assert cells(tmp_path / "large")["mezo_expectation-1"]["forwards"] == enough - 1


@pytest.mark.parametrize("name", ["mezo", "lp_mezo", "mezo_published"])
def test_every_method_chooses_by_the_reward_and_may_stay_where_it_began(files: Path, tmp_path: Path, name: str):
    comparison = Comparison(words(files, tmp_path, "--metrics", "accuracy", "--budget", "48")[1:])
    problem, _ = comparison.problem(5)
    fitted = METHODS[name].fit(problem, tmp_path / "run")
    score = problem.score(problem.dev, fitted.answers(problem.dev))
    assert fitted.chosen["dev_score"] == pytest.approx(score, abs=1e-6)
    state = json.loads(
        (tmp_path / "run" / ("best" if name == "mezo_published" else "") / "trainer_state.json").read_text()
    )
    looks = {entry["step"]: entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry}
    assert min(looks) == 0
    assert len(looks) > 5
    assert max(looks.values()) == pytest.approx(score, abs=1e-6)
    assert fitted.chosen["step"] == min(step for step, value in looks.items() if value == max(looks.values()))


def test_the_bar_of_a_run_ends_at_what_it_spent(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bars: list[list[int]] = []  # the total, and then each report

    @contextmanager
    def progress(method: str, forwards: int, report: None) -> Iterator[Callable[[int], object]]:
        bars.append([forwards])
        yield bars[-1].append

    monkeypatch.setattr(compare_methods, "progress", progress)
    methods = ["mezo", "mezo_two_sided", "mezo_expectation", "mezo_forward_gradient"]
    assert main(words(files, tmp_path, "--methods", *methods, "--seeds", "1", "--budget", "91")) == 0
    spent = [cells(tmp_path)[f"{name}-1"]["forwards"] for name in methods]
    assert [(total, sum(reports)) for total, *reports in bars] == [(forwards, forwards) for forwards in spent]
    assert all(len(bar) > 2 for bar in bars)


def test_macro_f1_of_free_text_does_not_apply(files: Path, tmp_path: Path):
    data = ["--dataset", str(files / "train.tsv"), "--prompt", "{text} so", "--test_rows", "4", "--budget", "4"]
    more = ["--methods", "mezo_f1", "--seeds", "1", "--output_dir", str(tmp_path)]
    assert main(["compare", "--model", str(files / "gpt2"), *data, *more]) == 0
    assert "needs a prompt with labels" in cells(tmp_path)["mezo_f1-1"]["not_applicable"]


def test_the_calibration_reads_its_usual_rows_where_the_budget_pays_for_them():
    rows = [{"text": f"film {i}", "label": str(i % 2)} for i in range(2000)]
    paper = Problem(
        "model", Prompt("{text} {mask}", {"0": "bad", "1": "good"}), rows, rows[:2], batch_size=16, budget=300
    )
    assert _calibration_rows(paper) == MeZOConfig.calibration_rows == 1024
    assert _calibration_rows(replace(paper, budget=20)) == 160


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


def test_cells_in_processes_are_those_that_run_in_turn(
    files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")  # there are none here; a reward sees what its process was given
    rewards = files / "rewards.py"
    more = ["--methods", "zero_shot", "mezo", "--seeds", "1", "--metrics", f"{rewards}:failing", f"{rewards}:gpu"]
    assert main(words(files, tmp_path / "turn", *more)) == 0
    (files / "fail").touch()
    capfd.readouterr()
    assert main(words(files, tmp_path / "processes", *more, "--jobs", "2")) == 2
    said = capfd.readouterr()
    assert "failed: mezo with seed 1; the same command" in " ".join(said.err.split())
    assert "nothing to divide by" in said.err
    assert "Traceback" not in said.err
    found = cells(tmp_path / "processes")
    assert set(found) == {"zero_shot-1"}
    assert "| zero-shot |" in (tmp_path / "processes" / "table.md").read_text(encoding="utf-8")
    (files / "fail").unlink()
    more += ["--seeds", "2"]
    assert main(words(files, tmp_path / "turn", *more)) == 0
    assert main(words(files, tmp_path / "processes", *more, "--jobs", "2")) == 0
    expected, found = cells(tmp_path / "turn"), cells(tmp_path / "processes")
    assert set(found) == set(expected) == {f"{name}-{seed}" for name in ("zero_shot", "mezo") for seed in (1, 2)}
    measured = ("seconds", "peak_memory_mb", "gpu")
    for name, cell in found.items():
        assert {k: v for k, v in cell.items() if k not in measured} == {
            k: v for k, v in expected[name].items() if k not in measured
        }
        assert cell["gpu"] in (3.0, 5.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_one_that_started_it(files: Path, tmp_path: Path, number: int):
    command = words(files, tmp_path, "--methods", "mezo", "mezo_lora", "--seeds", "1", "2", "--jobs", "2")
    slow = ["--metrics", f"{files / 'rewards.py'}:slow"]
    started = subprocess.Popen(
        [sys.executable, "-m", "zorl.apps.cli", *command, *slow], stderr=subprocess.PIPE, text=True
    )
    first = psutil.Process(started.pid)
    begun = tmp_path / "runs"
    deadline = time.monotonic() + 120
    while len(list(begun.glob("*/run.lock"))) < 2:
        assert time.monotonic() < deadline
        assert started.poll() is None
        time.sleep(0.05)
    others = first.children(recursive=True)
    started.send_signal(number)
    said = started.communicate(timeout=60)[1]
    _, alive = psutil.wait_procs(others, timeout=60)
    assert not alive
    assert started.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    if number == signal.SIGINT:
        assert "finished cells are kept, and the same command continues" in said
        assert "Traceback" not in said


def test_a_process_that_is_killed_is_told_and_what_is_done_is_kept(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    more = [
        "--methods",
        "zero_shot",
        "mezo",
        "--seeds",
        "1",
        "--metrics",
        f"{files / 'rewards.py'}:killed",
        "--jobs",
        "2",
    ]
    (files / "fail").touch()
    assert main(words(files, tmp_path, *more)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "was killed, as systems do when memory runs out (--jobs 2)" in said
    (files / "fail").unlink()
    assert main(words(files, tmp_path, *more)) == 0
    assert set(cells(tmp_path)) == {"zero_shot-1", "mezo-1"}


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


def test_a_linear_probe_that_lacks_a_label_does_not_apply(files: Path, tmp_path: Path):
    rows = [f"the film was {WORDS['0'][0]}\t0", f"the film was {WORDS['1'][0]}\t1"]
    (tmp_path / "train.tsv").write_text("\n".join(["text\tlabel", *rows * 9, *rows[:1] * 40]) + "\n", encoding="utf-8")
    more = ["--methods", "lp_mezo", "--dataset", str(tmp_path / "train.tsv"), "--budget", "2", "--batch_size", "1"]
    data = ["--test_dataset", str(files / "test.tsv"), "--sample", "30", "9", "--seeds", "1"]
    size = ["--model", str(files / "bert"), *QUESTION, "--output_dir", str(tmp_path / "out")]
    assert main(["compare", *size, *data, *more]) == 0
    assert "a linear probe needs training rows of every label" in cells(tmp_path / "out")["lp_mezo-1"]["not_applicable"]


def test_a_metric_that_applies_to_no_row_leaves_its_place_in_the_table_empty(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    metrics = ["--metrics", "accuracy", f"{files / 'rewards.py'}:inapplicable"]
    assert main(words(files, tmp_path, "--methods", "zero_shot", "--seeds", "1", "--json", *metrics)) == 0
    (row,) = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))["rows"]
    assert row["inapplicable"] is None
    assert "Infinity" not in (tmp_path / "cells" / "zero_shot-1.json").read_text()


def test_options_of_each_row(files: Path, tmp_path: Path):
    rows = [{"premise": f"the {film} was good", "options": ["great", "terrible"], "label": "great"}
            for film in ("film", "plot") for _ in range(8)]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    command = [
        "compare",
        "--model",
        str(files / "gpt2"),
        "--dataset",
        str(data),
        "--prompt",
        "{premise} so it was {mask}",
    ]
    more = ["--options", "options", "--budget", "8", "--batch_size", "8", "--seeds", "1", "--metrics", "accuracy"]
    methods = ["--methods", "zero_shot", "mezo", "threshold"]
    assert main([*command, *more, *methods, "--output_dir", str(tmp_path / "out")]) == 0
    found = cells(tmp_path / "out")
    assert "needs a prompt with label words" in found["threshold-1"]["not_applicable"]
    assert found["mezo-1"]["accuracy"] in (0.0, 1.0)


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


def test_the_summary_is_mean_and_sample_deviation_over_the_seeds():
    made = [
        {
            "method": "a",
            "title": "A",
            "seed": seed,
            "accuracy": value,
            "forwards": 10,
            "seconds": 2.0,
            "peak_memory_mb": None,
        }
        for seed, value in ((1, 0.5), (2, 0.7), (3, 0.9))
    ]
    refused = {"method": "b", "title": "B", "seed": 1, "not_applicable": "B needs a causal model"}
    once = {"method": "a", "title": "A", "seed": 4, "not_applicable": "A does not fit these rows"}
    a, b = summary([*made, once, refused], ["accuracy"])
    assert a["accuracy"] == pytest.approx(0.7)
    assert a["accuracy_std"] == pytest.approx(math.sqrt(2 * 0.2**2 / 2))
    assert a["seeds"] == 3
    assert "0.700 ± 0.200" in text([a, b], ["accuracy"])
    assert "B: B needs a causal model" in text([a, b], ["accuracy"])
    assert "| A | 0.700 ± 0.200 | 10 | 2 | — | 3 |" in markdown([a, b], ["accuracy"])
    (searched,) = summary([{**made[0], "chosen": {"search_forwards": 30}}], ["accuracy"])
    assert searched["forwards"] == 30


def test_the_demonstrations_that_fitted_stand_under_the_table():
    figures = {"forwards": 0, "seconds": 1.0, "accuracy": 0.5}
    made = [
        {
            "method": "in_context",
            "title": "what it was called",
            "seed": seed,
            "chosen": {"demonstrations": count, "cut_to_characters": cut},
            **figures,
        }
        for seed, count, cut in ((1, 4, None), (2, 4, 55), (3, 3, 71))
    ]
    title = "in-context, up to 32 demonstrations"
    cut = summary(made, ["accuracy"])
    note = f"{title}: 3.7 on average, their values cut to 55–71 characters for 2 of 3 seeds"
    assert markdown(cut, ["accuracy"]).endswith(f"\n\n- {note}\n")
    assert text(cut, ["accuracy"]).endswith(f"\n\n{note}")
    assert f"{title}: 4 on average\n" in markdown(summary(made[:1], ["accuracy"]), ["accuracy"])


def test_help_names_every_method():
    about = COMPARE.help()
    assert [name for name in METHODS if name not in about] == []
    assert set(STANDARD) <= set(METHODS)
