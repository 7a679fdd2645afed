"""What is tuned: starts from the model itself or from real activations, touches nothing else, and comes back from disk."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from zorl.adapters import SCALES, add_lora, add_prefix, head_alone, prepare, untie_output_embedding
from zorl.apps.cli import main
from zorl.config import MeZOConfig
from zorl.generation import Generation
from zorl.models import load_model
from zorl.parameters import ParameterSet, select
from zorl.perturbation import Scratch
from zorl.probe import CENTRE, Point
from zorl.prompts import Prompt
from zorl.scoring import LabelWords
from zorl.trainer import MeZOTrainer
from zorl.twin import Twin

pytestmark = pytest.mark.usefixtures("one_thread")

MASKED, CAUSAL = ("bert", "roberta"), ("gpt2", "opt", "llama", "qwen2", "gpt_neox")
WORDS = Prompt("{text} it was {mask}", {"bad": "terrible", "good": "great"})
ROWS = [{"text": text} for text in ("the film", "an odd ending, and a great story", "it")]
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
POINTS = [Point(3, 0.05), Point(3, -0.05), CENTRE]


def settings(tmp_path: Path, **more: Any) -> MeZOConfig:
    return MeZOConfig(output_dir=str(tmp_path / "out"), **more)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return result


@pytest.fixture
def language_model(parts: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda kind: copy.deepcopy(parts(kind).model)


# --- each way to tune a part ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*MASKED, *CAUSAL])
def test_lora_starts_from_the_model_itself_and_from_the_seed(language_model: Any, kind: str) -> None:
    before = logits(language_model(kind))
    torch.manual_seed(0)
    first, again, other = (add_lora(language_model(kind), 2, 4, None, seed) for seed in (0, 0, 1))
    assert torch.equal(logits(first), before)
    weights = [ParameterSet(select(model)) for model in (first, again, other)]
    assert weights[0].sha256() == weights[1].sha256() != weights[2].sha256()
    assert all("lora_" in name for name in weights[0])


def test_lora_on_chosen_and_on_all_layers(language_model: Any) -> None:
    def layers(targets: list[str] | None) -> set[str]:
        tuned = ParameterSet(select(add_lora(language_model("llama"), 2, 4, targets, 0)))
        return {name.split(".lora_")[0].rsplit(".", 1)[1] for name in tuned}

    assert layers(None) == {"q_proj", "v_proj"}
    assert layers(["k_proj"]) == {"k_proj"}
    everything = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert layers(["all-linear"]) == everything


def test_lora_on_a_kind_of_model_that_peft_does_not_know_asks_for_names(language_model: Any) -> None:
    model = language_model("llama")
    model.config.model_type = "novel"
    with pytest.raises(ValueError, match="peft does not know where a 'novel' model has its queries and values"):
        add_lora(model, 2, 4, None, 0)


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_prefix_starts_as_tokens_that_the_model_has_read(language_model: Any, kind: str) -> None:
    """A causal model with it says what the model says behind those tokens."""
    model = language_model(kind)
    read: list[Tensor] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0]))
    prefixed = add_prefix(model, 3, seed=1)
    hook.remove()
    (tokens,) = read
    assert tokens.shape == (1, 3)
    assert [name for name, _ in select(prefixed)] == ["prompt_encoder.default.embedding.weight"]
    behind = logits(language_model(kind), torch.cat([tokens.expand(2, -1), IDS], dim=1))[:, 3:]
    torch.testing.assert_close(logits(prefixed), behind, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", MASKED)
def test_a_masked_model_s_prefix_starts_from_keys_of_its_own(language_model: Any, kind: str) -> None:
    model = language_model(kind)
    read: list[Tensor] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0]))
    prefix = add_prefix(model, 3, seed=1).prompt_encoder.default.embedding.weight
    hook.remove()
    encoder = language_model(kind).base_model
    with torch.no_grad():
        states = encoder(read[0], output_hidden_states=True).hidden_states
        attentions = [layer.attention.self for layer in encoder.encoder.layer]
        computed = [half(states[i])[0] for i, of in enumerate(attentions) for half in (of.key, of.value)]
    torch.testing.assert_close(prefix.detach(), torch.cat(computed, dim=1), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", MASKED)
def test_a_masked_model_reads_its_prefix_and_padding_changes_nothing(
    language_model: Any, parts: Any, kind: str
) -> None:
    prefixed = add_prefix(language_model(kind), 3, seed=1)
    assert not torch.allclose(logits(prefixed), logits(language_model(kind)), atol=0.1)
    words = LabelWords(Scratch(prefixed, ParameterSet(select(prefixed))), parts(kind).tokenizer, WORDS)
    together = words.scores(ROWS, [CENTRE])[0]
    alone = torch.stack([words.scores([row], [CENTRE])[0, 0] for row in ROWS])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_alone_is_tuned_and_nothing_that_it_was_tied_to(
    language_model: Any, kind: str, tied: bool, tmp_path: Path
) -> None:
    model = language_model(kind)
    if not tied:
        untie_output_embedding(model)
    before, embedding = logits(model), model.get_input_embeddings().weight.detach().clone()
    head_alone(model)
    head = model.get_output_embeddings()
    assert {id(p) for _, p in select(model)} == {id(p) for p in head.parameters()}
    assert torch.equal(logits(model), before)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    moved = logits(model)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert not torch.allclose(moved, before, atol=0.01)
    model.save_pretrained(tmp_path)  # and plain transformers gets all of it back
    torch.testing.assert_close(logits(load_model(str(tmp_path))), moved)


def test_a_model_without_a_head_is_refused() -> None:
    bare = BertModel(BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ValueError, match="BertModel has no output embedding to tune"):
        head_alone(bare)


# --- the same at many points in one forward --------------------------------------------------------------------------


@pytest.mark.parametrize("tune", ["lora", "prefix", "head"])
@pytest.mark.parametrize("kind", [*MASKED, *CAUSAL])
def test_stacked_points_are_those_of_one_after_the_other(
    language_model: Any, parts: Any, tune: str, kind: str, tmp_path: Path
) -> None:
    model = prepare(language_model(kind), settings(tmp_path, tune=tune))
    parameters = ParameterSet(select(model))
    with torch.no_grad():
        for name, tensor in parameters.items():
            if "lora_B" in name:
                tensor.normal_(generator=torch.Generator().manual_seed(0))
    evaluators = Scratch(model, parameters, "rank1"), Twin(model, parameters, "rank1")
    alone, together = (LabelWords(e, parts(kind).tokenizer, WORDS) for e in evaluators)
    expected = alone.scores(ROWS, POINTS)
    torch.testing.assert_close(together.scores(ROWS, POINTS), expected, atol=3e-4, rtol=1e-3)
    assert (expected[0] - expected[1]).abs().max() > 1e-4
    if kind in CAUSAL:
        texts = [
            Generation(e, parts(kind).tokenizer, Prompt("{text}"), max_new_tokens=5, greedy=True) for e in evaluators
        ]
        assert texts[1].answers(ROWS, POINTS) == texts[0].answers(ROWS, POINTS)


# --- settings -----------------------------------------------------------------------------------------------------------


def test_steps_and_perturbations_suit_what_is_tuned_unless_given(tmp_path: Path) -> None:
    for tune, scale in SCALES.items():
        for n in (1, 2, 8):
            config = settings(tmp_path, tune=tune, n_spsa=str(n)).sized(1000)
            assert (config.learning_rate, config.epsilon) == (n * scale.learning_rate, scale.epsilon)
        assert settings(tmp_path, tune=tune, update="adam").sized(1000).learning_rate == scale.learning_rate
        assert settings(tmp_path, tune=tune, update="sgd").sized(1000).learning_rate is None
        left_open = settings(tmp_path, tune=tune, n_spsa="1")
        rates = {size: left_open.sized(size).learning_rate for size in (10**6, 10**8, 10**10)}
        length = [rate * size**0.5 for size, rate in rates.items()]  # of a step
        assert length == pytest.approx([1.43 * scale.length] * 3, rel=1e-3)
    assert left_open.learning_rate is None
    assert settings(tmp_path, learning_rate=1e-3).sized(10**10).learning_rate == 1e-3
    assert settings(tmp_path, tune="prefix", learning_rate=1e-3, epsilon="0.2").epsilon_value == 0.2


def test_contradictions_are_named(language_model: Any, parts: Any, tmp_path: Path) -> None:
    for wrong, message in (
        ({"tune": "some"}, "tune must be one of full, lora, prefix, head, got 'some'"),
        ({"lora_rank": 0}, "lora_rank must be at least 1, got 0"),
        ({"quantize": "int2"}, "quantize must be int8 or int4, got 'int2'"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(tmp_path, **wrong)
    adapted = add_lora(language_model("gpt2"), 2, 4, None, 0)
    with pytest.raises(ValueError, match="already a PeftModel: leave tune='prefix' out"):
        prepare(adapted, settings(tmp_path, tune="prefix"))
    options: dict[str, Any] = {"loss": "cross_entropy", "processing_class": parts("gpt2").tokenizer, "prompt": WORDS}
    with pytest.raises(ValueError, match="peft_config and tune='lora' both say what is tuned"):
        MeZOTrainer(language_model("gpt2"), args=settings(tmp_path, tune="lora"), peft_config=object(), **options)
    with pytest.raises(ValueError, match="quantize='int8' is for a model given by name"):
        MeZOTrainer(language_model("gpt2"), args=settings(tmp_path, tune="lora", quantize="int8"), **options)


# --- on the command line ------------------------------------------------------------------------------------------------


def zorl(*words: str) -> Any:
    """What a command prints, as JSON."""
    with redirect_stdout(io.StringIO()) as out:
        assert main([*words, "--json"]) == 0
    return json.loads(out.getvalue())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, parts: Callable[[str], Any]) -> Path:
    """Models and a few rows."""
    folder = tmp_path_factory.mktemp("data")
    for kind in ("bert", "llama"):
        parts(kind).model.save_pretrained(folder / kind)
        parts(kind).tokenizer.save_pretrained(folder / kind)
    rows = [f"the {w} was {('terrible', 'great')[i % 2]}\t{i % 2}" for i, w in enumerate(["film", "plot", "story"] * 8)]
    (folder / "rows.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    return folder


@pytest.mark.parametrize(("kind", "tune"), [("llama", "lora"), ("bert", "prefix"), ("bert", "head")])
def test_a_run_is_resumed_saved_replayed_and_used(data: Path, tmp_path: Path, kind: str, tune: str) -> None:
    rows = ["--dataset", str(data / "rows.tsv")]
    out, again = tmp_path / "out", tmp_path / "again"
    train = ["train", "--model", str(data / kind), *rows, "--eval_dataset", rows[1], "--loss", "cross_entropy"]
    train += ["--prompt", "{text} it was {mask}", "--label_words", "0=bad", "1=good", "--tune", tune]
    train += ["--per_device_train_batch_size", "8", "--load_best_model_at_end", "False", "--calibration", "none"]
    train += ["--lr_scheduler_type", "constant", "--output_dir"]
    straight = zorl(*train, str(out), "--max_steps", "4")
    zorl(*train, str(again), "--max_steps", "2")
    assert zorl(*train, str(again), "--max_steps", "4")["weights_sha256"] == straight["weights_sha256"]

    found = zorl("eval", "--model", str(out), *rows)
    assert found["accuracy"] == pytest.approx(straight["eval_accuracy"])
    predictions = tmp_path / "predictions.jsonl"
    assert zorl("predict", "--model", str(out), *rows, "--output", str(predictions))["n"] == 24
    replayed = zorl("replay", "--trajectory", str(out), "--output_dir", str(tmp_path / "replayed"))
    assert replayed["matches_saved_weights"]
    one, other = (load_model(str(folder)) for folder in (out, tmp_path / "replayed"))
    assert torch.equal(logits(one), logits(other))
    assert not torch.equal(logits(one), logits(load_model(str(data / kind))))
    assert (out / "model.safetensors").exists() == (tune == "head")
