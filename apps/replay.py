"""`zorl replay`: rebuilds the tuned weights of any step from the base weights and a trajectory, bit for bit."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zorl.adapters import save
from zorl.apps.arguments import ReplayArguments
from zorl.apps.command_line import build, parse
from zorl.apps.commands import REPLAY
from zorl.apps.inputs import check_model_folder, require, say
from zorl.classifier_models import is_classifier, parameters_not_in_checkpoint
from zorl.models import load_processing_class
from zorl.output_bias import move_output_bias_to_generation_config
from zorl.replay import replay
from zorl.run_folder import RunFolder
from zorl.trajectory import read
from zorl.wording import counted


def run(argv: Sequence[str]) -> str:
    """Replays, and returns what to print.

    Raises:
        ValueError: an argument does not fit, or the result differs from what the run saved at that step.
        TrajectoryError: the base is another model, or the trajectory is damaged or too short.
    """
    arguments = build(ReplayArguments, parse(REPLAY, argv))
    require(arguments, "trajectory", "output_dir")
    path, target = Path(str(arguments.trajectory)), Path(str(arguments.output_dir))
    if path.is_dir():
        path = path / "trajectory.zorl"
    if not path.is_file():
        raise ValueError(f"--trajectory {path}: there is no such file")
    folder = RunFolder(path.parent)
    if target.resolve() == path.parent.resolve():
        raise ValueError(f"--output_dir {target} is the run's own folder; choose another")
    if target.is_dir() and any(target.iterdir()) and not arguments.overwrite:
        raise ValueError(
            f"--output_dir {target} is not empty: choose another folder, or write into it with --overwrite"
        )
    settings = folder.read_settings()
    saved = settings.get("step")
    until = saved if arguments.until is None else arguments.until
    header, records = read(path, until)
    name = arguments.model or header["model"]
    if name:
        check_model_folder(name)
        if Path(name).resolve() == target.resolve():
            raise ValueError(f"--output_dir {target} is the base model's own folder; choose another")
    start = time.perf_counter()
    model, tuned = folder.rebuild(header, arguments.model)
    loaded = time.perf_counter()
    replay(header, records, tuned)
    seconds = time.perf_counter() - loaded
    say(
        f"base loaded and checked in {loaded - start:.1f} s, {counted(len(records), 'step', 'steps')} replayed in {seconds:.2f} s"
    )

    digest = tuned.sha256()
    matches = digest == settings["weights_sha256"] if saved is not None and saved == len(records) else None
    if matches is False:
        raise ValueError(
            f"the weights at step {len(records)} are not those that {folder.path} saved: their SHA-256 is {digest[:16]}…, but "
            f"{folder.settings.name} says {settings['weights_sha256'][:16]}…; nothing was written"
        )
    if header.get("output_bias"):
        move_output_bias_to_generation_config(model)
    save(model, target, parameters_not_in_checkpoint(model) if is_classifier(model) else ())
    load_processing_class(name).save_pretrained(target)
    remembered = {"prompt": header["prompt"], "objective": header["objective"], **settings}
    RunFolder(target).write_settings({**remembered, "step": len(records), "weights_sha256": digest})
    result: dict[str, Any] = {
        "steps": len(records),
        "weights_sha256": digest,
        "matches_saved_weights": matches,
        "output_dir": str(target),
        "seconds": round(seconds, 3),
    }
    if arguments.json:
        return json.dumps(result)
    verdict = {
        True: f"identical to the weights that {folder.path} saved",
        None: f"{folder.path} saved the weights of step {saved}"
        if saved is not None
        else "the run saved no weights to compare with",
    }[matches]
    return f"step {len(records)}: SHA-256 {digest} ({verdict})\nwritten to {target}"
