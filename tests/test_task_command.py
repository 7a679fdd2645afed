"""`--task` and `--k_shot` of the `zorl` command, on tiny random models and files made here."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zorl.apps.cli import main
from zorl.run_folder import RunFolder
from zorl.trajectory import read

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = ["--max_steps", "5", "--per_device_train_batch_size", "8", "--calibration", "none", "--json"]

OWN = """
from zorl.tasks import Task
from zorl.tasks.fields import label, text


def rows(record):
    return [{"text": text(record, "message"), "label": label(record, ("angry", "calm"), "mood")}]


TASK = Task(
    name="mood",
    kind="classification",
    metric="f1",
    rows=rows,
    causal="{text} it was {mask}",
    masked="{text} it was {mask} .",
    label_words={"angry": "bad", "calm": "good"},
)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, parts: Callable[[str], Any]) -> Path:
    """Two models, and the splits of sst2, boolq, squad and copa."""
    folder = tmp_path_factory.mktemp("tasks")
    for kind in ("bert", "gpt2"):
        parts(kind).model.save_pretrained(folder / kind)
        parts(kind).tokenizer.save_pretrained(folder / kind)
    for split, size in {"train": 40, "dev": 12, "test": 10}.items():
        texts = [f"a {('terrible', 'great')[i % 2]} film and story {i}" for i in range(size)]
        tables = {
            "sst2": "\n".join(["sentence\tlabel", *(f"{text}\t{i % 2}" for i, text in enumerate(texts))]),
            "boolq": "\n".join(
                json.dumps({"passage": text, "question": "was it great", "label": bool(i % 2)})
                for i, text in enumerate(texts)
            ),
            "squad": "\n".join(
                json.dumps({"title": "film", "context": text, "question": "was it great", "answers": {"text": ["yes"]}})
                for text in texts
            ),
        }
        copa = {"choice1": "It was great.", "choice2": "It was terrible.", "question": "cause"}
        tables["copa"] = "\n".join(
            json.dumps({**copa, "premise": f"{t}.", "label": i % 2}) for i, t in enumerate(texts)
        )
        for name, table in tables.items():
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"{split}.{'tsv' if name == 'sst2' else 'jsonl'}").write_text(table + "\n")
    (folder / "mood.py").write_text(OWN)
    moods = [f"{text} {i},{('angry', 'calm')[i % 2]}" for i, text in enumerate(["terrible plot", "great plot"] * 10)]
    (folder / "moods.csv").write_text("\n".join(["message,mood", *moods]) + "\n")
    return folder


def zorl(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, Any, str]:
    """Exit status, the JSON or the text on stdout, and what is on stderr."""
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out.startswith("{") else out, err


