"""The way from a file to a tuned model: train, eval, predict and replay."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runs import QUESTION, SHORT, Files, Outcome, evaluations, train
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from zorl.apps.cli import main
from zorl.apps.inputs import number

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(files: Files, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run: its folder and its `result.json`."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert main(train(files, out, "--text_column", "text", "--label_column", "label", "--learning_rate", "3e-2")) == 0
    return out, json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def classifier(files: Files, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run of a decoder with a new head."""
    out = tmp_path_factory.mktemp("classifier") / "out"
    data = ["--dataset", files.path("train.tsv"), "--eval_dataset", files.path("dev.tsv"), "--text_column", "text"]
    words = ["train", "--model", files.gpt2, "--head", "classifier", *data, *SHORT, "--reward", "f1"]
    assert main([*words, "--output_dir", str(out)]) == 0
    return out, json.loads((out / "result.json").read_text())


def test_a_new_head_is_trained_evaluated_and_rebuilt(
    zorl: Callable[..., Outcome], files: Files, classifier: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, result = classifier
    assert result["forwards"] == 4 + 8 * 6  # 60 rows for the probe are four batches of 16
    found = zorl("eval", "--model", str(out), "--dataset", files.path("dev.tsv"), "--json").json
    assert found["macro_f1"] == pytest.approx(result["eval_macro_f1"], abs=1e-6)
    assert found["f1"].keys() == {"0", "1"}
    file = tmp_path / "predictions.jsonl"
    zorl("predict", "--model", str(out), "--dataset", files.path("dev.tsv"), "--output", str(file))
    predicted = [json.loads(line) for line in file.read_text().splitlines()]
    assert sum(row["prediction"] == str(row["label"]) for row in predicted) / len(predicted) == found["accuracy"]
    rebuilt = ["--trajectory", str(out / "trajectory.zorl"), "--output_dir", str(tmp_path / "rebuilt"), "--json"]
    assert zorl("replay", rebuilt).json["matches_saved_weights"]
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "rebuilt")


def test_a_classifier_that_zorl_has_not_seen_answers_with_its_own_labels(
    zorl: Callable[..., Outcome], files: Files, classifier: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(classifier[0], plain)
    (plain / "zorl.json").unlink()
    data = ["--dataset", files.path("dev.tsv"), "--text_column", "text", "--json"]
    found = zorl("eval", "--model", str(plain), data).json
    assert found["macro_f1"] == pytest.approx(classifier[1]["eval_macro_f1"], abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--head", "words"], "--head takes classifier, got 'words'"),
        (["--head", "classifier", *QUESTION], "--head classifier and --label_words exclude each other"),
        (["--head", "classifier", "--prompt", "{text}", "--label_column", "no"], "'no'"),
    ],
)
def test_heads_that_cannot_be(
    zorl: Callable[..., Outcome], files: Files, tmp_path: Path, flags: list[str], message: str
) -> None:
    data = ["--dataset", files.path("train.tsv"), "--output_dir", str(tmp_path / "out"), "--reward", "f1"]
    outcome = zorl("train", "--model", files.bert, data, flags)
    assert outcome.code != 0
    assert message in outcome.err


def test_training_reports_figures_and_keeps_a_model(trained: tuple[Path, dict[str, Any]]) -> None:
    out, result = trained
    assert result["steps"] == 6
    # 60 rows for the biases are four batches of 16.
    assert result["forwards"] == 4 + 8 * 6
    assert result["eval_reward"] == result["eval_macro_f1"]
    assert result["output_dir"] == str(out)
    assert {"eval_accuracy", "start_macro_f1", "seconds", "peak_memory_mb", "informative_share"} <= result.keys()
    state = json.loads((out / "trainer_state.json").read_text())
    assert [e["step"] for e in state["log_history"] if "eval_reward" in e] == list(range(7))
    best = max((e["eval_reward"], -e["step"]) for e in state["log_history"] if "eval_reward" in e)
    assert best[1] < 0, "a step did better than the start"
    assert result["eval_reward"] == pytest.approx(best[0], rel=1e-6)
    assert result["saved_step"] == -best[1]
    AutoModelForMaskedLM.from_pretrained(out)


@pytest.mark.parametrize("repeated", [[], QUESTION], ids=["remembered", "repeated"])
def test_eval_of_a_run_finds_what_training_reported(
    zorl: Callable[..., Outcome], files: Files, trained: tuple[Path, dict[str, Any]], repeated: list[str]
) -> None:
    out, result = trained
    columns = ["--text_column", "text", "--label_column", "label"]
    outcome = zorl("eval", "--model", str(out), "--dataset", files.path("dev.tsv"), columns, repeated, "--json")
    found = outcome.json
    assert outcome.code == 0
    assert found["n"] == 24
    assert found["accuracy"] == pytest.approx(result["eval_accuracy"], rel=1e-6)
    assert found["macro_f1"] == pytest.approx(result["eval_macro_f1"], rel=1e-6)
    assert found["macro_f1"] == pytest.approx(sum(found["f1"].values()) / 2)


