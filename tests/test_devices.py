"""Runs on pretended GPUs: nothing that belongs on one device meets what is on another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from pretended_devices import DeviceError, pretended_devices
from tiny_runs import PROMPT, TRAIN
from transformers import BertForSequenceClassification, LlamaForSequenceClassification, TrainingArguments

from zorl import MeZO, MeZOConfig, MeZOTrainer, Prompt
from zorl.adapters import untie_output_embedding
from zorl.devices import best_device
from zorl.parameters import ParameterSet
from zorl.perturbation import Scratch
from zorl.probe import Point

GPU = torch.device("cuda", 0)
OPTIONS = ["good or bad and odd", "bad one", "terrible", "odd and great and good"]
CLASSES = Prompt("{text}", classes=("bad", "good"))
# The last layer and the head on a second GPU, by modules that no layer is split over, as accelerate's own maps have them.
SPREAD = {
    "llama": ({"model.embed_tokens", "model.rotary_emb", "model.layers.0"}, {"model.layers.1", "model.norm", "lm_head", "score"}),
    "bert": ({"bert.embeddings", "bert.encoder.layer.0"},
             {"bert.encoder.layer.1", "bert.pooler", "cls", "dropout", "classifier"}),
}  # fmt: skip


def spread(model: Any, kind: str) -> Any:
    names = {name for name, _ in model.named_modules()}
    places = {name: f"cuda:{i}" for i, part in enumerate(SPREAD[kind]) for name in part & names}
    return dispatch_model(model, places, main_device="cuda:0", force_hooks=True)


@pytest.fixture
def trainer(parts: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MeZOTrainer]:
    monkeypatch.setattr(TrainingArguments, "device", property(lambda _: GPU))

    def make(
        kind: str, place: Callable[[Any, str], Any] | None = None, model: Any = None, **settings: Any
    ) -> MeZOTrainer:
        if model is None:
            model = copy.deepcopy(parts(kind).model)
            untie_output_embedding(model)
        if place is not None:
            model = place(model, kind)
        prompt, rows = settings.pop("prompt", PROMPT), settings.pop("rows", TRAIN)
        return MeZOTrainer(
            model, loss="cross_entropy", prompt=prompt, train_dataset=rows, processing_class=parts(kind).tokenizer,
            args=MeZOConfig(output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=8, save_strategy="no",
                            disable_tqdm=True, report_to="none", **settings),
        )  # fmt: skip

    return make


@pytest.fixture
def classifier(parts: Callable[[str], Any]) -> Callable[[str], Any]:
    def make(kind: str) -> Any:
        config = copy.deepcopy(parts(kind).model.config)
        config.num_labels, config.pad_token_id = 2, 0
        config.id2label, config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
        return {"llama": LlamaForSequenceClassification, "bert": BertForSequenceClassification}[kind](config)

    return make


def trains(run: MeZOTrainer) -> None:
    before = run.tuned.sha256()
    run.train()
    assert run.tuned.sha256() != before


def test_pretended_devices_do_not_mix() -> None:
    with pretended_devices():
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert (there + 1).device == GPU
        with pytest.raises(DeviceError):
            here + there
        with pytest.raises(DeviceError):
            there.to("cuda:1")[torch.arange(2, device="cuda")]
        with pytest.raises(TypeError):
            there.numpy()
        assert (here + there.cpu()).tolist() == [2.0] * 3


@pytest.mark.parametrize("evaluation", ["twin", "scratch"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_run_on_one_gpu(trainer: Callable[..., MeZOTrainer], kind: str, evaluation: str) -> None:
    with pretended_devices():
        run = trainer(kind, evaluation=evaluation, calibration="head")
        assert {p.device for p in run.model.parameters()} == {GPU}  # type: ignore[union-attr]
        trains(run)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_label_head_reads_states_on_another_gpu(trainer: Callable[..., MeZOTrainer], kind: str) -> None:
    with pretended_devices():
        run = trainer(kind, spread, calibration="head")
        assert {p.device.index for p in run.model.parameters()} == {0, 1}  # type: ignore[union-attr]
        trains(run)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_classifier_whose_head_is_on_another_gpu(
    trainer: Callable[..., MeZOTrainer], classifier: Callable[[str], Any], kind: str
) -> None:
    with pretended_devices():
        trains(trainer(kind, spread, classifier(kind), prompt=CLASSES, calibration="probe"))


def test_options_share_a_prompt_whose_cache_is_on_two_gpus(
    trainer: Callable[..., MeZOTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": "a film " * 20, "options": OPTIONS, "label": "bad one"}] * 8
    with pretended_devices():
        run = trainer("llama", spread, prompt=Prompt("{text} {mask}", options="options"), rows=rows)
        # Otherwise a prompt is shared only if that saves more than a forward costs.
        monkeypatch.setattr("zorl.shared_prefix.FORWARD_TOKENS", 0)
        trains(run)


def test_a_prefix_starts_from_activations_on_two_gpus(trainer: Callable[..., MeZOTrainer]) -> None:
    with pretended_devices():
        trains(trainer("llama", spread, tune="prefix", calibration="none"))


def offloaded(model: Any, kind: str) -> Any:
    cpu_offload(model, execution_device=GPU)
    return model


def test_a_prefix_on_a_model_that_is_offloaded_as_a_whole(trainer: Callable[..., MeZOTrainer]) -> None:
    with pretended_devices():
        run = trainer("llama", offloaded, tune="prefix", calibration="none")
        assert {tensor.device for tensor in run.tuned.values()} == {GPU}
        trains(run)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_linear_probe_writes_a_head_that_is_offloaded(
    trainer: Callable[..., MeZOTrainer], classifier: Callable[[str], Any], kind: str
) -> None:
    with pretended_devices():
        run = trainer(kind, offloaded, classifier(kind), prompt=CLASSES, calibration="none")
        before = run.tuned.sha256()
        run.calibrate("probe")
        assert run.tuned.sha256() != before
        trains(run)


def test_fp16_of_accelerate_launch_makes_no_scaler(
    trainer: Callable[..., MeZOTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, accelerate's scaler refuses a step without gradients."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pretended_devices():
        run = trainer("bert", calibration="none")
    assert run.args.mixed_precision == run.accelerator.mixed_precision == "no"


def test_a_base_whose_hash_is_given_is_not_hashed_again(
    parts: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hash copies all weights from the device."""
    monkeypatch.setattr(ParameterSet, "sha256", lambda _: pytest.fail("the header says what the base is"))
    weights = copy.deepcopy(parts("bert").model).named_parameters()
    mezo = MeZO(weights, trajectory=tmp_path / "t.zorl", header={"base_sha256": "0"})
    assert mezo.header["base_sha256"] == "0"


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert best_device() == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert best_device() == torch.device("cuda", 3)


def test_rows_of_an_embedding_on_another_gpu_than_the_tokens(
    parts: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zorl.perturbation.HELD_BYTES", 0)
    with pretended_devices():
        model = copy.deepcopy(parts("gpt2").model)
        untie_output_embedding(model)
        rest = ("transformer.wpe", "transformer.drop", "transformer.h", "transformer.ln_f", "lm_head")
        places = {"transformer.wte": "cuda:0", **dict.fromkeys(rest, "cuda:1")}
        model = dispatch_model(model, places, main_device="cuda:0", force_hooks=True)
        evaluator = Scratch(model, ParameterSet(model.named_parameters()), "rank1")
        ids = torch.zeros(2, 4, dtype=torch.long, device=GPU)
        ones = torch.ones_like(ids)
        found = evaluator.evaluate(Point(0, 1e-2), lambda: evaluator.module(input_ids=ids, attention_mask=ones).logits)
        assert found.isfinite().all().item()
