"""`zorl profile`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import Files, Outcome

pytestmark = pytest.mark.usefixtures("one_thread")


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
