"""Models of eight and four bits: only read, tuned through an adapter. What needs a quantiser runs where it is installed."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from zorl import MeZOTrainer, Predictor
from zorl.adapters import add_lora, prepare
from zorl.apps.cli import main
from zorl.config import MeZOConfig
from zorl.models import load_model
from zorl.parameters import ParameterSet, base_sha256, select
from zorl.perturbation import Scratch
from zorl.probe import CENTRE, Choice, Point
from zorl.prompts import Prompt
from zorl.quantization import PACKAGES, is_plain, is_quantized, quantization_config
from zorl.rewards import LanguageModelJudge, accuracy
from zorl.scoring import LabelWords
from zorl.twin import Twin

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of the quantisers, and what they use of torch
]

each_kind = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind,
            marks=pytest.mark.skipif(
                importlib.util.find_spec(package) is None, reason=f"{package} is not installed: pip install {package}"
            ),
        )
        for kind, package in PACKAGES.items()
    ],
)
WORDS = Prompt("{text} it was {mask}", {"bad": "terrible", "good": "great"})
WORDS_OF_ROWS = ["film", "plot", "story"] * 8
ROWS = [{"text": text} for text in ("the film", "an odd ending, and a great story", "it")]
POINTS = [Point(3, 0.05), Point(3, -0.05), CENTRE]
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, parts: Callable[[str], Any]) -> str:
    """A model as wide as the quantisers' blocks, on disk."""
    tokenizer = parts("llama").tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=96, initializer_range=0.3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def settings(tmp_path: Path, **more: Any) -> MeZOConfig:
    return MeZOConfig(output_dir=str(tmp_path / "out"), **more)


@each_kind
def test_a_quantised_model_is_smaller_and_says_about_the_same(base: str, kind: str) -> None:
    whole, small = load_model(base), load_model(base, quantize=kind)
    assert is_quantized(small)
    assert not is_quantized(whole)
    linear = [p for n, p in small.named_parameters() if n.endswith("proj.weight")]
    assert not any(map(is_plain, linear))
    with torch.no_grad():
        a, b = whole(IDS).logits, small.eval()(IDS).logits
    assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > {"int8": 0.99, "int4": 0.6}[kind]


@each_kind
@pytest.mark.parametrize("tune", ["lora", "prefix"])
def test_points_are_stacked_on_quantised_weights_that_are_only_called(
    base: str, parts: Any, kind: str, tune: str, tmp_path: Path
) -> None:
    model = prepare(load_model(base, quantize=kind), settings(tmp_path, tune=tune))
    parameters = ParameterSet(select(model))
    if tune == "lora":
        assert all("lora_B" in name for name in parameters)  # A stays as it was drawn
    evaluators = Scratch(model, parameters, "rank1"), Twin(model, parameters, "rank1")
    alone, together = (LabelWords(e, parts("llama").tokenizer, WORDS) for e in evaluators)
    expected = alone.scores(ROWS, POINTS)
    torch.testing.assert_close(together.scores(ROWS, POINTS), expected, atol=2e-3, rtol=1e-3)
    assert (expected[0] - expected[1]).abs().max() > 1e-3


