"""The tuned model of a judging run as a zip file, for `from_pretrained`."""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zorl.output_bias import move_output_bias_to_generation_config
from zorl.prompts import Prompt
from zorl.run_folder import RunFolder


def export_model(model: Any, tokenizer: Any, folder: Path, step: int, *, output_bias: bool) -> Path:
    """Writes weights and tokenizer as they are now to `model-stepN.zip` in a folder, and returns the file.

    Args:
        output_bias: whether the model has a bias on its output embedding, which the checkpoint's own model has no place for.
    """
    folder.mkdir(exist_ok=True)
    # On the CPU: beside the model there may be no room for a second one.
    copies = {id(tensor): _on_cpu(tensor) for tensor in (*model.parameters(), *model.buffers())}
    tuned = copy.deepcopy(model, copies)
    if output_bias:
        move_output_bias_to_generation_config(tuned)
    with tempfile.TemporaryDirectory(dir=folder) as unpacked:
        tuned.save_pretrained(unpacked)
        tokenizer.save_pretrained(unpacked)
        RunFolder(Path(unpacked)).write_settings({"prompt": Prompt("{prompt}").to_dict(), "step": step})
        return Path(shutil.make_archive(str(folder / f"model-step{step}"), "zip", unpacked))


def _on_cpu(tensor: Tensor) -> Tensor:
    copied = tensor.detach().to("cpu", copy=True)
    return nn.Parameter(copied, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
