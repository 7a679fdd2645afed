"""The paper's tasks: a record of the hub and the same one in a published file make the same row, and the prompts take it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest

from zorl import Prompt
from zorl.tasks import Hub, Task, names, task
from zorl.tasks.fields import label, text, texts
from zorl.verbalizer import Verbalizer

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
NLI = {"premise": "It rains.", "hypothesis": "It is wet."}


class Example(NamedTuple):
    """Records as the hub has them, the same in a file as it is published, and the rows that they make."""

    hub: list[dict[str, Any]]
    file: str
    content: str | bytes
    rows: list[dict[str, Any]]


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


RECORD_TEXT = "By Ann Lee in Oslo . Lee won .\n@highlight\nAnn Lee wins"
RECORD_QUERY = "@placeholder is glad"
EXAMPLES = {
    "sst2": Example(
        [{"sentence": "dull ", "label": 0, "idx": 0}, {"sentence": "a joy ", "label": 1, "idx": 1}],
        "train.tsv",
        "sentence\tlabel\ndull\t0\na joy\t1\n",
        [{"text": "dull", "label": "negative"}, {"text": "a joy", "label": "positive"}],
    ),
    "sst5": Example(
        [{"text": "the worst", "label": 0, "label_text": "very negative"}, {"text": "fine , if long", "label": 3}],
        "train.csv",
        '0,the worst\n3,"fine , if long"\n',
        [{"text": "the worst", "label": "very negative"}, {"text": "fine , if long", "label": "positive"}],
    ),
    "trec": Example(
        [
            {"text": "What is an atom ?", "coarse_label": 2, "fine_label": 9},
            {"text": "What is the NASA ?", "coarse_label": 0, "fine_label": 0},
            {"text": "Who is Galil\xe9o ?", "coarse_label": 3, "fine_label": 1},
        ],
        "train_5500.label",
        "DESC:def What is an atom ?\nABBR:exp What is the NASA ?\nHUM:ind Who is Galil\xe9o ?\n".encode("latin-1"),
        [
            {"text": "What is an atom ?", "label": "DESC"},
            {"text": "What is the NASA ?", "label": "ABBR"},
            {"text": "Who is Galil\xe9o ?", "label": "HUM"},
        ],
    ),
    "mnli": Example(
        [{**NLI, "label": 1, "idx": 4}],
        "train.tsv",
        "index\tsentence1\tsentence2\tlabel1\tgold_label\n4\tIt rains. \tIt is wet.\tneutral\tneutral\n",
        [{**NLI, "label": "neutral"}],
    ),
    "snli": Example(
        [{**NLI, "label": 0}, {**NLI, "label": -1}, {**NLI, "label": 2}],
        "train.tsv",
        "index\tsentence1\tsentence2\tlabel1\tgold_label\n1\tIt rains.\tIt is wet.\tentailment\tentailment\n"
        "2\tIt rains.\tIt is wet.\tneutral\t-\n"
        "3\tIt rains.\tIt is wet.\tneutral\tcontradiction\tcontradiction\tneutral\tcontradiction\tcontradiction\n",
        [{**NLI, "label": "entailment"}, {**NLI, "label": "contradiction"}],
    ),
    "rte": Example(
        [{"sentence1": "It rains.", "sentence2": "It is wet.", "label": 1, "idx": 7}],
        "train.jsonl",
        lines({**NLI, "label": "not_entailment", "idx": 7}),
        [{**NLI, "label": "not_entailment"}],
    ),
    "cb": Example(
        [{**NLI, "label": 1}, {**NLI, "label": 2}],
        "train.jsonl",
        lines({**NLI, "label": "contradiction"}, {**NLI, "label": "neutral"}),
        [{**NLI, "label": "contradiction"}, {**NLI, "label": "neutral"}],
    ),
    "boolq": Example(
        [{"question": "is it wet", "passage": "Rain -- It rains.", "idx": 0, "label": 1}],
        "train.jsonl",
        lines({"question": "is it wet", "passage": "Rain -- It rains.", "idx": 0, "label": True}),
        [{"passage": "Rain -- It rains.", "question": "is it wet", "label": "yes"}],
    ),
    "wsc": Example(
        [
            {
                "text": "Bob paid for Al. He is hurt.",
                "span1_index": 0,
                "span1_text": "Bob",
                "span2_text": "He",
                "label": 0,
            }
        ],
        "train.jsonl",
        lines(
            {
                "text": "Bob paid for Al. He is hurt.",
                "target": {"span1_index": 0, "span1_text": "Bob", "span2_text": "He"},
                "label": False,
            }
        ),
        [{"text": "Bob paid for Al. He is hurt.", "span1": "Bob", "span2": "He", "label": "no"}],
    ),
    "wic": Example(
        [{"word": "class", "sentence1": "A class.", "sentence2": "It shows class.", "start1": 2, "label": 0}],
        "train.jsonl",
        lines(
            {"word": "class", "sentence1": "A class.", "sentence2": "It shows class.", "label": False, "version": 1.1}
        ),
        [{"word": "class", "sentence1": "A class.", "sentence2": "It shows class.", "label": "no"}],
    ),
    "multirc": Example(
        [
            {"paragraph": "It rains.", "question": "How is it?", "answer": "Wet", "label": 1},
            {"paragraph": "It rains.", "question": "How is it?", "answer": "Dry", "label": 0},
            {"paragraph": "It rains.", "question": "Does it snow?", "answer": "No", "label": 1},
        ],
        "train.jsonl",
        lines(
            {
                "idx": 6,
                "passage": {
                    "text": "It rains.",
                    "questions": [
                        {
                            "question": "How is it?",
                            "answers": [{"text": "Wet", "label": 1}, {"text": "Dry", "label": 0}],
                        },
                        {"question": "Does it snow?", "answers": [{"text": "No", "label": 1}]},
                    ],
                },
            }
        ),
        [
            {"paragraph": "It rains.", "question": "How is it?", "answer": "Wet", "label": "yes"},
            {"paragraph": "It rains.", "question": "How is it?", "answer": "Dry", "label": "no"},
            {"paragraph": "It rains.", "question": "Does it snow?", "answer": "No", "label": "yes"},
        ],
    ),
    "copa": Example(
        [
            {"premise": "I am wet.", "choice1": "It rains.", "choice2": "I swam.", "question": "cause", "label": 1},
            {
                "premise": "It rains.",
                "choice1": "Grass grows.",
                "choice2": "It dies.",
                "question": "effect",
                "label": 0,
            },
        ],
        "train.jsonl",
        lines(
            {"premise": "I am wet.", "choice1": "It rains.", "choice2": "I swam.", "question": "cause", "label": 1},
            {
                "premise": "It rains.",
                "choice1": "Grass grows.",
                "choice2": "It dies.",
                "question": "effect",
                "label": 0,
            },
        ),
        [
            {
                "premise": "I am wet",
                "connective": "because",
                "options": ["it rains.", "I swam."],
                "label": "I swam.",
            },
            {
                "premise": "It rains",
                "connective": "so",
                "options": ["grass grows.", "it dies."],
                "label": "grass grows.",
            },
        ],
    ),
    "record": Example(
        [
            {
                "passage": RECORD_TEXT,
                "query": RECORD_QUERY,
                "entities": ["Oslo", "Lee", "Ann Lee"],
                "answers": ["Ann Lee", "Lee"],
            }
        ],
        "train.jsonl",
        lines(
            {
                "passage": {
                    "text": RECORD_TEXT,
                    "entities": [{"start": 3, "end": 9}, {"start": 14, "end": 17}, {"start": 21, "end": 23}],
                },
                "qas": [
                    {
                        "query": RECORD_QUERY,
                        "answers": [
                            {"start": 3, "end": 9, "text": "Ann Lee"},
                            {"start": 21, "end": 23, "text": "Lee"},
                            {"start": 43, "end": 49, "text": "Ann Lee"},
                        ],
                    }
                ],
            }
        ),
        [
            {
                "passage": "By Ann Lee in Oslo . Lee won .\n- Ann Lee wins",
                "options": ["Ann Lee is glad", "Oslo is glad"],
                "label": "Ann Lee is glad",
            }
        ],
    ),
    "squad": Example(
        [
            {
                "id": "a1",
                "title": "Rain",
                "context": "It rains 5 mm.",
                "question": "How much?",
                "answers": {"text": ["5 mm", "5", "5 mm"], "answer_start": [9, 9, 9]},
            }
        ],
        "train.json",
        json.dumps(
            {
                "version": "1.1",
                "data": [
                    {
                        "title": "Rain",
                        "paragraphs": [
                            {
                                "context": "It rains 5 mm.",
                                "qas": [
                                    {
                                        "id": "a1",
                                        "question": "How much?",
                                        "answers": [{"text": t, "answer_start": 9} for t in ("5 mm", "5", "5 mm")],
                                    }
                                ],
                            }
                        ],
                    }
                ],
            },
            indent=2,
        ),
        [{"title": "Rain", "context": "It rains 5 mm.", "question": "How much?", "label": ["5 mm", "5"]}],
    ),
    "drop": Example(
        [
            {
                "query_id": "q",
                "passage": "Two and one.",
                "question": "How many?",
                "answers_spans": {"spans": ["3", "three"], "types": ["number", "span"]},
            }
        ],
        "train.jsonl",
        lines(
            {
                "query_id": "q",
                "passage": "Two and one.",
                "question": "How many?",
                "answers_spans": {"spans": ["3", "three"], "types": ["number", "span"]},
            }
        ),
        [{"passage": "Two and one.", "question": "How many?", "label": ["3", "three"]}],
    ),
}


@pytest.fixture(params=sorted(EXAMPLES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def written(folder: Path, file: str, content: str | bytes) -> Path:
    path = folder / file
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def pretend_hub(monkeypatch: pytest.MonkeyPatch, records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Answers for the hub with these records; what it was asked for."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((path, config, split))
        return datasets.Dataset.from_list(records)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_every_task_is_tried_here() -> None:
    assert names() == sorted(EXAMPLES)


def test_hub_file_and_folder_give_the_same_rows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example, found = EXAMPLES[name], task(name)
    assert found.name == name
    path = written(tmp_path, example.file, example.content)
    assert found.load("train", path) == example.rows
    assert found.load("train", str(tmp_path)) == example.rows
    asked = pretend_hub(monkeypatch, example.hub)
    assert found.load("train") == example.rows
    assert found.hub is not None
    assert asked == [(found.hub.path, found.hub.config, "train")]
    again = written(tmp_path, "again.parquet", b"")
    datasets.Dataset.from_list(example.hub).to_parquet(again)
    assert found.load("train", again) == example.rows


def test_prompts_take_the_rows_and_have_a_word_for_every_label(name: str) -> None:
    found, rows = task(name), EXAMPLES[name].rows
    prompts = [found.prompt(masked=False)] + ([found.prompt(masked=True)] if found.masked is not None else [])
    for prompt in prompts:
        prompt.check_columns(rows[0])
        if found.kind == "classification":
            prompt.check_labels([row["label"] for row in rows])
            assert prompt.labels == tuple(found.label_words or ())
        rendered = prompt.render(rows[0])
        assert "{" not in rendered.before + rendered.after
    if found.kind == "generation":
        assert found.prompt(masked=False).render(rows[0]).before.endswith("\nAnswer:")
    if found.kind == "multiple_choice":
        assert all(row["label"] in row["options"] for row in rows)


def test_a_task_without_a_masked_prompt_says_so() -> None:
    with pytest.raises(ValueError, match="'multirc' has a prompt for causal language models alone"):
        task("multirc").prompt(masked=True)


def test_the_paper_s_prompts() -> None:
    before = {
        name: task(name).prompt(masked=False).render(EXAMPLES[name].rows[0]).before
        for name in ("rte", "boolq", "squad")
    }
    assert before == {
        "rte": 'It rains.\nDoes this mean that "It is wet." is true? Yes or No?\n',
        "boolq": "Rain -- It rains. is it wet?\n",
        "squad": "Title: Rain\nContext: It rains 5 mm.\nQuestion: How much?\nAnswer:",
    }
    masked = task("mnli").prompt(masked=True).render(EXAMPLES["mnli"].rows[0])
    assert (masked.before, masked.after) == ("It rains. ? ", " , It is wet.")


def test_trec_s_numbers_mean_what_they_mean_in_files_and_on_the_hub(tmp_path: Path) -> None:
    path = written(tmp_path, "TREC.train.all", b"0 How did it start ?\n2 What is the NASA ?\n")
    assert [row["label"] for row in task("trec").load("train", path)] == ["DESC", "ABBR"]
    assert task("trec").rows({"text": "How ?", "coarse_label": 0}) == [{"text": "How ?", "label": "ABBR"}]


def test_snli_s_own_table_has_its_gold_label_in_front(tmp_path: Path) -> None:
    header = ("gold_label", "sentence1", "sentence2", "pairID", *(f"label{i}" for i in range(1, 6)))
    judged = ("entailment", "It rains.", "It is wet.", "4#r1e", "entailment", *["entailment"] * 3, "contradiction")
    alone = ("neutral", "It rains.", "It is wet.", "5#r1n", "neutral", "", "", "", "")
    undecided = (
        "-",
        "It rains.",
        "It is wet.",
        "6#r1n",
        "neutral",
        "neutral",
        "entailment",
        "entailment",
        "contradiction",
    )
    table = "".join("\t".join(fields) + "\n" for fields in (header, judged, alone, undecided))
    rows = task("snli").load("train", written(tmp_path, "snli_1.0_train.tsv", table))
    assert rows == [{**NLI, "label": "entailment"}, {**NLI, "label": "neutral"}]


def test_a_record_of_one_entity_is_no_question() -> None:
    record = {
        "passage": "p",
        "query": "@placeholder won",
        "entities": ["Lee", "Ann Lee"],
        "answers": ["Lee", "Ann Lee"],
    }
    assert list(task("record").rows(record)) == []
    assert len(list(task("record").rows({**record, "entities": ["Lee", "Oslo"]}))) == 1


def test_a_table_with_a_header_and_one_without_are_the_same(tmp_path: Path) -> None:
    bare = task("sst2").load("train", written(tmp_path, "bare.tsv", "dull\t0\na joy\t1\n"))
    assert bare == EXAMPLES["sst2"].rows


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("sst2", "a.tsv", "text\tlabel\ndull\t0\na joy\t1\n"),
        ("sst5", "a.csv", 'label,sentence\n0,the worst\n3,"fine , if long"\n'),
        ("trec", "a.csv", "text,coarse_label\nWhat is an atom ?,2\nWhat is the NASA ?,0\nWho is Galil\xe9o ?,3\n"),
    ],
)
def test_a_header_may_have_any_names_that_the_task_accepts(name: str, file: str, content: str, tmp_path: Path) -> None:
    assert task(name).load("train", written(tmp_path, file, content)) == EXAMPLES[name].rows


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("sst2", "a.tsv", "review\tlabel\ndull\t0\n", r"row 1: no column 'sentence' or 'text' \(columns: 'review', 'label'\)"),
        ("sst2", "a.tsv", "sentence\tlabel\ndull\t0\nfun\t7\n", r"a\.tsv, row 2: 'label' holds '7'; expected one of 'neg"),
        ("sst2", "a.tsv", "sentence\tlabel\ndull\t-1\n", r"row 1: .*the row has no label"),
        ("rte", "a.jsonl", lines({"premise": "x", "label": 0}), r"row 1: no column 'hypothesis' or 'sentence2' \(columns"),
        ("boolq", "a.jsonl", lines({"passage": " ", "question": "q", "label": 1}), "row 1: expected text in 'passage'"),
        ("record", "a.jsonl", lines({"passage": "p", "query": "q", "entities": ["e"], "answers": ["e"]}), "row 1: the query 'q'"),
        ("squad", "a.jsonl", lines({"title": "t", "context": "c", "question": "q", "id": "5", "answers": []}), "'5': the list"),
        ("drop", "a.jsonl", lines({"passage": "p", "question": "q"}), "row 1: answers_spans: expected a list of texts"),
        ("snli", "a.jsonl", lines({**NLI, "label": -1}), "holds no rows of the task 'snli'"),
        ("trec", "a.label", "X:y What ?\n", "row 1: 'label' holds 'X'"),
    ],
)  # fmt: skip
def test_a_malformed_row_is_named(name: str, file: str, content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        task(name).load("train", written(tmp_path, file, content))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda record: [{"text": record["text"]}], "KeyError: 'text'"),
        (lambda record: [{"text": record["sentence"].words}], "AttributeError: 'str' object has no attribute 'words'"),
        (lambda record: [{"text": record["sentence"] + 1}], "TypeError: can only concatenate str"),
        (lambda record: [{"text": record["sentence"].split()[1]}], "IndexError: list index out of range"),
        (lambda record: None, "TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_a_row_that_a_task_of_one_s_own_fails_on_is_named(rows: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", lines({"sentence": "dull", "label": 0}))
    with pytest.raises(ValueError, match=rf"a\.jsonl, row 1: {message}"):
        replace(task("sst2"), rows=rows).load("train", path)


def test_the_file_of_a_split_is_known_by_its_name(tmp_path: Path) -> None:
    for file, sentence in {"train": "a", "dev_matched": "b", "readme": "c"}.items():
        written(tmp_path, f"{file}.jsonl", lines({"sentence": sentence, "label": 0}))
    assert task("sst2").load("validation", tmp_path)[0]["text"] == "b"
    assert task("sst2").load("test", tmp_path)[0]["text"] == "b"  # nobody has the labels of SST-2's test split
    with pytest.raises(ValueError, match=r"no file for the test split; expected test in a name \(files: dev_matched"):
        task("snli").load("test", tmp_path)
    written(tmp_path, "test.jsonl", lines({"sentence": "d", "label": 0}))
    assert task("sst2").load("test", tmp_path)[0]["text"] == "d"
    written(tmp_path, "dev_mismatched.jsonl", "")
    with pytest.raises(ValueError, match=r"several files of the validation split: dev_matched\.jsonl, dev_mismatched"):
        task("sst2").load("validation", tmp_path)


UNLABELLED, FIRST_LETTER = {"question": "q", "answers": [{"text": "a"}]}, {"start": 0, "end": 0}


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("sst2", "test.tsv", "index\tsentence\n0\tuneasy\n"),
        ("rte", "test.tsv", "index\tsentence1\tsentence2\n0\tIt rains.\tIt is wet.\n"),
        ("boolq", "test.jsonl", lines({"question": "is it wet", "passage": "It rains.", "idx": 0})),
        ("cb", "test.jsonl", lines({**NLI, "label": -1}, {**NLI, "label": -1})),
        ("multirc", "test.jsonl", lines({"passage": {"text": "p", "questions": [UNLABELLED]}})),
        ("record", "test.jsonl", lines({"passage": {"text": "p", "entities": [FIRST_LETTER]}, "qas": [{"query": "q"}]})),
    ],
    ids=lambda value: value if value in EXAMPLES else "",
)  # fmt: skip
def test_a_test_file_as_published_without_labels_is_passed_over(
    name: str, file: str, content: str, tmp_path: Path
) -> None:
    example = EXAMPLES[name]
    written(tmp_path, example.file.replace("train", "dev"), example.content)
    test = written(tmp_path, file, content)
    assert task(name).load("test", tmp_path) == example.rows
    with pytest.raises(ValueError, match=rf"{re.escape(file)}, row 1: "):
        task(name).load("test", test)


@pytest.mark.parametrize("damage", ["fun\t-1", "fun\t7", "\t1"])
def test_a_test_file_with_labels_is_not_passed_over_for_a_damaged_row(damage: str, tmp_path: Path) -> None:
    written(tmp_path, "dev.tsv", "sentence\tlabel\ndull\t0\n")
    written(tmp_path, "test.tsv", f"sentence\tlabel\n{damage}\na joy\t1\n")
    with pytest.raises(ValueError, match=r"test\.tsv, row 1: "):
        task("sst2").load("test", tmp_path)


def test_a_test_file_with_labels_is_used(tmp_path: Path) -> None:
    written(tmp_path, "dev.tsv", "sentence\tlabel\ndull\t0\n")
    written(tmp_path, "test.tsv", "sentence\tlabel\na joy\t1\n")
    assert task("sst2").load("test", tmp_path) == [{"text": "a joy", "label": "positive"}]


def test_a_wrong_split_task_or_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no task 'sst'; did you mean .*'sst2'.*tasks: boolq, "):
        task("sst")
    with pytest.raises(ValueError, match="split must be train, validation or test, got 'dev'"):
        task("sst2").load("dev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no validation split; hold out"):
        task("trec").load("validation")
    with pytest.raises(ValueError, match="has no data set on the hub"):
        replace(task("trec"), hub=None).load("train")
    for kind in ("sst2", "trec", "snli"):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            task(kind).load("train", tmp_path / "nowhere.tsv")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        task("trec").load("train", tmp_path / "nowhere.label")


def test_a_task_imports_no_other_and_no_reward() -> None:
    code = (
        "import sys; from zorl.tasks import task; task('cb'); print(*(m for m in sys.modules if m.startswith('zorl.')))"
    )
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "zorl.tasks.cb" in loaded
    assert not [m for m in loaded if m.startswith(("zorl.rewards", "zorl.apps")) or m == "zorl.tasks.rte"]


def test_values_of_a_record() -> None:
    assert text({"b": " x "}, "a", "b") == "x"
    found = [label({"l": value}, ("no", "yes"), "l") for value in (1, "1", True, "true", "True", "yes", 0, False, "no")]
    assert found == ["yes"] * 6 + ["no"] * 3
    assert texts(["b", "a", "b"], "answers") == ["b", "a"]
    with pytest.raises(ValueError, match="'l' holds None"):
        label({"l": None}, ("no", "yes"), "l")


def test_the_document_s_table_is_the_tasks() -> None:
    rows = dict(re.findall(r"^\| (\w+) (\|.*\|)$", DOCUMENT, flags=re.M))
    rows.pop("task")
    assert sorted(rows) == names()
    for name, row in rows.items():
        found = task(name)
        assert found.hub is not None
        prompts = ["—" if t is None else "`{}`".format(t.replace("\n", "\\n")) for t in (found.causal, found.masked)]
        cells = [found.kind.replace("_", " "), found.metric, found.hub.name, *prompts]
        assert row == f"| {' | '.join(cells)} |"


def test_the_document_s_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shots, own = re.findall(r"^```python\n(.*?)^```$", DOCUMENT, flags=re.DOTALL | re.M)
    pretend_hub(monkeypatch, [{"sentence": f"film {i}", "label": i % 2} for i in range(2600)])
    found: dict[str, Any] = {}
    exec(shots, found)
    assert [len(found[part]) for part in ("train", "validation", "test")] == [1000, 500, 1000]
    assert found["prompt"].labels == ("negative", "positive")
    exec(own, found)
    assert isinstance(found["TASK"], Task)
    path = written(tmp_path, "train.csv", "message,mood\nGo away!,angry\nThank you.,1\n")
    assert found["TASK"].load("train", path) == [
        {"text": "Go away!", "label": "angry"},
        {"text": "Thank you.", "label": "calm"},
    ]


def test_a_hub_s_name_says_which_part_it_is() -> None:
    assert Hub("nyu-mll/glue", "sst2").name == "nyu-mll/glue, sst2"
    assert Hub("SetFit/sst5").name == "SetFit/sst5"


def test_a_word_at_the_beginning_is_the_one_behind_a_space(parts: Callable[[str], Any]):
    """As LM-BFF's code has it for RoBERTa, wherever the word stands."""
    tokenizer = parts("roberta").tokenizer
    prompt = Prompt(str(task("trec").masked), {"bad": "terrible", "good": "great"})
    verbalizer = Verbalizer(tokenizer, prompt, masked=True)
    assert [tokenizer.convert_ids_to_tokens(list(ids)) for ids in verbalizer.options.tokens] == [
        ["Ġterrible"],
        ["Ġgreat"],
    ]
    encoded = verbalizer([prompt.render({"text": "the film"})])[0]
    assert encoded.ids.tolist() == tokenizer("<mask>: the film")["input_ids"]
