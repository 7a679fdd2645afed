"""Loading, counting and holding out rows."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from zorl.data import checked_rows, hold_out, load_rows
from zorl.prompts import Prompt
from zorl.tables import read_table


def write(path: Path, content: str | bytes) -> Path:
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def rows_of(path: Path, text: str | int | None = "text", label: str | int | None = "label") -> list[dict[str, Any]]:
    return load_rows(path, text_column=text, label_column=label).dataset.to_list()


def message(path: Path, error: type[Exception] = ValueError, **arguments: Any) -> str:
    """What load_rows complains about; by default it is asked for the columns text and label."""
    with pytest.raises(error) as caught:
        load_rows(path, **({"text_column": "text", "label_column": "label"} | arguments))
    return str(caught.value)


EXPECTED = [{"text": 'a "fine" film , really', "label": "1"}, {"text": "dull", "label": "0"}]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", 'text,label\r\n"a ""fine"" film , really",1\r\ndull,0\r\n'),
        ("rows.tsv", 'text\tlabel\na "fine" film , really\t1\n\ndull\t0'),
        ("rows.TSV", '\ufefftext\tlabel\r\na "fine" film , really\t1\r\ndull\t0\r\n'),
        ("rows.jsonl", '{"text": "a \\"fine\\" film , really", "label": "1"}\n\n{"label": "0", "text": "dull"}\n'),
        ("rows.json", json.dumps(EXPECTED, indent=2)),
        ("rows.json", "\n".join(map(json.dumps, EXPECTED))),
    ],
)
def test_the_same_rows_come_out_of_every_text_format(tmp_path: Path, name: str, content: str, suffix: str) -> None:
    assert rows_of(write(tmp_path / (name + suffix), content)) == EXPECTED


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_same_rows_come_out_of_parquet(tmp_path: Path, suffix: str) -> None:
    pq.write_table(pa.Table.from_pylist(EXPECTED), tmp_path / "plain.parquet")
    path = write(tmp_path / f"rows.parquet{suffix}", (tmp_path / "plain.parquet").read_bytes())
    assert rows_of(path) == EXPECTED


def test_columns_by_position_become_text_and_label(tmp_path: Path) -> None:
    path = write(tmp_path / "sst2.tsv", 'id7\tone long "string of cliches\t0\nid8\tthe best film\t1\n')
    rows = load_rows(path, text_column="1", label_column=2)
    assert (rows.text_column, rows.label_column) == ("text", "label")
    assert rows.dataset.to_list() == [
        {"0": "id7", "text": 'one long "string of cliches', "label": "0"},
        {"0": "id8", "text": "the best film", "label": "1"},
    ]


def test_a_header_of_numbers_is_a_header(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path / "a.csv", "0,1\nfine,good\n"), text_column="0", label_column="1")
    assert (rows.text_column, rows.label_column) == ("0", "1")
    assert rows.dataset.to_list() == [{"0": "fine", "1": "good"}]


def test_other_columns_are_kept_and_columns_that_nobody_asked_for_are_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "question,answer\nwhy?,because\n")
    rows = load_rows(path, text_column="question")
    assert (rows.text_column, rows.label_column) == ("question", None)
    assert rows.dataset.column_names == ["question", "answer"]
    assert load_rows(path).dataset.to_list() == [{"question": "why?", "answer": "because"}]


def test_json_and_parquet_keep_types_and_conversations(tmp_path: Path) -> None:
    objects = [
        {"prompt": [{"role": "user", "content": "2+2?"}], "solution": 4, "text": "x"},
        {"prompt": [{"role": "user", "content": "hi"}], "solution": None, "text": "y", "extra": True},
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, objects)))
    assert rows_of(path, label=None) == [objects[0] | {"extra": None}, objects[1]]


def test_texts_may_hold_newlines_in_csv_and_odd_separators_in_tsv(tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / "a.csv", 'text,label\n"two\nlines",1\n'))[0]["text"] == "two\nlines"
    text = "form\x0cfeed, line\u2028separator, carriage\rreturn"
    assert rows_of(write(tmp_path / "a.tsv", f"text\tlabel\n{text}\t1\n"))[0]["text"] == text


@given(
    rows=st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters="\t\n\r\x00", exclude_categories=["Cs"]), min_size=1),
            st.sampled_from(["0", "1"]),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_any_text_survives_a_tsv_file(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    lines = "\n".join("\t".join(row) for row in rows)
    path = write(tmp_path_factory.mktemp("data") / "a.tsv", f"text\tlabel\n{lines}\n")
    assert [tuple(row.values()) for row in rows_of(path)] == rows


def test_a_folder_is_loaded_as_datasets_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"
    folder.mkdir()
    write(folder / "train.csv", "text,label\nfine,1\ndull,0\n")
    write(folder / "test.csv", "text,label\nodd,1\n")
    assert load_rows(folder, text_column="text", label_column="label").dataset["text"] == ["fine", "dull"]
    assert load_rows(folder, split="test").dataset["text"] == ["odd"]
    assert "could not load the data set" in message(folder, split="tests")
    assert "has no column 'lable'; did you mean 'label'?" in message(folder, label_column="lable")


def test_a_data_set_that_is_a_script_is_read_from_its_copy_in_parquet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is pretended; its copy has a folder for each configuration, and in it one for each split."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for config in ("boolq", "cb"):
        for split in ("train", "validation"):
            folder = tmp_path / "copy" / config / split
            folder.mkdir(parents=True)
            pq.write_table(pa.table({"text": [f"{config} {split}"]}), folder / "0000.parquet")
    real = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, *, revision: str | None = None, **more: Any) -> Any:
        assert path == "aps/super_glue"
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found super_glue.py")
        assert (name, revision) == (None, "refs/convert/parquet")
        return real(str(tmp_path / "copy"), **more)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("aps/super_glue", config="boolq", split="validation").dataset["text"] == ["boolq validation"]
    assert load_rows("aps/super_glue", config="cb").dataset["text"] == ["cb train"]


def test_a_script_in_a_folder_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "corpus" / "corpus.py", "raise SystemExit('this ran')\n")
    assert "scripts are no longer supported, but found corpus.py" in message(tmp_path / "corpus")


def test_a_missing_file_is_reported_with_the_closest_name(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", "a\tb\n")
    assert message(tmp_path / "trian.tsv", FileNotFoundError).endswith("trian.tsv'; did you mean 'train.tsv'?")
    assert "the folder" in message(tmp_path / "nowhere" / "train.tsv", FileNotFoundError)


def test_a_misspelt_column_is_reported_with_the_closest_one_and_all_of_them(tmp_path: Path) -> None:
    found = "has no column 'lable'; did you mean 'label'? (columns: 'text', 'label')"
    for name, content in [
        ("a.csv", "text,label\nx,1\n"),
        ("a.tsv", "text\tlabel\nx\t1\n"),
        ("a.jsonl", '{"text": "x", "label": 1}\n'),
    ]:
        assert found in message(write(tmp_path / name, content), label_column="lable")
    pq.write_table(pa.table({"text": ["x"], "label": [1]}), tmp_path / "a.parquet")
    assert found in message(tmp_path / "a.parquet", label_column="lable")


def test_a_file_without_header_says_how_to_name_its_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "one long string of cliches that goes on and on\t0\nnice\t1\n")
    complaint = message(path)
    assert "has no column 'text'" in complaint
    assert "'one long string of cliches that goes on…', '0'" in complaint
    assert complaint.endswith("If the first line is not a header, give positions: 0 is the first column")
    assert "has no column 2: its 2 columns are 0 to 1" in message(path, text_column=0, label_column=2)


def test_a_file_with_another_separator_says_so(tmp_path: Path) -> None:
    found = message(write(tmp_path / "a.csv", "text;label\nx, y;1\n"))
    assert found.endswith(
        "has no column 'text' (columns: 'text;label'); the file seems to be separated by ';': save it with commas"
    )
    found = message(write(tmp_path / "a.tsv", "text, label\nx,1\n"))
    assert found.endswith("the file seems to be separated by ',': save it with tabs")


BROKEN = [
    ("a.csv", "text,label\nx,1\ny\n", "a.csv, line 3: 1 field, but the first line has 2"),
    ("a.tsv", "text\tlabel\n\nx\t1\t2\n", "a.tsv, line 3: 3 fields, but the first line has 2"),
    ("a.csv", 'text,label\n"two\nlines",1\nx\n', "a.csv, line 4: 1 field, but the first line has 2"),
    ("a.csv", 'text,label\n"never closed,1\n', "not CSV: unexpected end of data"),
    ("a.csv", "", "a.csv is empty"),
    ("a.tsv", "\n\n", "a.tsv is empty"),
    ("a.csv", "text,label\n", "a.csv has a header but no rows"),
    ("a.csv", "text,label,text\nx,1,y\n", "the header names the column 'text' twice"),
    ("a.jsonl", '{"text": "x", "label": 1}\n{"text": \n', "a.jsonl, line 2: not JSON: Expecting value"),
    ("a.jsonl", '{"text": "x", "label": 1}\n[1, 2]\n', "a.jsonl, line 2: expected an object"),
    ("a.json", '[{"text": "x",\n "label"]', "a.json, line 2: not JSON"),
    ("a.json", '[{"text": "x", "label": 1}, 3]', "a.json, item 2: expected an object"),
    ("a.json", "[]", "a.json holds no rows"),
    ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "y"}\n', "a.jsonl, row 2: the column 'label' has no value"),
    (
        "a.jsonl",
        '{"text": "x", "label": 1}\n\n{"text": "y", "label": "good"}\n',
        "a.jsonl, line 3: column 'label' holds 'good' (str), but 1 (int) in line 1; one column, one type",
    ),
    ("a.jsonl", '{"text": "x", "label": 1, "n": 73786976294838206464}', "column 'n' cannot be stored"),
    ("a.tsv", b"text\tlabel\nfine\t1\ncaf\xe9\t0\n", "a.tsv, line 3: byte 0xe9 is not UTF-8"),
    ("a.parquet", "PAR1 but not really", "a.parquet is not a readable Parquet file"),
    ("a.txt", "text label\n", "cannot tell what is in a '.txt' file; expected one of .csv, .tsv"),
]


@pytest.mark.parametrize(("name", "content", "expected"), BROKEN, ids=[expected for _, _, expected in BROKEN])
def test_a_broken_file_is_reported_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, expected: str
) -> None:
    assert expected in message(write(tmp_path / name, content))


def test_a_truncated_or_pretended_gzip_file_is_reported(tmp_path: Path) -> None:
    whole = gzip.compress(b"text,label\n" + b"fine,1\n" * 100)
    for name, content in [("cut.csv.gz", whole[:-12]), ("plain.csv.gz", b"text,label\n")]:
        (tmp_path / name).write_bytes(content)
        assert f"{name} is not a complete gzip file" in message(tmp_path / name)


def test_an_empty_parquet_file_is_reported(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert "a.parquet holds no rows" in message(tmp_path / "a.parquet")


def test_one_column_cannot_be_both_text_and_label(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\nx,1\n")
    assert "are both 'text'; expected two columns" in message(path, label_column="text")


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\nx,1\n")
    assert "split and config belong to data sets of the hub" in message(path, split="train")


def test_reading_a_table_touches_only_what_it_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "a,b\n1,2\n")
    table, found = read_table(path, [], [])
    assert (table.column_names, found) == (["a", "b"], [])


def numbered(labels: list[Any]) -> Dataset:
    return Dataset.from_dict({"row": list(range(len(labels))), "label": labels})


@given(
    st.lists(st.integers(0, 4), min_size=2, max_size=60),
    st.floats(0.05, 0.95),
    st.integers(1, 40),
    st.integers(0, 3),
)
def test_holding_out_splits_rows_without_loss_and_every_label_in_proportion(
    labels: list[int], fraction: float, at_most: int, seed: int
) -> None:
    counts = Counter(labels)
    if max(counts.values()) == 1:
        with pytest.raises(ValueError, match="a label has to occur twice"):
            hold_out(numbered(labels), "label", fraction=fraction, at_most=at_most, seed=seed)
        return
    train, held = hold_out(numbered(labels), "label", fraction=fraction, at_most=at_most, seed=seed)
    assert sorted([*train["row"], *held["row"]]) == list(range(len(labels)))
    assert list(train["row"]) == sorted(train["row"])
    assert list(held["row"]) == sorted(held["row"])
    total = max(1, min(round(fraction * len(labels)), at_most))
    held_counts = Counter(held["label"])
    for label, count in counts.items():
        share = total * count / len(labels)
        assert held_counts[label] <= count - 1
        if 1 <= share < count - 1:
            assert abs(held_counts[label] - share) < 1
        assert held_counts[label] >= min(1, count - 1)


def test_holding_out_a_fifth_is_exact_where_shares_are_whole() -> None:
    train, held = hold_out(numbered([0] * 75 + [1] * 25), "label")
    assert Counter(held["label"]) == {0: 15, 1: 5}
    assert Counter(train["label"]) == {0: 60, 1: 20}


def test_the_same_seed_holds_out_the_same_rows_and_another_seed_others() -> None:
    rows = numbered([0, 1] * 100)
    first, again, other = (hold_out(rows, "label", seed=seed).held_out["row"] for seed in (0, 0, 1))
    assert list(first) == list(again)
    assert list(first) != list(other)


def test_no_more_rows_are_held_out_than_allowed_however_large_the_data() -> None:
    assert len(hold_out(numbered([0, 1] * 500), "label", at_most=64).held_out) == 64


def test_rows_without_labels_are_held_out_at_random() -> None:
    train, held = hold_out(numbered(["unique"] * 10), None)
    assert (len(train), len(held)) == (8, 2)
    with pytest.raises(ValueError, match="a data set of 1 rows cannot be split"):
        hold_out(numbered([0]), None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0.0}, "fraction must lie between 0 and 1, got 0.0"),
        ({"fraction": 1.0}, "fraction must lie between 0 and 1, got 1.0"),
        ({"fraction": float("nan")}, "fraction must lie between 0 and 1, got nan"),
        ({"at_most": 0}, "at_most must be at least 1, got 0"),
    ],
)
def test_shares_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hold_out(numbered([0, 0, 1, 1]), "label", **arguments)


def test_rows_to_train_on_need_two_classes_whatever_the_argument_is_called() -> None:
    prompt = Prompt("{text} It was {mask}.", {"bad": "terrible", "good": "great"})
    rows = [{"text": "fine", "label": "good"}] * 3
    assert checked_rows(rows, "train_dataset", prompt, "label") == rows
    with pytest.raises(ValueError, match="my rows has one class only: all 3 rows have label='good'"):
        checked_rows(rows, "my rows", prompt, "label", training=True)
