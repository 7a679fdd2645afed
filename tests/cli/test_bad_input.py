"""Bad input gets a sentence, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runs import QUESTION, Files, Outcome, train
from transformers import AutoModelForMaskedLM

pytestmark = pytest.mark.usefixtures("one_thread")


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
