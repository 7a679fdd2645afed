"""Misspelt names: what was meant is suggested, and nothing where nothing comes close."""

from __future__ import annotations

import pytest

from zorl.suggestions import check_columns, did_you_mean


@pytest.mark.parametrize(
    ("name", "candidates", "expected"),
    [
        ("lable", ["text", "label"], "; did you mean 'label'?"),
        ("mezzo", ["mezo", "mezo_f1", "bbt", "mezo_lora"], "; did you mean 'mezo' or 'mezo_f1'?"),
        ("macro_f1", ["accuracy", "f1"], "; did you mean 'f1'?"),
        ("keepsake", ["ke"], ""),
        ("x", ["text", "label"], ""),
        ("label", [], ""),
    ],
)
def test_what_is_spelt_alike_or_a_word_of_the_name_is_suggested(
    name: str, candidates: list[str], expected: str
) -> None:
    assert did_you_mean(name, candidates) == expected


def test_no_more_are_suggested_than_asked_for() -> None:
    assert did_you_mean("mezzo", iter(["mezo", "mezo_f1"]), most=1) == "; did you mean 'mezo'?"


def test_a_missing_column_is_named_with_those_that_are_there() -> None:
    check_columns("the file", ["text"], {"text": 0, "label": 1})
    with pytest.raises(
        ValueError, match=r"^the file has no column 'txt'; did you mean 'text'\? \(columns: 'text', 'label'\)$"
    ):
        check_columns("the file", ["label", "txt"], iter(["text", "label"]))
    with pytest.raises(ValueError, match=r"^the file has no column 'x' \(columns: none\)$"):
        check_columns("the file", ["x"], [])
    with pytest.raises(ValueError, match=rf"\(columns: '{'y' * 39}…'\)$"):
        check_columns("the file", ["x"], ["y" * 41])
