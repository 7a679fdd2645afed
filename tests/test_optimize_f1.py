"""The demo end to end on a smaller budget: what it promises is what it writes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zorl.apps import optimize_f1
from zorl.apps.cli import main
from zorl.apps.embedded import REVIEWER
from zorl.replay import replay
from zorl.run_folder import RunFolder
from zorl.trajectory import read

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_demo_learns_and_writes_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = optimize_f1.main(["--output_dir", str(tmp_path), "--steps", "40"])
    zero_shot, threshold, tuned = (result[name]["macro_f1"] for name in ("zero_shot", "threshold", "tuned"))  # type: ignore[index]
    assert zero_shot <= 0.75
    assert zero_shot < threshold < tuned
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    assert {"forwards", "seconds", "peak_memory_mb", "informative_share", "seed", "objective"} <= result.keys()
    assert result["objective"] == "macro_f1"
    assert result["forwards"] == 8 * 40 + 1024 // 64  # eight a step, and 1024 rows of calibration in batches of 64
    assert (tmp_path / "macro_f1.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(row in printed for row in ("zero-shot", "one fitted threshold", "tuned with zorl", "Try next"))
    (rewind,) = [shlex.split(line) for line in printed.splitlines() if "zorl replay" in line]
    assert main(rewind[1:]) == 0
    assert "step 20: SHA-256" in capsys.readouterr().out
    assert (tmp_path.with_name(f"{tmp_path.name}-step20") / "model.safetensors").is_file()

    assert result["resumed_from_step"] == 0
    assert "was continued from step" not in printed
    again = optimize_f1.main(["--output_dir", str(tmp_path), "--steps", "40"])
    assert (
        again["resumed_from_step"] == 40
    )  # a finished run: no step is made, and its seconds are not passed off as the run's
    assert again["weights_sha256"] == result["weights_sha256"]
    assert "The run was continued from step 40" in capsys.readouterr().out

    header, records = read(tmp_path / "trajectory.zorl")
    model, tuned_parameters = RunFolder(tmp_path).rebuild(header, str(REVIEWER))
    replay(header, records, tuned_parameters)
    saved = load_file(tmp_path / "model.safetensors")
    rebuilt = dict(model.named_parameters())
    assert saved.keys() == rebuilt.keys()
    assert all(torch.equal(saved[name], rebuilt[name]) for name in saved)
