"""An adapter on a classifier: the head that the linear probe has written is saved with it, and comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny_runs import EVAL, peft_warning
from transformers import AutoModelForSequenceClassification

from zorl import MeZOTrainer, Predictor, Prompt
from zorl.apps.cli import main
from zorl.models import load_model
from zorl.probe import CENTRE

pytestmark = [pytest.mark.usefixtures("one_thread"), peft_warning]

CLASSES = ("bad", "good")
ADAPTER = "adapter_model.safetensors"
OWN: dict[str, Any] = {"r": 2, "target_modules": ["query", "value"]}  # a user's LoraConfig


@pytest.fixture
def tuned(make: Callable[..., MeZOTrainer]) -> Callable[..., MeZOTrainer]:
    """A trainer of an adapter on a classifier's new head, after a linear probe and two steps, saved in `out`."""

    def train(kind: str, tune: str | dict[str, Any], model: Any = None) -> MeZOTrainer:
        own = isinstance(tune, dict)
        trainer = make(
            kind=kind,
            settings={"max_steps": 2, "calibration": "probe"} | ({} if own else {"tune": tune}),
            prompt=Prompt("{text}", classes=CLASSES),
            peft_config=LoraConfig(**tune) if isinstance(tune, dict) else None,
            **({} if model is None else {"model": model}),
        )
        trainer.train()
        trainer.save_model()
        return trainer

    return train


def scores(answering: MeZOTrainer | Predictor) -> torch.Tensor:
    found: torch.Tensor = answering.policy.scores(EVAL, [CENTRE])[0]  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize(
    ("kind", "tune"),
    [
        ("bert", "lora"), ("bert", "prefix"), ("gpt2", "lora"), ("llama", "prefix"), ("bert", OWN), ("roberta", OWN),
        ("bert", {**OWN, "task_type": "SEQ_CLS"}),
        ("bert", {"r": 2, "target_modules": "all-linear"}),
    ],
)  # fmt: skip
def test_a_saved_adapter_answers_as_the_trainer_does(
    tuned: Callable[..., MeZOTrainer], base: Callable[[str], str], tmp_path: Path, kind: str, tune: str | dict[str, Any]
) -> None:
    trainer = tuned(kind, tune)
    expected = scores(trainer)
    torch.testing.assert_close(scores(Predictor.load(tmp_path / "out")), expected)
    torch.manual_seed(7)  # peft's own loader gives the same, whatever head its base has drawn
    drawn = AutoModelForSequenceClassification.from_pretrained(base(kind), num_labels=2)
    loaded = PeftModel.from_pretrained(drawn, tmp_path / "out").eval()
    texts = [trainer.processing_class(row["text"], return_tensors="pt") for row in EVAL]
    with torch.no_grad():
        alone = torch.cat([loaded(**text).logits.log_softmax(-1) for text in texts])
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tune", ["lora", "prefix"])
def test_what_is_tuned_of_a_classifier_is_the_adapter_alone(tuned: Callable[..., MeZOTrainer], tune: str) -> None:
    trainer = tuned("bert", tune)
    assert all("lora_" in name or "prompt_encoder" in name for name in trainer.tuned)
    assert sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) == trainer.tuned.numel


@pytest.mark.parametrize("rank", [2, 4])
def test_a_probe_writes_the_head_and_not_the_adapter_on_it(make: Callable[..., MeZOTrainer], rank: int) -> None:
    """Even where the adapter's matrices have as many outputs as the head: B always, and A at a rank of two."""
    options: dict[str, Any] = {"kind": "bert", "prompt": Prompt("{text}", classes=CLASSES)}
    plain = make(**options)
    adapted = make(**options, settings={"tune": "lora", "lora_targets": ["all-linear"], "lora_rank": rank})
    first = adapted.tuned.sha256()
    for trainer in (plain, adapted):
        trainer.calibrate("probe")
    head = adapted.model.get_base_model().classifier
    torch.testing.assert_close(head.base_layer.weight, plain.model.classifier.weight)
    assert adapted.tuned.sha256() == first
    assert not head.lora_B["default"].weight.any()
    torch.testing.assert_close(scores(adapted), scores(plain))


@pytest.mark.parametrize("tune", ["lora", "prefix"])
def test_a_replay_writes_the_head_as_well(tuned: Callable[..., MeZOTrainer], tmp_path: Path, tune: str) -> None:
    trainer = tuned("bert", tune)
    assert main(["replay", "--trajectory", str(tmp_path / "out"), "--output_dir", str(tmp_path / "again")]) == 0
    torch.testing.assert_close(scores(Predictor.load(tmp_path / "again")), scores(trainer))


def test_a_trained_head_that_a_probe_has_changed_is_saved(
    make: Callable[..., MeZOTrainer], tuned: Callable[..., MeZOTrainer], tmp_path: Path
) -> None:
    first = make("first", kind="bert", settings={"max_steps": 1}, prompt=Prompt("{text}", classes=CLASSES))
    first.train()
    first.save_model()
    trainer = tuned("bert", "lora", str(tmp_path / "first"))
    torch.testing.assert_close(scores(Predictor.load(tmp_path / "out")), scores(trainer))


@pytest.mark.parametrize("tune", ["lora", "prefix"])
def test_beside_the_adapter_lies_only_what_the_checkpoint_lacks(
    tuned: Callable[..., MeZOTrainer], tmp_path: Path, tune: str
) -> None:
    tuned("bert", tune)
    names = {name.removeprefix("base_model.").removeprefix("model.") for name in load_file(tmp_path / "out" / ADAPTER)}
    added = {name for name in names if "lora_" in name or name == "prompt_embeddings"}
    lacking = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert added
    assert names - added == lacking


def test_an_adapter_of_other_classes_is_refused(tuned: Callable[..., MeZOTrainer], tmp_path: Path) -> None:
    tuned("bert", "lora")
    with pytest.raises(
        ValueError, match=r"the adapter .*out have sizes other than those of .*base-bert with 3 classes"
    ):
        load_model(str(tmp_path / "out"), classes=("bad", "odd", "good"))
