"""MeZOTrainer with an adapter of peft: tuned, resumed, replayed and saved."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import StopAt, lora, peft_warning, tuned, weights
from transformers import AutoModelForCausalLM

from zorl import MeZOTrainer
from zorl.replay import replay
from zorl.run_folder import RunFolder
from zorl.trajectory import TrajectoryError, read


@peft_warning
def test_an_adapter_is_tuned_resumed_replayed_and_saved(make: Callable[..., MeZOTrainer], base: Any, tmp_path: Path):
    base("gpt2")  # made before the seed is set: making it draws numbers
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "kind": "gpt2",
        "peft_config": lora(),
        "settings": {"max_steps": 8, "learning_rate": 1e-2},
    }
    straight = make("straight", **options)
    assert all("lora_" in name for name in straight.tuned)
    frozen = {n: p.detach().clone() for n, p in straight.model.named_parameters() if not p.requires_grad}
    end = tuned(straight)
    assert all(torch.equal(p, frozen[n]) for n, p in straight.model.named_parameters() if n in frozen)

    torch.manual_seed(0)
    make("broken", **options, callbacks=[StopAt(3)]).train()
    torch.manual_seed(7)  # other first values of A, which the run's own replace
    resumed = make("broken", **options)
    resumed.train(resume_from_checkpoint=True)
    assert weights(resumed) == end

    folder = RunFolder(tmp_path / "broken")
    header, records = read(folder.trajectory)
    model, rebuilt = folder.rebuild(header)
    replay(header, records, rebuilt)
    assert rebuilt.sha256() == end

    straight.save_model()
    from peft import PeftModel

    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base("gpt2")), tmp_path / "straight")
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens).logits
        torch.testing.assert_close(saved.eval()(input_ids=tokens).logits, expected)
    assert not (tmp_path / "straight" / "model.safetensors").exists()


@peft_warning
def test_a_missing_or_exchanged_init_is_named(make: Callable[..., MeZOTrainer], tmp_path: Path):
    make(kind="gpt2", peft_config=lora(), callbacks=[StopAt(2)]).train()
    make("other", kind="gpt2", peft_config=lora(), callbacks=[StopAt(2)]).train()
    folder = RunFolder(tmp_path / "out")
    header, _ = read(folder.trajectory)
    shutil.copy(tmp_path / "other" / "init.safetensors", folder.init)
    with pytest.raises(TrajectoryError, match=r"init\.safetensors is not the file that the run was started with"):
        folder.rebuild(header)
    with pytest.raises(TrajectoryError, match=r"init\.safetensors is not the file that the run was started with"):
        make(kind="gpt2", peft_config=lora()).train(resume_from_checkpoint=True)
    folder.init.unlink()
    for attempt in (
        lambda: folder.rebuild(header),
        lambda: make(kind="gpt2", peft_config=lora()).train(resume_from_checkpoint=True),
    ):
        with pytest.raises(
            TrajectoryError, match=r"init\.safetensors is missing: it holds the tuned parameters' first"
        ):
            attempt()


@peft_warning
def test_a_peft_model_and_a_peft_config_are_one_too_many(make: Callable[..., MeZOTrainer], parts: Callable[[str], Any]):
    from peft import get_peft_model

    model = get_peft_model(copy.deepcopy(parts("gpt2").model), lora())
    with pytest.raises(ValueError, match="the model is a PeftModel already"):
        make(model=model, peft_config=lora(), processing_class=parts("gpt2").tokenizer)
