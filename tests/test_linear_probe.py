"""The linear probe before MeZO: what it fits, what it writes, and that runs that start from it can be rebuilt."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from zorl import MeZOConfig, MeZOTrainer, Prompt
from zorl.linear_probe import fit
from zorl.replay import replay
from zorl.rewards import accuracy, f1
from zorl.run_folder import RunFolder
from zorl.trajectory import read

WORDS = {"bad": ("terrible", "bad"), "odd": ("odd", "nobody"), "good": ("great", "good")}
FAMILIES = ("bert", "roberta", "gpt2", "opt", "llama", "qwen2")


def rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """Reviews whose label is in their last word."""
    generator = random.Random(seed)
    labels = [tuple(WORDS)[i % 3] for i in range(n)]
    subjects = ("film", "story", "plot", "ending", "book")
    return [
        {"text": f"the {generator.choice(subjects)} was {generator.choice(WORDS[label])}", "label": label}
        for label in labels
    ]


TRAIN, EVAL = rows(48), rows(24, seed=1)


@pytest.fixture
def make(base: Callable[[str], str], tmp_path: Path) -> Callable[..., MeZOTrainer]:
    """A trainer of a classifier on a new head; keywords are MeZOTrainer's, `settings` MeZOConfig's."""

    def trainer(kind: str, folder: str = "out", settings: dict[str, Any] | None = None, **options: Any) -> MeZOTrainer:
        values = {
            "max_steps": 4,
            "per_device_train_batch_size": 16,
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 1,
        }
        config = MeZOConfig(output_dir=str(tmp_path / folder), **values | (settings or {}))
        objective = {} if options.keys() & {"reward_funcs", "loss", "judge"} else {"loss": "cross_entropy"}
        defaults: dict[str, Any] = {
            "model": base(kind),
            "args": config,
            "train_dataset": TRAIN,
            "eval_dataset": EVAL,
            "metrics": accuracy(),
            "prompt": Prompt("{text}", classes=tuple(WORDS)),
        }
        return MeZOTrainer(**{**defaults, **objective, **options})

    return trainer


def separable(n: int, classes: int, shift: float) -> tuple[Any, Any]:
    generator = np.random.default_rng(0)
    truth = np.arange(n) % classes
    centres = generator.normal(size=(classes, 5)) * 3
    return centres[truth] + generator.normal(size=(n, 5)) * 0.3 + shift, truth


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("intercept", [True, False])
def test_the_fit_is_of_states_as_they_come(classes: int, intercept: bool):
    states, truth = separable(60, classes, shift=5.0)
    weight, bias, strength = fit(states, truth, intercept=intercept)
    assert weight.shape == (classes, 5)
    assert strength > 0
    assert ((states @ weight.T + bias).argmax(1) == truth).all()
    assert intercept or not bias.any()


def test_classes_of_a_single_row_are_fitted_without_cross_validation():
    weight, bias, strength = fit(np.eye(3), np.arange(3), intercept=True)
    assert ((np.eye(3) @ weight.T + bias).argmax(1) == np.arange(3)).all()
    assert strength == 1.0


@pytest.mark.parametrize("kind", FAMILIES)
def test_probing_then_mezo_beats_the_new_head(make: Callable[..., MeZOTrainer], kind: str):
    # The default suits trained models, whose weights are larger than the 0.02 of this one.
    trainer = make(kind, settings={"max_steps": 8, "learning_rate": 2.4e-3})
    new = trainer.evaluate()
    trainer.train()
    tuned = trainer.evaluate()
    assert tuned["eval_loss"] < new["eval_loss"] - 0.5
    assert tuned["eval_accuracy"] > max(0.9, new["eval_accuracy"] + 0.2)
    assert trainer.forwards == 8 * 8 + 3  # the 48 rows of the probe are three batches


def test_mezo_improves_on_the_probe(make: Callable[..., MeZOTrainer]):
    trainer = make("opt", settings={"max_steps": 60, "learning_rate": 1e-3, "calibration_rows": 9})
    trainer.calibrate()
    probed = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * probed


@pytest.mark.parametrize(("kind", "parameters"), [("bert", None), ("opt", ["*.bias"])])
def test_a_run_is_rebuilt_and_resumed_bit_for_bit(
    make: Callable[..., MeZOTrainer],
    base: Callable[[str], str],
    tmp_path: Path,
    kind: str,
    parameters: list[str] | None,
):
    """Also where the head is not tuned: what the probe wrote is a part of the base."""
    settings = {"parameters": parameters, "max_steps": 6, "lr_scheduler_type": "constant"}
    whole = make(kind, settings=settings)
    whole.train()
    saved = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    header, records = read(tmp_path / "out" / "trajectory.zorl")
    rebuilt, tuned = RunFolder(tmp_path / "out").rebuild(header)
    replay(header, records, tuned)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in rebuilt.state_dict().items())

    make(kind, "short", settings={**settings, "max_steps": 3}).train()
    longer = make(kind, "short", settings=settings)
    longer.train(resume_from_checkpoint=True)
    assert longer.tuned.sha256() == whole.tuned.sha256()
    assert longer.calibration_forwards == whole.calibration_forwards == 3


def test_the_file_of_first_values_holds_only_what_the_checkpoint_lacks(
    make: Callable[..., MeZOTrainer], tmp_path: Path
):
    make("bert").train()
    names = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert load_file(tmp_path / "out" / "init.safetensors").keys() == names


def test_the_best_step_is_gone_back_to(make: Callable[..., MeZOTrainer]):
    settings = {
        "max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "load_best_model_at_end": True, "learning_rate": 0.3, "eval_on_start": True,
    }  # fmt: skip
    trainer = make("roberta", settings=settings)
    trainer.train()
    looks = [(entry["step"], entry["eval_reward"]) for entry in trainer.state.log_history if "eval_reward" in entry]
    assert [step for step, _ in looks] == [0, 2, 4, 6]
    best = max(reward for _, reward in looks)
    assert trainer.evaluate()["eval_reward"] == pytest.approx(best, abs=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks transformers for it
@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_an_adapter_with_a_new_head(make: Callable[..., MeZOTrainer], tmp_path: Path, kind: str):
    targets = {"roberta": ["query", "value"], "gpt2": ["c_attn"]}[kind]
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=targets, fan_in_fan_out=kind == "gpt2")
    trainer = make(kind, peft_config=config, reward_funcs=f1())
    new = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] >= new + 0.2
    header, records = read(tmp_path / "out" / "trajectory.zorl")
    _, tuned = RunFolder(tmp_path / "out").rebuild(header)
    replay(header, records, tuned)
    assert tuned.sha256() == trainer.tuned.sha256()


def test_a_model_that_the_user_loaded(make: Callable[..., MeZOTrainer], base: Callable[[str], str]):
    """Its classes are the labels of the rows, in their order."""
    model = AutoModelForSequenceClassification.from_pretrained(base("qwen2"), num_labels=3)
    trainer = make("qwen2", model=model, prompt=Prompt("{text}"))
    assert trainer.prompt.labels == ("bad", "good", "odd")
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.6


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_what_is_saved_is_a_classifier_of_transformers(make: Callable[..., MeZOTrainer], tmp_path: Path, kind: str):
    trainer = make(kind)
    trainer.train()
    trainer.save_model()
    expected = trainer.predict(EVAL).predictions
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == dict(enumerate(WORDS))
    classify = pipeline("text-classification", model, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "out"))
    texts = [row["text"] for row in EVAL]
    assert [found["label"] for found in classify(texts)] == expected
    if kind == "gpt2":  # a padding token was chosen, and saved with it
        assert model.config.pad_token_id is not None


def test_a_trained_head_stays_as_it_is_unless_asked(make: Callable[..., MeZOTrainer], tmp_path: Path):
    first = make("bert")
    first.train()
    first.save_model()
    out = str(tmp_path / "out")
    again = make("bert", "again", model=out, prompt=Prompt("{text}"))
    before = again.tuned.sha256()
    again.calibrate()
    assert again.prompt.labels == tuple(WORDS)
    assert again.tuned.sha256() == before == first.tuned.sha256()
    again.calibrate("probe")
    assert again.tuned.sha256() != before
    again.train()
    header, records = read(tmp_path / "again" / "trajectory.zorl")
    _, tuned = RunFolder(tmp_path / "again").rebuild(header)
    replay(header, records, tuned)
    assert tuned.sha256() == again.tuned.sha256()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("bert", {"settings": {"calibration": "head"}}, "calibration='head' is for label words"),
        (
            "bert",
            {"settings": {"calibration": "probe", "label_column": "no"}, "reward_funcs": accuracy()},
            "no column 'no'",
        ),
        ("bert", {"train_dataset": [r for r in TRAIN if r["label"] != "odd"]}, "none of its 32 has the label 'odd'"),
        (
            "gpt2",
            {
                "settings": {"calibration": "probe"},
                "prompt": Prompt("{text} It was{mask}", {"bad": "terrible", "odd": "odd", "good": "great"}),
            },
            "fits the head of a sequence-classification model",
        ),
    ],
)
def test_what_does_not_go_together(make: Callable[..., MeZOTrainer], kind: str, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make(kind, **options).train()


def test_a_reward_without_true_labels_starts_from_the_new_head(make: Callable[..., MeZOTrainer]):
    def good(completions: list[str], **columns: Any) -> list[float]:
        return [float(answer == "good") for answer in completions]

    texts = [{"text": row["text"]} for row in TRAIN]
    trainer = make("opt", reward_funcs=good, metrics=None, train_dataset=texts, eval_dataset=texts)
    trainer.train()
    assert trainer.calibration_forwards == 0


def test_label_words_are_not_for_a_classifier(make: Callable[..., MeZOTrainer], base: Callable[[str], str]):
    model = AutoModelForSequenceClassification.from_pretrained(base("gpt2"), num_labels=3)
    prompt = Prompt("{text} It was {mask}", {"bad": "terrible", "odd": "odd", "good": "great"})
    with pytest.raises(ValueError, match="GPT2ForSequenceClassification is a sequence-classification model"):
        make("gpt2", model=model, prompt=prompt)


def test_a_probe_after_the_first_step_would_be_lost(make: Callable[..., MeZOTrainer]):
    trainer = make("opt")
    trainer.train()
    with pytest.raises(ValueError, match="call it before train"):
        trainer.calibrate("probe")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks transformers for it
def test_a_decoder_does_not_read_behind_a_soft_prompt(make: Callable[..., MeZOTrainer]):
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="hides from the model where a text ends"):
        make("llama", peft_config=config).evaluate()


def test_first_values_of_a_model_whose_checkpoint_is_gone(make: Callable[..., MeZOTrainer], tmp_path: Path, base: Any):
    path = base("opt")
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model.config._name_or_path = str(tmp_path / "gone")
    make("opt", model=model, processing_class=tokenizer).train()
    assert len(load_file(tmp_path / "out" / "init.safetensors")) == len(list(model.parameters()))
