"""What `zorl train` is given: rows, options, files, rewards, losses and judges."""

from __future__ import annotations

import json
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import SHORT, Files, Outcome, sentences, train

from zorl.probe import Choice
from zorl.rewards import JudgmentStore

pytestmark = pytest.mark.usefixtures("one_thread")


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