@each_kind
def test_a_new_head_on_quantised_weights_is_fitted_tuned_and_saved(base: str, kind: str, tmp_path: Path) -> None:
    rows = [
        {"text": f"the {w} was {('terrible', 'great')[i % 2]}", "label": str(i % 2)}
        for i, w in enumerate(WORDS_OF_ROWS)
    ]
    trainer = MeZOTrainer(
        base, accuracy(), args=settings(tmp_path, tune="lora", quantize=kind, max_steps=2, save_strategy="no"),
        train_dataset=rows, eval_dataset=rows, prompt=Prompt("{text}", classes=("0", "1")),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    predict = Predictor.load(str(tmp_path / "out"))
    assert predict(rows) == trainer.predict(rows).predictions
    assert trainer.evaluate()["eval_accuracy"] == 1.0


@each_kind
def test_tuning_the_weights_of_a_quantised_model_is_refused(base: str, kind: str, tmp_path: Path) -> None:
    for tune in ("full", "head"):
        with pytest.raises(
            ValueError, match=f"quantised, and tune='{tune}' would write its weights: tune a LoRA adapter"
        ):
            prepare(load_model(base, quantize=kind), settings(tmp_path, tune=tune))


@each_kind
def test_a_run_on_quantised_weights_is_resumed_replayed_and_used(base: str, kind: str, tmp_path: Path) -> None:
    lines = [f"the {w} was {('terrible', 'great')[i % 2]}\t{i % 2}" for i, w in enumerate(WORDS_OF_ROWS)]
    rows = tmp_path / "rows.tsv"
    rows.write_text("\n".join(["text\tlabel", *lines]) + "\n")
    train = ["train", "--model", base, "--dataset", str(rows), "--eval_dataset", str(rows), "--loss", "cross_entropy"]
    train += [
        "--prompt",
        "{text} it was {mask}",
        "--label_words",
        "0=bad",
        "1=good",
        "--per_device_train_batch_size",
        "8",
    ]
    train += ["--load_best_model_at_end", "False", "--calibration", "none", "--lr_scheduler_type", "constant"]
    train += ["--tune", "lora", "--quantize", kind, "--output_dir"]
    straight = zorl(*train, str(tmp_path / "out"), "--max_steps", "4")
    zorl(*train, str(tmp_path / "again"), "--max_steps", "2")
    again = zorl(*train, str(tmp_path / "again"), "--max_steps", "4")
    assert again["weights_sha256"] == straight["weights_sha256"]
    found = zorl("eval", "--model", str(tmp_path / "out"), "--dataset", str(rows))
    assert found["accuracy"] == pytest.approx(straight["eval_accuracy"])
    assert json.loads((tmp_path / "out" / "zorl.json").read_text())["quantize"] == kind
    replayed = zorl("replay", "--trajectory", str(tmp_path / "out"), "--output_dir", str(tmp_path / "replayed"))
    assert replayed["matches_saved_weights"]


@each_kind
def test_a_quantised_model_judges(base: str, parts: Any, kind: str) -> None:
    judge = LanguageModelJudge(load_model(base, quantize=kind), processing_class=parts("gpt2").tokenizer)
    prompts, first, second = ["the film", "the plot"], ["great", "odd"], ["terrible", "odd"]
    choices = judge(prompts=prompts, first=first, second=second)
    assert choices[0] in (Choice.FIRST, Choice.SECOND)
    assert choices[1] is Choice.TIE
    assert judge(prompts=prompts, first=second, second=first) == [choice.flipped for choice in choices]


def zorl(*words: str) -> Any:
    """What a command prints, as JSON."""
    with redirect_stdout(io.StringIO()) as out:
        assert main([*words, "--json"]) == 0
    return json.loads(out.getvalue())


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed: pip install torchao")
def test_what_was_saved_quantised_is_loaded_so_and_what_has_nothing_to_quantise_is_refused(
    base: str, parts: Any, tmp_path: Path
) -> None:
    load_model(base, quantize="int8").save_pretrained(tmp_path / "small")
    assert is_quantized(load_model(str(tmp_path / "small")))
    with pytest.raises(ValueError, match="was saved quantised and is used as it is: leave quantize='int8' out"):
        load_model(str(tmp_path / "small"), quantize="int8")
    parts("gpt2").model.save_pretrained(tmp_path / "gpt2")  # its layers are transposed, and not linear ones
    with pytest.raises(ValueError, match=r"int8 quantises linear layers, and .* has none that it supports"):
        load_model(str(tmp_path / "gpt2"), quantize="int8")


@pytest.mark.parametrize("width", [172, 96])
def test_a_layer_that_four_bits_cannot_compute_is_named_when_the_model_is_loaded(
    parts: Callable[[str], Any], tmp_path: Path, width: int
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="pip install bitsandbytes")
    if not functional.has_avx512bf16():
        pytest.skip("only bitsandbytes' AVX-512 kernel has these limits")
    config = LlamaConfig(
        vocab_size=len(parts("llama").tokenizer), hidden_size=64, intermediate_size=width, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"layer model\.layers\.0\.mlp\..*{width}.*quantize='int8' takes any"):
        load_model(str(tmp_path), quantize="int4")
    if importlib.util.find_spec("torchao") is not None:
        assert is_quantized(load_model(str(tmp_path), quantize="int8"))


def test_an_absent_package_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for kind, package in PACKAGES.items():
        with pytest.raises(ImportError, match=f"quantize='{kind}' needs the package {package}: pip install {package}$"):
            quantization_config(kind)
    with redirect_stderr(io.StringIO()) as error:
        arguments = ["--dataset", f"{base}/config.json", "--loss", "cross_entropy", "--tune", "lora"]
        assert main(["train", "--model", base, *arguments, "--quantize", "int8"]) == 2
    assert error.getvalue().startswith("zorl: error: ")


class Whole(nn.Parameter):
    """Stands for a quantiser's own class of weights: it can be multiplied with, and none of its rows taken."""

    def __getitem__(self, index: Any) -> Any:
        raise NotImplementedError("rows of quantised weights")


def test_a_quantised_head_is_called_as_it_is_and_counts_for_nothing_in_the_hash(parts: Any, base: str) -> None:
    model = add_lora(load_model(base), 2, 4, None, 0)
    before = base_sha256(model)
    plain = LabelWords(Scratch(model, ParameterSet(select(model)), "rank1"), parts("llama").tokenizer, WORDS)
    expected = plain.scores(ROWS, POINTS)
    head = model.get_output_embeddings()
    head.weight = Whole(head.weight.detach(), requires_grad=False)
    assert base_sha256(model) != before
    with torch.no_grad():
        after = base_sha256(model)
        head.weight.add_(1.0)
        assert base_sha256(model) == after
        head.weight.sub_(1.0)
    for kind in (Scratch, Twin):
        words = LabelWords(kind(model, ParameterSet(select(model)), "rank1"), parts("llama").tokenizer, WORDS)
        torch.testing.assert_close(words.scores(ROWS, POINTS), expected, atol=1e-4, rtol=1e-4)
