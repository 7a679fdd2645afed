"""From cells to a table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from compare_runs import words

from zorl.apps.cli import main
from zorl.apps.compare_report import markdown, summary, text

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_summary_is_mean_and_sample_deviation_over_the_seeds():
    made = [
        {
            "method": "a",
            "title": "A",
            "seed": seed,
            "accuracy": value,
            "forwards": 10,
            "seconds": 2.0,
            "peak_memory_mb": None,
        }
        for seed, value in ((1, 0.5), (2, 0.7), (3, 0.9))
    ]
    refused = {"method": "b", "title": "B", "seed": 1, "not_applicable": "B needs a causal model"}
    once = {"method": "a", "title": "A", "seed": 4, "not_applicable": "A does not fit these rows"}
    a, b = summary([*made, once, refused], ["accuracy"])
    assert a["accuracy"] == pytest.approx(0.7)
    assert a["accuracy_std"] == pytest.approx(math.sqrt(2 * 0.2**2 / 2))
    assert a["seeds"] == 3
    assert "0.700 ± 0.200" in text([a, b], ["accuracy"])
    assert "B: B needs a causal model" in text([a, b], ["accuracy"])
    assert "| A | 0.700 ± 0.200 | 10 | 2 | — | 3 |" in markdown([a, b], ["accuracy"])
    (searched,) = summary([{**made[0], "chosen": {"search_forwards": 30}}], ["accuracy"])
    assert searched["forwards"] == 30


def test_the_demonstrations_that_fitted_stand_under_the_table():
    figures = {"forwards": 0, "seconds": 1.0, "accuracy": 0.5}
    made = [
        {
            "method": "in_context",
            "title": "what it was called",
            "seed": seed,
            "chosen": {"demonstrations": count, "cut_to_characters": cut},
            **figures,
        }
        for seed, count, cut in ((1, 4, None), (2, 4, 55), (3, 3, 71))
    ]
    title = "in-context, up to 32 demonstrations"
    cut = summary(made, ["accuracy"])
    note = f"{title}: 3.7 on average, their values cut to 55–71 characters for 2 of 3 seeds"
    assert markdown(cut, ["accuracy"]).endswith(f"\n\n- {note}\n")
    assert text(cut, ["accuracy"]).endswith(f"\n\n{note}")
    assert f"{title}: 4 on average\n" in markdown(summary(made[:1], ["accuracy"]), ["accuracy"])


def test_a_metric_that_applies_to_no_row_leaves_its_place_in_the_table_empty(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    metrics = ["--metrics", "accuracy", f"{files / 'rewards.py'}:inapplicable"]
    assert main(words(files, tmp_path, "--methods", "zero_shot", "--seeds", "1", "--json", *metrics)) == 0
    (row,) = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))["rows"]
    assert row["inapplicable"] is None
    assert "Infinity" not in (tmp_path / "cells" / "zero_shot-1.json").read_text()
