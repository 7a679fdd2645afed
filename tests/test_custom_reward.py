"""The example of a reward of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from zorl.apps import custom_reward

pytestmark = pytest.mark.usefixtures("one_thread")


def test_profit_counts_letters_and_customers_won_back() -> None:
    answers = ["negative", "negative", "positive", "positive"]
    truths = ["negative", "positive", "negative", "positive"]
    assert custom_reward.profit(answers, truths, text=[""] * 4) == [4.0, -1.0, 0.0, 0.0]


def test_the_example_earns_more_than_before_and_goes_on_where_it_was_cut_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    short = custom_reward.main(["--output_dir", out, "--steps", "2"])
    result = custom_reward.main(["--output_dir", out, "--steps", "15"])
    assert short["before"] == result["before"] < result["after"] <= result["best"]
    assert f"{result['after']:.2f} after" in capsys.readouterr().out
    assert (tmp_path / "out/model.safetensors").is_file()
