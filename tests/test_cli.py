"""The `zorl` command, run on tiny random models and files made here."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from zorl import MeZOTrainer
from zorl.apps.cli import main
from zorl.apps.commands import COMMANDS, TRAIN
from zorl.apps.inputs import number
from zorl.probe import Choice
from zorl.rewards import JudgmentStore
from zorl.trajectory import Trajectory

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = {"0": ("bad", "terrible"), "1": ("good", "great")}
QUESTION = ["--prompt", "{text} it was {mask} .", "--label_words", "0=terrible", "1=great"]
SHORT = ["--max_steps", "6", "--per_device_train_batch_size", "16", "--logging_steps", "2"]

REWARDS = '''
import os, signal
from pathlib import Path

HERE = Path(__file__).parent
calls = {"train": 0}

def nan(completions, **columns): return [float("nan")] * len(completions)
def infinite(completions, **columns): return [float("inf")] * len(completions)
def none(completions, **columns): return [None] * len(completions)
def long(completions, **columns): return [1.0] * (len(completions) + 1)
def text(completions, **columns): return "good"
def raising(completions, **columns): raise KeyError("no such thing")
def needs(completions, gold, **columns): return [0.0] * len(completions)
def right(completions, label, **columns):
    return [float(c == str(t)) for c, t in zip(completions, label)]
def short(completions, **columns): return [-float(len(c)) for c in completions]

def stopping(completions, label, **columns):
    """Stops the process as the file `stop` says: `train 9 int` is SIGINT's exception at the 9th minibatch."""
    file = HERE / "stop"
    if file.exists():
        where, when, how = file.read_text().split()
        size = len(completions)
        if (where == "train") == (size == 16):
            calls[where] = calls.get(where, 0) + 1
            if calls[where] == int(when):
                calls.clear()
                file.unlink()
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt
    return right(completions, label)

def judge(prompts, first, second, **columns):
    return ["first" if len(a) < len(b) else "second" for a, b in zip(first, second)]