def error_of(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    code, _, err = zorl(capsys, *words)
    assert code == 2
    return err


def test_a_task_is_trained_evaluated_and_predicted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out", ["--task", "sst2", "--dataset", folder / "sst2"]
    code, result, err = zorl(
        capsys, "train", *data, "--model", folder / "bert", "--k_shot", "8", "--output_dir", out, *SHORT
    )
    assert code == 0, err
    assert result["objective"] == "accuracy"
    assert "16 rows (negative: 8, positive: 8) to train on" in err
    assert "16 of 40 rows are held out to evaluate on, stratified by label" in err
    assert RunFolder(out).read_settings()["prompt"]["template"] == "{text} It was {mask}."

    code, figures, err = zorl(capsys, "eval", *data, "--model", out, "--json")
    assert code == 0, err
    assert figures["n"] == 10  # the test split
    assert set(figures["f1"]) == {"negative", "positive"}

    answers = tmp_path / "answers.jsonl"
    code, _, err = zorl(capsys, "predict", *data, "--model", out, "--dataset_split", "validation", "--output", answers)
    assert code == 0, err
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(rows) == 12
    assert {row["prediction"] for row in rows} <= {"negative", "positive"}


def test_a_causal_model_gets_the_causal_prompt_and_flags_override_the_task(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--task", "boolq", "--dataset", folder / "boolq", "--model", folder / "gpt2"]
    out = tmp_path / "out"
    code, result, err = zorl(
        capsys, "train", *data, "--reward", "f1", "--eval_split", "validation", "--output_dir", out, *SHORT
    )
    assert code == 0, err
    assert "f1" in result["objective"]
    assert "12 rows (no: 6, yes: 6) to evaluate on" in err
    assert RunFolder(out).read_settings()["prompt"]["template"] == "{passage} {question}?\n{mask}"
    own = ["--prompt", "{passage} It was {mask}", "--label_words", "yes=great", "no=bad"]
    code, figures, err = zorl(capsys, "eval", *data, *own, "--label_column", "label", "--json")
    assert code == 0, err
    assert figures["n"] == 10


def test_a_generation_is_scored_by_the_task_s_metric(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--task", "squad", "--dataset", folder / "squad" / "test.jsonl", "--model", folder / "gpt2"]
    code, figures, err = zorl(capsys, "eval", *data, "--max_completion_length", "4", "--json")
    assert code == 0, err
    assert set(figures["rewards"]) == {"squad_f1"}
    assert figures["n"] == 10


def test_answers_end_at_the_stop_string_of_the_task_or_the_flag(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--task", "squad", "--dataset", folder / "squad", "--max_completion_length", "3"]
    stops = {}
    for name, flags in (("task", ()), ("flag", ("--stop", r"e\n")), ("none", ("--stop", ""))):
        words = [*data, *flags, "--model", folder / "gpt2", "--k_shot", "8", "--output_dir", tmp_path / name]
        code, _, err = zorl(capsys, "train", *words, *SHORT)
        assert code == 0, err
        saved = RunFolder(tmp_path / name)
        stops[name] = saved.read_settings()["stop"]
        assert read(saved.trajectory)[0]["stop"] == stops[name]
    assert stops == {"task": "\n", "flag": "e\n", "none": None}


def test_predictions_end_at_the_stop_string_that_the_model_remembers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder / "gpt2", model)
    prompt = {"template": "{context} {question}"}

    def predicted(*flags: str, **settings: object) -> list[str]:
        RunFolder(model).write_settings({"prompt": prompt, "temperature": 0.0, **settings})
        words = ["--model", model, "--task", "squad", "--dataset", folder / "squad", "--overwrite", "--output"]
        code, _, err = zorl(capsys, "predict", *words, tmp_path / "out.jsonl", "--json", *flags)
        assert code == 0, err
        return [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    free = predicted(stop=None)
    stop = free[0][3]
    cut = [text.partition(stop)[0] for text in free]
    assert predicted(stop=stop) == cut != free
    assert predicted("--stop", stop, stop=None) == cut
    assert predicted("--stop", "", stop=stop) == free
    # An earlier version saved none: the task decides.
    assert predicted() == [text.partition("\n")[0] for text in free]


def test_a_generation_is_trained_on_k_rows_in_all(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--task",
        "squad",
        "--dataset",
        folder / "squad",
        "--model",
        folder / "gpt2",
        "--max_completion_length",
        "3",
    ]
    code, result, err = zorl(capsys, "train", *words, "--k_shot", "8", "--output_dir", tmp_path / "out", *SHORT)
    assert code == 0, err
    assert result["objective"] == "squad_f1"
    assert "8 rows to train on" in err


def test_a_multiple_choice_is_trained_and_evaluated(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--task", "copa", "--dataset", folder / "copa"]
    out = tmp_path / "out"
    code, result, err = zorl(
        capsys, "train", *words, "--model", folder / "gpt2", "--k_shot", "8", "--output_dir", out, *SHORT
    )
    assert code == 0, err
    assert result["objective"] == "accuracy"
    code, figures, err = zorl(capsys, "eval", *words, "--model", out, "--json")
    assert code == 0, err
    assert figures["n"] == 10
    predictions = tmp_path / "predictions.jsonl"
    code, _, err = zorl(capsys, "predict", *words, "--model", out, "--output", predictions, "--json")
    assert code == 0, err
    rows = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    assert figures["accuracy"] == sum(row["prediction"] == row["label"] for row in rows) / 10


def test_a_task_of_one_s_own_is_a_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--task", folder / "mood.py", "--dataset", folder / "moods.csv", "--model", folder / "bert"]
    code, result, err = zorl(capsys, "train", *words, "--output_dir", tmp_path / "out", *SHORT[:-1])
    assert code == 0, err
    assert f"zorl eval --model {tmp_path}/out --task {folder}/mood.py --dataset TEST.csv" in result
    code, figures, err = zorl(capsys, "eval", *words[:4], "--model", tmp_path / "out", "--json")
    assert code == 0, err
    assert figures["n"] == 20


def test_k_shot_needs_no_task_and_draws_by_the_seed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[str]] = []

    def trainer(*_: Any, train_dataset: Any, eval_dataset: Any, **__: Any) -> None:
        assert Counter(train_dataset["label"]) == Counter(eval_dataset["label"]) == {"0": 4, "1": 4}
        drawn.append(train_dataset["sentence"][:])
        raise ValueError("seen")

    monkeypatch.setattr("zorl.apps.train.MeZOTrainer", trainer)
    data = [
        "--model",
        folder / "bert",
        "--dataset",
        folder / "sst2" / "train.tsv",
        "--reward",
        "accuracy",
        "--k_shot",
        "4",
    ]
    prompt = [
        "--prompt",
        "{sentence} it was {mask} .",
        "--label_words",
        "0=bad",
        "1=good",
        "--output_dir",
        tmp_path / "o",
    ]
    for seed in ("13", "13", "21"):
        assert "seen" in error_of(capsys, "train", *data, *prompt, "--seed", seed)
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_sample_has_its_sizes_and_the_labels_in_proportion(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[str]] = []

    def trainer(*_: Any, train_dataset: Any, eval_dataset: Any, **__: Any) -> None:
        assert (len(train_dataset), len(eval_dataset)) == (12, 6)
        assert Counter(train_dataset["label"]) == {"negative": 6, "positive": 6}
        assert not {*train_dataset["text"]} & {*eval_dataset["text"]}
        drawn.append(train_dataset["text"][:])
        raise ValueError("seen")

    monkeypatch.setattr("zorl.apps.train.MeZOTrainer", trainer)
    data = ["--task", "sst2", "--model", folder / "bert", "--dataset", folder / "sst2", "--output_dir", tmp_path / "o"]
    for seed in ("13", "13", "21"):
        assert "seen" in error_of(capsys, "train", *data, "--sample", "12", "6", "--seed", seed)
    assert drawn[0] == drawn[1] != drawn[2]
    for sizes, message in (
        (["12"], "--sample takes two numbers, of rows to train on and of rows to hold out, got [12]"),
        (["12", "0"], "got [12, 0]"),
        (["1000", "500"], "--sample 1000 500 needs 1500 rows, but there are only"),
        (["12", "6", "--k_shot", "4"], "--k_shot and --sample are two ways of drawing rows: give only one"),
    ):
        assert message in error_of(capsys, "train", *data, "--sample", *sizes)


def test_what_does_not_fit_is_a_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bert, data = ["--model", folder / "bert"], ["--dataset", folder / "sst2"]
    assert "did you mean 'sst2'" in error_of(capsys, "eval", "--task", "sst22", *bert, *data)
    assert "causal language models alone" in error_of(capsys, "eval", "--task", "multirc", *bert, *data)
    assert "--text_column cannot be combined with --task" in error_of(
        capsys, "eval", "--task", "sst2", *bert, *data, "--text_column", "text"
    )
    for command in ("train", "eval", "predict", "diagnose"):
        goal = ["--reward", "f1"] if command in ("train", "diagnose") else []
        assert "--task or --dataset is required" in error_of(capsys, command, *bert, *goal)
    assert "--dataset is required" in error_of(capsys, "eval", "--task", folder / "mood.py", *bert)
    assert "has no column 'gold'" in error_of(capsys, "eval", "--task", "sst2", *bert, *data, "--label_column", "gold")
    assert "the label 'negative' has 20 rows" in error_of(
        capsys, "train", "--task", "sst2", *bert, *data, "--k_shot", "16", "--output_dir", tmp_path / "out"
    )
    assert "there is no file 'nowhere.py'" in error_of(capsys, "eval", "--task", "nowhere.py", *bert, *data)
    (tmp_path / "empty.py").write_text("task = 1\n")
    (tmp_path / "broken.py").write_text("TASK = Task(\n")
    assert "broken.py' cannot be run: SyntaxError" in error_of(
        capsys, "eval", "--task", tmp_path / "broken.py", *bert, *data
    )
    assert "the file has no TASK" in error_of(capsys, "eval", "--task", tmp_path / "empty.py", *bert, *data)