def test_eval_adds_the_rewards_that_are_asked_for(
    zorl: Callable[..., Outcome], files: Files, trained: tuple[Path, dict[str, Any]]
) -> None:
    rewards = ["--reward", "f1:average=weighted", "--reward", f"{files.rewards}:right", "--reward_weights", "1", "2"]
    found = zorl("eval", "--model", str(trained[0]), "--dataset", files.path("test.tsv"), rewards, "--json").json
    assert found["rewards"].keys() == {"weighted_f1", "right"}
    assert found["rewards"]["right"] == pytest.approx(found["accuracy"])
    assert found["reward"] == pytest.approx(found["rewards"]["weighted_f1"] + 2 * found["rewards"]["right"])


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_predictions_are_those_that_eval_scored(
    zorl: Callable[..., Outcome], files: Files, trained: tuple[Path, dict[str, Any]], tmp_path: Path, suffix: str
) -> None:
    model = ["--model", str(trained[0]), "--dataset", files.path("test.tsv")]
    output = tmp_path / f"predictions{suffix}"
    assert zorl("predict", model, "--output", str(output)).code == 0
    with output.open() as file:
        rows = list(csv.DictReader(file)) if suffix == ".csv" else [json.loads(line) for line in file]
    assert list(rows[0]) == ["text", "label", "prediction"]
    right = sum(row["prediction"] == row["label"] for row in rows) / len(rows)
    assert right == pytest.approx(zorl("eval", model, "--json").json["accuracy"])
    again = zorl("predict", model, "--output", str(output))
    assert again.code == 2
    assert "--overwrite" in again.err
    assert zorl("predict", model, "--output", str(output), "--overwrite").code == 0


def test_replay_gives_the_saved_weights_bit_for_bit(
    zorl: Callable[..., Outcome], files: Files, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, result = trained
    trajectory = ["--model", files.bert, "--trajectory", str(out / "trajectory.zorl")]
    rebuilt = zorl("replay", trajectory, "--output_dir", str(tmp_path / "rebuilt"), "--json").json
    assert rebuilt["weights_sha256"] == result["weights_sha256"]
    assert rebuilt["matches_saved_weights"] is True
    assert (tmp_path / "rebuilt/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    # The rebuilt folder is as good as the run's own.
    data = ["--dataset", files.path("test.tsv"), "--json"]
    scores = [zorl("eval", "--model", str(folder), data).json["macro_f1"] for folder in (out, tmp_path / "rebuilt")]
    assert scores[0] == scores[1]


def test_replay_until_a_step_rewinds_to_it(
    zorl: Callable[..., Outcome], files: Files, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, _ = trained
    trajectory = ["--model", files.bert, "--trajectory", str(out / "trajectory.zorl")]
    start = zorl("replay", trajectory, "--until", "0", "--output_dir", str(tmp_path / "0"), "--json").json
    assert start["matches_saved_weights"] is None
    assert (tmp_path / "0/model.safetensors").read_bytes() == Path(files.bert, "model.safetensors").read_bytes()
    beyond = zorl("replay", trajectory, "--until", "7", "--output_dir", str(tmp_path / "7"))
    assert (beyond.code, (tmp_path / "7").exists()) == (2, False)
    assert "holds 6 steps" in beyond.err


def test_replay_refuses_another_base_and_a_folder_in_use(
    zorl: Callable[..., Outcome], files: Files, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, _ = trained
    trajectory = ["--trajectory", str(out / "trajectory.zorl")]
    other = zorl("replay", trajectory, "--model", files.gpt2, "--output_dir", str(tmp_path / "a"))
    assert other.code == 2
    assert "is not the base of the run: it lacks" in other.err
    tuned = zorl("replay", trajectory, "--model", str(out), "--until", "2", "--output_dir", str(tmp_path / "a"))
    assert tuned.code == 2
    assert "the base weights differ from the run's" in tuned.err
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.txt").write_text("…")
    for target in (tmp_path / "b", out):
        refused = zorl("replay", trajectory, "--model", files.bert, "--output_dir", str(target))
        assert refused.code == 2
        assert str(target) in refused.err


def test_replay_says_when_the_saved_weights_are_not_those_of_the_trajectory(
    zorl: Callable[..., Outcome], files: Files, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, _ = trained
    run = tmp_path / "run"
    run.mkdir()
    (run / "trajectory.zorl").write_bytes((out / "trajectory.zorl").read_bytes())
    settings = json.loads((out / "zorl.json").read_text()) | {"weights_sha256": "0" * 64}
    (run / "zorl.json").write_text(json.dumps(settings))
    outcome = zorl(
        "replay",
        "--model",
        files.bert,
        "--trajectory",
        str(run / "trajectory.zorl"),
        "--output_dir",
        str(tmp_path / "c"),
    )
    assert (outcome.code, (tmp_path / "c").exists()) == (2, False)
    assert "nothing was written" in outcome.err


def test_a_number_that_json_does_not_have_is_null() -> None:
    assert [number(value) for value in (math.nan, math.inf, -math.inf)] == [None] * 3
    assert number(0.12345678) == 0.1234568


def test_the_best_epoch_is_kept_as_the_best_step_is(zorl: Callable[..., Outcome], files: Files, tmp_path: Path) -> None:
    words = train(
        files, tmp_path / "out", "--eval_strategy", "epoch", "--learning_rate", "0.3", "--seed", "2", "--json"
    )
    result = zorl(words, "--num_train_epochs", "4").json
    looks = evaluations(tmp_path / "out")
    assert [step for step, _ in looks] == [0, 4, 6]
    best = max(score for _, score in looks)
    assert result["saved_step"] == next(step for step, score in looks if score == best) < result["steps"]
    assert zorl(train(files, tmp_path / "no", "--save_strategy", "no")).code == 0, "there is no best step to keep"
