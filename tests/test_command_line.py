"""Flags and YAML files, and the values that they give."""

from __future__ import annotations

from pathlib import Path

import pytest

from zorl.apps.command_line import parse
from zorl.apps.commands import EVAL, TRAIN


@pytest.mark.parametrize(
    ("lines", "values"),
    [
        ("stop: ''\nprompt: '{text}'", {"stop": "", "prompt": "{text}"}),
        ("stop:\nprompt: ~\nmodel: null", {}),
        ("label_words:\n  no: terrible\n  '': great", {"label_words": {"no": "terrible", "": "great"}}),
        ("model: 'null'", {"model": "null"}),
        ("metrics: []\nmodel: m", {"model": "m"}),
    ],
)
def test_what_a_file_leaves_empty_is_not_given_and_what_it_quotes_is(
    tmp_path: Path, lines: str, values: dict[str, object]
):
    (tmp_path / "run.yaml").write_text(lines, encoding="utf-8")
    assert parse(EVAL if "metrics" not in lines else TRAIN, ["--config", str(tmp_path / "run.yaml")]) == values


def test_the_home_is_meant_where_a_shell_has_not_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "run.yaml").write_text("output_dir: ~/runs/a\nprompt: ~text", encoding="utf-8")
    found = parse(TRAIN, ["--model=~/m", "--config", str(tmp_path / "run.yaml")])
    assert found == {"model": str(tmp_path / "m"), "output_dir": str(tmp_path / "runs" / "a"), "prompt": "~text"}