'''


class Files(NamedTuple):
    """Data, models and rewards on disk."""

    folder: Path
    bert: str
    gpt2: str
    rewards: str

    def write(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text, encoding="utf-8")
        return str(self.folder / name)

    def path(self, name: str) -> str:
        return str(self.folder / name)


@pytest.fixture(scope="module")
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


def evaluations(run: Path) -> list[tuple[int, float]]:
    """(step, reward) of each evaluation of a run."""
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["eval_reward"]) for entry in log if "eval_reward" in entry]


def sentences(size: int, seed: int) -> Any:
    rng = random.Random(seed)
    for i in range(size):
        label = str(i % 2)
        yield f"the {rng.choice(['film', 'plot', 'story'])} was {rng.choice(WORDS[label])} {rng.choice('!?.')}", label


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        (line,) = self.out.splitlines()
        result: dict[str, Any] = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
        return result


@pytest.fixture
def zorl(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs a command in this process."""

    def run(*words: str | list[str]) -> Outcome:
        capsys.readouterr()
        code = main([w for word in words for w in (word if isinstance(word, list) else [word])])
        return Outcome(code, *capsys.readouterr())

    return run


def train(files: Files, out: str | Path, *more: str) -> list[str]:
    """The arguments of a small run that maximises macro-F1, from a fitted threshold unless told otherwise."""
    data = ["--dataset", files.path("train.tsv"), "--eval_dataset", files.path("dev.tsv")]
    reward = [] if {"--reward", "--loss", "--judge"} & set(more) else ["--reward", "f1"]
    prompt = [] if "--prompt" in more else QUESTION
    start = [] if "--calibration" in more else ["--calibration", "bias"]
    return ["train", "--model", files.bert, *data, *prompt, *SHORT, *start, *reward, "--output_dir", str(out), *more]


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


# --- help -----------------------------------------------------------------------------------------------------------


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


# --- the way from a file to a tuned model -----------------------------------------------------------------------------


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


# --- what is given ----------------------------------------------------------------------------------------------------


def test_columns_are_given_by_position_where_there_is_no_header(
    zorl: Callable[..., Outcome], files: Files, tmp_path: Path
) -> None:
    columns = ["--text_column", "0", "--label_column", "1"]
    bare = ["--dataset", files.path("train_bare.tsv"), "--eval_dataset", files.path("dev_bare.tsv")]
    outcome = zorl(train(files, tmp_path / "bare", *columns, "--json"), bare)
    named = zorl(train(files, tmp_path / "named", "--json"))
    assert outcome.json["weights_sha256"] == named.json["weights_sha256"]
    scores = zorl(
        "eval", "--model", str(tmp_path / "bare"), "--dataset", files.path("test_bare.tsv"), columns, "--json"
    )
    assert scores.json["n"] == 30


def test_without_an_evaluation_set_a_stratified_part_is_held_out(
    zorl: Callable[..., Outcome], files: Files, tmp_path: Path
) -> None:
    words = train(files, tmp_path / "out", "--json")
    at = words.index("--eval_dataset")
    outcome = zorl(words[:at] + words[at + 2 :])
    assert outcome.code == 0
    assert "no --eval_dataset: 12 of 60 rows are held out to evaluate on, stratified by label" in outcome.err
    assert "48 rows (0: 24, 1: 24) to train on" in outcome.err


def test_flags_win_over_a_yaml_file(zorl: Callable[..., Outcome], files: Files, tmp_path: Path) -> None:
    answers = "\n".join(f"{text}\t{'yes' if label == '1' else 'no'}" for text, label in sentences(40, 3))
    config = {
        "model": files.bert,
        "dataset": files.write("answers.tsv", f"text\tlabel\n{answers}\n"),
        "prompt": "{text} was it good ? {mask}",
        "reward": ["f1", "accuracy"],
        "reward_weights": [1, 0.5],
        "metrics": "matthews",
        "max_steps": 100,
        "per_device_train_batch_size": 16,
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in config.items()]
    # YAML reads a bare no as false and 1e-3 as text; neither is meant.
    lines += [
        "label_words:",
        "  no: no",
        "  yes: yes",
        "learning_rate: 1e-3",
        "calibration: none",
        "dataset_split: null",
    ]
    path = files.write("run.yaml", "\n".join(lines))
    result = zorl("train", "--config", path, "--max_steps", "3", "--output_dir", str(tmp_path / "out"), "--json").json
    assert result["steps"] == 3
    assert result["forwards"] == 8 * 3
    assert result["objective"] == "macro_f1+accuracy"
    assert result["eval_reward"] == pytest.approx(result["eval_macro_f1"] + 0.5 * result["eval_accuracy"])
    assert "eval_matthews" in result
    settings = json.loads((tmp_path / "out/zorl.json").read_text())
    assert settings["prompt"]["label_words"] == {"no": "no", "yes": "yes"}


def test_cross_entropy_is_a_loss_of_the_label_words(zorl: Callable[..., Outcome], files: Files, tmp_path: Path) -> None:
    result = zorl(train(files, tmp_path / "out", "--loss", "cross_entropy", "--json")).json
    assert result["objective"] == "cross_entropy"
    assert result["eval_reward"] == -result["eval_loss"]
    assert {"eval_accuracy", "eval_macro_f1"} <= result.keys()


def test_a_causal_model_is_tuned_on_the_text_that_it_generates(
    zorl: Callable[..., Outcome], files: Files, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    reward = ["--reward", f"{files.rewards}:short"]
    options = ["--prompt", "{text}\\nit was", "--max_completion_length", "4", "--temperature", "0.5", *reward]
    result = zorl(train(files, out, *options, "--json"), "--model", files.gpt2).json
    assert json.loads((tmp_path / "out/zorl.json").read_text())["prompt"]["template"] == "{text}\nit was"
    # Generates as it was tuned: as many tokens, at the same temperature, with the same noise.
    found = zorl("eval", "--model", out, "--dataset", files.path("dev.tsv"), reward, "--json").json
    assert found["rewards"]["short"] == found["reward"] == pytest.approx(result["eval_reward"])
    assert "accuracy" not in found
    without = zorl("eval", "--model", out, "--dataset", files.path("dev.tsv"))
    assert (without.code, "--reward is required" in without.err) == (2, True)


@pytest.fixture(scope="module")
def questions(files: Files) -> str:
    """A file of questions with their options, from two to four of them."""
    rng = random.Random(0)
    rows = []
    for _ in range(40):
        choices = rng.sample(["it was odd", "I liked it", "who knows", "the book was terrible"], rng.randint(2, 4))
        premise = f"the {rng.choice(['film', 'plot'])} was {rng.choice(['good', 'bad'])}"
        rows.append({"premise": premise, "choices": choices, "right": rng.choice(choices)})
    return files.write("questions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("goal", [["--reward", "accuracy"], ["--loss", "cross_entropy"]])
def test_rows_may_bring_their_own_options(
    zorl: Callable[..., Outcome], files: Files, questions: str, tmp_path: Path, goal: list[str]
) -> None:
    out = str(tmp_path / "out")
    data = ["--dataset", questions, "--label_column", "right"]
    question = ["--prompt", "{premise} so {mask}", "--options", "choices"]
    result = zorl("train", "--model", files.gpt2, data, question, goal, SHORT, "--output_dir", out, "--json").json
    assert 0 <= result["eval_accuracy"] <= 1
    found = zorl("eval", "--model", out, data, "--json").json  # the folder remembers the options
    assert "macro_f1" not in found
    predictions = tmp_path / "predictions.jsonl"
    zorl("predict", "--model", out, "--dataset", questions, "--output", str(predictions))
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert all(row["prediction"] in row["choices"] for row in rows)
    assert found["accuracy"] == pytest.approx(sum(row["prediction"] == row["right"] for row in rows) / len(rows))


def test_options_that_do_not_fit_get_a_sentence(
    zorl: Callable[..., Outcome], files: Files, questions: str, tmp_path: Path
) -> None:
    def error(*more: str) -> str:
        goal = ["--reward", "accuracy", "--label_column", "right", "--output_dir", str(tmp_path / "out")]
        outcome = zorl(
            "train", "--model", files.gpt2, "--dataset", questions, goal, "--prompt", "{premise} {mask}", *more
        )
        assert outcome.code == 2
        return outcome.err.splitlines()[-1]

    assert "no label_words or options to put there" in error()
    assert "options names the column 'choice', which the data does not have; did you mean 'choices'?" in error(
        "--options", "choice"
    )
    assert "must hold a list of texts to choose from in each row" in error("--options", "premise")
    assert "two sets of answers" in error("--options", "choices", "--label_words", "0=a", "1=b")
    assert "BertForMaskedLM fills one mask" in error("--options", "choices", "--model", files.bert)
    wrong = files.write("wrong.jsonl", json.dumps({"premise": "a", "choices": ["b", "c"], "right": 1}) + "\n")
    told = error("--options", "choices", "--dataset", wrong, "--eval_strategy", "no")
    assert "train_dataset, row 1: right=1 is not among the options in 'choices', ['b', 'c']" in told


def test_generation_is_taught_by_its_cross_entropy(
    zorl: Callable[..., Outcome], files: Files, questions: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prompt = ["--prompt", "{premise} so", "--max_completion_length", "40", "--label_column", "right"]
    goal = ["--loss", "cross_entropy", "--metrics", "squad_f1", "--output_dir", str(out)]
    result = zorl("train", "--model", files.gpt2, "--dataset", questions, prompt, goal, SHORT, "--json").json
    assert result["objective"] == "cross_entropy"
    assert result["eval_reward"] == -result["eval_loss"]
    assert result["eval_loss"] <= result["start_loss"]
    assert json.loads((out / "zorl.json").read_text())["temperature"] == 0, "what was taught is decoded greedily"
    scored = ["--reward", "squad_f1", "--label_column", "right", "--json"]
    assert 0 <= zorl("eval", "--model", str(out), "--dataset", questions, scored).json["reward"] <= 1


def test_a_judge_is_followed_without_evaluations(zorl: Callable[..., Outcome], files: Files, tmp_path: Path) -> None:
    words = train(files, tmp_path / "out", "--judge", f"{files.rewards}:judge", "--prompt", "{text}", "--json")
    refused = zorl(words, "--model", files.gpt2)
    assert refused.code == 2
    assert "--metrics" in refused.err
    at = words.index("--eval_dataset")
    outcome = zorl(words[:at] + words[at + 2 :], "--model", files.gpt2, "--max_completion_length", "4")
    result = outcome.json
    assert "held out" not in outcome.err
    assert result["objective"] == "judge:judge"
    assert result["saved_step"] == 6


def test_a_reward_or_people_can_be_the_judge(zorl: Callable[..., Outcome], files: Files, tmp_path: Path) -> None:
    """People who like short answers tune the model to the same bits as a reward for them."""
    words = ["train", "--model", files.gpt2, "--dataset", files.path("train.tsv"), "--prompt", "{text}", *SHORT]
    words += ["--max_completion_length", "4", "--max_steps", "2", "--json"]
    reward = zorl(words, "--judge", f"reward:{files.rewards}:short", "--output_dir", str(tmp_path / "reward")).json
    assert reward["objective"] == "judge:reward:short"

    file = tmp_path / "judgments.sqlite"
    stop = threading.Event()

    def rate() -> None:
        with JudgmentStore(file) as store:
            rater = store.rater("Ann")
            while not stop.wait(0.002):
                while (showing := store.next_pair(rater)) is not None:
                    lengths = len(showing.first), len(showing.second)
                    choice = (
                        Choice.TIE
                        if lengths[0] == lengths[1]
                        else Choice.FIRST
                        if lengths[0] < lengths[1]
                        else Choice.SECOND
                    )
                    store.vote(showing.id, rater, choice)

    thread = threading.Thread(target=rate, daemon=True)
    thread.start()
    human = zorl(words, "--judge", "human", "--judgments", str(file), "--output_dir", str(tmp_path / "human")).json
    stop.set()
    thread.join()
    assert human["objective"] == "judge:human"
    assert human["weights_sha256"] == reward["weights_sha256"]


def test_a_reward_from_a_file_leaves_sys_path_alone(zorl: Callable[..., Outcome], files: Files, tmp_path: Path) -> None:
    before = list(sys.path)
    result = zorl(train(files, tmp_path / "out", "--reward", f"{files.rewards}:right", "--json")).json
    assert result["eval_reward"] == pytest.approx(result["eval_accuracy"])
    assert sys.path == before


# --- runs that go on --------------------------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_can_be_extended(zorl: Callable[..., Outcome], files: Files, tmp_path: Path) -> None:
    first = zorl(train(files, tmp_path / "out", "--json"))
    saved = (tmp_path / "out/trajectory.zorl").read_bytes()
    again = zorl(train(files, tmp_path / "out", "--json"))
    assert again.json == first.json
    assert "is finished: it has 6 steps. To extend it" in again.err
    assert (tmp_path / "out/trajectory.zorl").read_bytes() == saved
    longer = zorl(train(files, tmp_path / "out", "--json"), "--max_steps", "9")
    assert "continuing after step 6 of 9" in longer.err
    assert longer.json["steps"] == 9
    other = zorl(train(files, tmp_path / "out"), "--seed", "1")
    assert other.code == 2
    assert "seed was 42, is now 1" in other.err


@pytest.mark.parametrize(
    "stop",
    ["train 9 int", "evaluation 4 int", "evaluation 7 int"],
    ids=["in a step", "in an evaluation", "in the last evaluation"],
)
def test_ctrl_c_loses_nothing(zorl: Callable[..., Outcome], files: Files, tmp_path: Path, stop: str) -> None:
    reward = ["--reward", f"{files.rewards}:stopping", "--label_reward", "best", "--calibration", "none", "--json"]
    whole = zorl(train(files, tmp_path / "whole", *reward))
    files.write("stop", stop)
    stopped = zorl(train(files, tmp_path / "out", *reward))
    assert (stopped.code, stopped.out) == (130, "")
    assert "nothing is lost: the same command continues from there" in stopped.err
    assert zorl("eval", "--model", str(tmp_path / "out"), "--dataset", files.path("dev.tsv")).code == 2
    resumed = zorl(train(files, tmp_path / "out", *reward))
    for name in ("weights_sha256", "saved_step", "steps", "eval_reward", "start_reward"):
        assert resumed.json[name] == whole.json[name]
    whole_run, resumed_run = tmp_path / "whole", tmp_path / "out"
    assert (whole_run / "trajectory.zorl").read_bytes() == (resumed_run / "trajectory.zorl").read_bytes()
    assert evaluations(whole_run) == evaluations(resumed_run)


def test_a_killed_run_continues_to_the_same_bits(zorl: Callable[..., Outcome], files: Files, tmp_path: Path) -> None:
    reward = ["--reward", f"{files.rewards}:stopping", "--label_reward", "best", "--calibration", "none", "--json"]
    whole = zorl(train(files, tmp_path / "whole", *reward)).json
    files.write("stop", "train 8 kill")
    words = train(files, tmp_path / "out", *reward)
    killed = subprocess.run(
        [sys.executable, "-m", "zorl.apps.cli", *words],
        capture_output=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert killed.returncode == -signal.SIGKILL
    assert zorl(words).json["weights_sha256"] == whole["weights_sha256"]


def test_two_runs_cannot_share_a_folder(zorl: Callable[..., Outcome], files: Files, tmp_path: Path) -> None:
    assert zorl(train(files, tmp_path / "out")).code == 0
    trajectory, _ = Trajectory.resume(tmp_path / "out/trajectory.zorl")
    try:
        second = zorl(train(files, tmp_path / "out"), "--max_steps", "9")
    finally:
        trajectory.close()
    assert second.code == 2
    assert "another run is writing" in second.err


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--text_column", "txt"], "no column 'txt'; did you mean 'text'?"),
        (["--label_column", "lable"], "no column 'lable'; did you mean 'label'?"),
        (["--prompt", "{txt} it was {mask}", *QUESTION[2:]], "no column 'txt'; did you mean 'text'?"),
        (["--prompt", "{text} it was .", *QUESTION[2:]], "has no {mask} to put them in"),
        (["--prompt", "{text} it was {mask}", "--label_words", "0=terrible", "1=great story"], "great story"),
        (["--prompt", "{text} it was {mask}", "--label_words", "0=terrible", "great"], "label=word pairs"),
        (["--prompt", "{text} it was {mask}", "--label_words", "no=terrible", "1=great"], "'0' (30 rows) without a label word"),
        (["--reward", "f2"], "unknown reward 'f2' (zorl ships"),
        (["--reward", "f1", "--loss", "cross_entropy"], "exactly one of --reward, --judge and --loss"),
        (["--judge", "human"], "needs a file to meet people in: --judgments FILE.sqlite"),
        (["--judge", "human", "--judgments", "nowhere/j.sqlite"], "there is no folder 'nowhere'"),
        (["--judge", "reward:f2"], "unknown reward 'f2'"),
        (["--judge", "humans"], "unknown judge 'humans'; did you mean 'human'? (a judge is human, reward:NAME"),
        (["--judge", "REWARDS:judge", "--judgments", "j.sqlite"], "leave it out, or use 'human'"),
        (["--judgments", "j.sqlite"], "--judgments is only for --judge human"),
        (["--judge", "reward:f1", "--reward", "f1"], "exactly one of --reward, --judge and --loss"),
        (["--epsilon", "0"], "epsilon must be a positive number or 'auto', got '0'"),
        (["--learning_rate", "-0.001"], "learning_rate must be positive, got -0.001"),
        (["--learning_rate", "fast"], "--learning_rate: invalid float value: 'fast'"),
        (["--lerning_rate", "1"], "unknown flag --lerning_rate; did you mean '--learning_rate'?"),
        (["--max-step", "1"], "did you mean '--max_steps'"),
        (["great"], "unexpected argument 'great'"),
        (["--weight_decay", "0.1"], "weight_decay=0.1 belongs to backpropagation"),
        (["--model", "./nowhere"], "--model ./nowhere: there is no such folder"),
        (["--dataset", "nowhere.tsv"], "there is no file 'nowhere.tsv'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--reward", "REWARDS:nan"], "'nan' returned NaN for sample 0"),
        (["--reward", "REWARDS:infinite"], "'infinite' returned inf for sample 0"),
        (["--reward", "REWARDS:none"], "'none' returned None for every row"),
        (["--reward", "REWARDS:long"], "'long' returned 61 rewards for 60 completions"),
        (["--reward", "REWARDS:text"], "'text' returned str 'good'"),
        (["--reward", "REWARDS:raising"], "'raising' raised KeyError"),
        (["--reward", "REWARDS:needs"], "'needs' needs a column 'gold'"),
        (["--reward", "REWARDS:missing"], "has no 'missing'"),
    ],
)  # fmt: skip
def test_bad_input_gets_a_sentence(
    zorl: Callable[..., Outcome], files: Files, tmp_path: Path, more: list[str], expected: str
) -> None:
    given, more = more, [word.replace("REWARDS", files.rewards) for word in more]
    words = train(files, tmp_path / "out", *more)
    if "--judge" in more:  # which gives nothing to evaluate
        at = words.index("--eval_dataset")
        words = words[:at] + words[at + 2 :]
    outcome = zorl(words, "--max_steps", "12")
    assert (outcome.code, outcome.out) == (2, "")
    last = outcome.err.splitlines()[-1]
    assert last.startswith("zorl: error: ")
    assert expected in last
    assert "label head" not in outcome.err
    assert not (tmp_path / "out/model.safetensors").exists()
    assert (tmp_path / "out").exists() == ("REWARDS:none" in given)  # it is noticed after ten steps


def test_a_reward_that_fails_on_generated_text_leaves_no_folder(
    zorl: Callable[..., Outcome], files: Files, tmp_path: Path
) -> None:
    words = ["train", "--model", files.gpt2, "--dataset", files.path("train.tsv"), "--prompt", "{text}"]
    reward = ["--max_completion_length", "2", "--reward", f"{files.rewards}:raising"]
    assert zorl(words, reward, "--output_dir", str(tmp_path / "out")).code == 2
    assert not (tmp_path / "out").exists()
    (tmp_path / "kept").mkdir()
    assert zorl(words, reward, "--output_dir", str(tmp_path / "kept")).code == 2
    assert (tmp_path / "kept").exists(), "it was there before"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is empty"),
        ("text\tlabel\n", "has a header but no rows"),
        ("text\tlabel\n" + "a film\t0\n" * 20, "one class only: all 20 rows have label='0'"),
        ("text\tlabel\na film\t0\n" * 2 + "the plot\t0\n", "without a label word"),
        ("text\tlabel\na film\t0\na plot\n", "line 3: 1 field, but the first line has 2"),
        ("a film\t0\nthe plot\t1\n", "If the first line is not a header, give positions"),
        ("text;label\na film;0\n", "(columns: 'text;label'); the file seems to be separated by ';': save it with tabs"),
    ],
)
def test_a_bad_file_gets_a_sentence(
    zorl: Callable[..., Outcome], files: Files, tmp_path: Path, content: str, expected: str
) -> None:
    outcome = zorl(train(files, tmp_path / "out"), "--dataset", files.write("bad.tsv", content))
    assert (outcome.code, outcome.out) == (2, "")
    assert expected in outcome.err.splitlines()[-1]


def test_an_unknown_key_of_a_yaml_file_is_told_what_it_resembles(zorl: Callable[..., Outcome], files: Files) -> None:
    outcome = zorl("train", "--config", files.write("typo.yaml", "modle: bert\n"))
    assert (outcome.code, outcome.out) == (2, "")
    assert "typo.yaml: unknown key 'modle'; did you mean 'model'?" in outcome.err
    outcome = zorl("train", "--config", files.write("type.yaml", "max_steps: many\n"))
    assert "type.yaml: --max_steps: invalid int value: 'many'" in outcome.err


@pytest.mark.parametrize("text", ["seed: 1\nmax_steps: 3\nseed: 2\n", "label_words:\n  seed: bad\n  seed: good\n"])
def test_a_key_that_is_there_twice_is_refused_with_its_line(
    zorl: Callable[..., Outcome], files: Files, text: str
) -> None:
    outcome = zorl("train", "--config", files.write("twice.yaml", text))
    assert (outcome.code, outcome.out) == (2, "")
    assert "twice.yaml" in outcome.err
    assert "the key 'seed' occurs twice" in outcome.err
    assert "line 3" in outcome.err


def test_a_model_whose_weights_are_nan_is_refused(zorl: Callable[..., Outcome], files: Files, tmp_path: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(files.bert)
    with torch.no_grad():
        model.cls.predictions.bias[3] = torch.nan
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(Path(files.bert, name).read_bytes())
    model.save_pretrained(tmp_path)
    for words in (train(files, tmp_path / "out"), ["eval", "--dataset", files.path("dev.tsv"), *QUESTION]):
        outcome = zorl(words, "--model", str(tmp_path))
        assert (outcome.code, outcome.out) == (2, "")
        assert "parameter 'cls.predictions.bias' holds 1 NaN" in outcome.err


def test_the_base_model_is_never_overwritten(zorl: Callable[..., Outcome], files: Files) -> None:
    outcome = zorl(train(files, files.bert))
    assert outcome.code == 2
    assert "is the model's own folder" in outcome.err


def test_a_traceback_is_shown_where_it_is_asked_for(
    zorl: Callable[..., Outcome], files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZORL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown command 'tarin'; did you mean 'train'?"):
        zorl("tarin")


# --- profile ----------------------------------------------------------------------------------------------------------


def test_profile_measures_each_way_of_tuning_and_draws_it(
    zorl: Callable[..., Outcome], files: Files, tmp_path: Path
) -> None:
    plot = tmp_path / "plots" / "cost.png"
    size = ["--batch_size", "2", "--length", "16", "--rounds", "1"]
    outcome = zorl("profile", "--model", files.gpt2, *size, "--plot", str(plot), "--json")
    result = outcome.json
    assert list(result["cases"]) == ["inference", "mezo", "lora_mezo", "adam"]
    assert all(figures["seconds"] > 0 for figures in result["cases"].values())
    assert result["batch"] == [2, 16]
    assert plot.read_bytes().startswith(b"\x89PNG")
    if sys.platform == "linux":
        assert all(figures["peak_memory_mb"] > 50 for figures in result["cases"].values())
    text = zorl("profile", "--model", files.bert, *size, "--plot", str(plot)).out
    assert all(word in text for word in ("inference, one forward", "MeZO on LoRA", "AdamW", "largest here"))
    assert zorl("profile", "--batch_size", "0").err.strip().endswith("--batch_size must be at least 1, got 0")
    too_long = zorl("profile", "--model", files.gpt2, "--length", "1000", "--plot", str(plot))
    assert "the model reads at most 96 tokens" in too_long.err


def test_a_number_that_json_does_not_have_is_null() -> None:
    assert [number(value) for value in (math.nan, math.inf, -math.inf)] == [None] * 3
    assert number(0.12345678) == 0.1234568


# --- diagnose ---------------------------------------------------------------------------------------------------------


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
