"""`zorl diagnose`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runs import QUESTION, Files, Outcome

from zorl import MeZOTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_diagnose_suggests_a_command_that_trains(zorl: Callable[..., Outcome], files: Files, tmp_path: Path) -> None:
    plot, out = tmp_path / "plots" / "diagnosis.png", tmp_path / "out"
    question = ["--model", files.bert, "--dataset", files.path("train.tsv"), *QUESTION, "--loss", "cross_entropy"]
    flags = [*question, "--budget", "300", "--calibration", "none", "--per_device_train_batch_size", "8"]
    outcome = zorl("diagnose", *flags, "--plot", str(plot), "--json")
    result = outcome.json
    assert result["forwards"] <= 300
    d = result["parameters"]
    assert result["lemma_2"]["expected"] == pytest.approx(d / 7 + 50 / 56), "n = 8 one-sided, and rank one"
    for name in ("gradient_norm_squared", "trace", "frobenius_norm", "operator_norm"):
        value, low, high = result[name]
        assert low <= value <= high
    assert plot.read_bytes().startswith(b"\x89PNG")
    program, *words = shlex.split(result["command"])
    assert program == "zorl"
    assert words[words.index("--learning_rate") + 1] == f"{result['suggested']['learning_rate_normalized']:g}"
    assert not {"--budget", "--plot", "--json"} & set(words)
    trained = zorl(*words, "--max_steps", "2", "--output_dir", str(out), "--json").json
    assert trained["steps"] == 2


def test_diagnose_takes_a_task_and_suggests_a_rate_in_the_units_of_the_update(
    zorl: Callable[..., Outcome], files: Files, tmp_path: Path
) -> None:
    rows = [f"the film was {word}\t{label}" for word, label in (("great", 1), ("odd", 0), ("good", 1), ("bad", 0)) * 8]
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n", encoding="utf-8")
    for update in ("normalized", "adam", "sgd"):
        flags = ["--model", files.bert, "--task", "sst2", "--dataset", str(tmp_path), "--update", update]
        size = [
            "--budget",
            "300",
            "--calibration",
            "none",
            "--per_device_train_batch_size",
            "8",
            "--plot",
            str(tmp_path / "plot.png"),
        ]
        result = zorl("diagnose", *flags, *size, "--json").json
        assert result["objective"] == "accuracy"
        words = shlex.split(result["command"])
        assert words[words.index("--task") + 1] == "sst2"
        rate = float(words[words.index("--learning_rate") + 1])
        unit = "sgd" if update == "sgd" else "normalized"
        assert rate == pytest.approx(result["suggested"][f"learning_rate_{unit}"])


@pytest.mark.parametrize("drawn", [["--sample", "16", "8"], ["--k_shot", "8"]], ids=["sample", "k-shot"])
def test_diagnose_measures_on_the_rows_that_a_run_draws(
    zorl: Callable[..., Outcome], tmp_path: Path, files: Files, drawn: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plot = ["--plot", str(tmp_path / "plot.png")]
    flags = [
        "--model",
        files.bert,
        "--dataset",
        files.path("train.tsv"),
        *QUESTION,
        "--loss",
        "cross_entropy",
        "--seed",
        "3",
    ]
    flags += ["--calibration", "none", "--per_device_train_batch_size", "8", *drawn]
    seen: list[list[str]] = []
    made = MeZOTrainer.__init__

    def look(self: MeZOTrainer, *args: Any, **options: Any) -> None:
        seen.append(options["train_dataset"]["text"])
        made(self, *args, **options)

    monkeypatch.setattr(MeZOTrainer, "__init__", look)
    result = zorl("diagnose", *flags, "--budget", "300", *plot, "--json").json
    _, *words = shlex.split(result["command"])
    assert words[words.index(drawn[0]) :][: len(drawn)] == drawn
    zorl(*words, "--max_steps", "1", "--output_dir", str(tmp_path / "out"), "--json")
    assert seen[0] == seen[1]
    assert len(seen[0]) == 16


def test_diagnose_explains_what_it_found(zorl: Callable[..., Outcome], files: Files, tmp_path: Path) -> None:
    plot = ["--plot", str(tmp_path / "diagnosis.png")]
    question = ["--model", files.gpt2, "--dataset", files.path("train.tsv"), *QUESTION]
    text = zorl("diagnose", *question, "--reward", "accuracy", "--budget", "300", "--calibration", "bias", *plot).out
    assert all(
        word in text for word in ("effective rank r", "Lemma 2, n = 8", "Corollary 1", "<- chosen", "suggested:")
    )
    assert "zorl train --model" in text
    undefined = [*question, "--reward", "accuracy", "--budget", "300", "--calibration", "none", *plot]
    undefined += ["--estimator", "one_point"]
    told = zorl("diagnose", *undefined)
    for name in (r"Lemma 2, n = \d", "Corollary 1"):
        assert re.search(rf"^{name} +not defined for this estimator ", told.out, re.MULTILINE), told
    figures = zorl("diagnose", *undefined, "--json").json
    assert figures["lemma_2"]["expected"] is None
    assert set(figures["corollary_1"].values()) == {figures["predicted_fall_a_step"]} == {None}
    both = zorl("diagnose", *question, "--reward", "f1", "--loss", "cross_entropy")
    assert both.err.strip().endswith("give exactly one of --reward and --loss, such as --reward f1; got both")
    small = zorl("diagnose", *question, "--reward", "f1", "--calibration", "none", "--budget", "10", *plot)
    assert "a budget of 10 forwards is too small" in small.err
