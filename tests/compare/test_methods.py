"""What `zorl compare` gives each method, and what a method may spend."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from cli_runs import QUESTION, WORDS
from compare_runs import cells, words
from transformers import AutoModelForMaskedLM

from zorl import MeZOConfig, Prompt
from zorl.apps import compare_methods
from zorl.apps.cli import main
from zorl.apps.compare_cells import Comparison
from zorl.apps.compare_methods import METHODS, _calibration_rows
from zorl.baselines.problem import Problem

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_a_linear_probe_that_lacks_a_label_does_not_apply(files: Path, tmp_path: Path):
    rows = [f"the film was {WORDS['0'][0]}\t0", f"the film was {WORDS['1'][0]}\t1"]
    (tmp_path / "train.tsv").write_text("\n".join(["text\tlabel", *rows * 9, *rows[:1] * 40]) + "\n", encoding="utf-8")
    more = ["--methods", "lp_mezo", "--dataset", str(tmp_path / "train.tsv"), "--budget", "2", "--batch_size", "1"]
    data = ["--test_dataset", str(files / "test.tsv"), "--sample", "30", "9", "--seeds", "1"]
    size = ["--model", str(files / "bert"), *QUESTION, "--output_dir", str(tmp_path / "out")]
    assert main(["compare", *size, *data, *more]) == 0
    assert "a linear probe needs training rows of every label" in cells(tmp_path / "out")["lp_mezo-1"]["not_applicable"]


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
