"""Loading models: nothing that lies in a checkpoint is executed."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from zorl.adapters import add_lora
from zorl.apps.cli import main
from zorl.models import _sound_weights, is_masked_checkpoint, load_model, load_processing_class, trained_classes

CODE = """from pathlib import Path
Path({trace!r}).write_text("executed")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class Config(LlamaConfig):
    model_type = "own"

class Model(LlamaForCausalLM):
    config_class = Config

class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def own_code(parts: Callable[[str], Any], tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint with code for its configuration, model and tokenizer, and the file that appears when the code is run."""
    llama, folder, trace = parts("llama"), tmp_path / "model", tmp_path / "trace"
    llama.model.save_pretrained(folder)
    llama.tokenizer.save_pretrained(folder)
    (folder / "own.py").write_text(CODE.format(trace=str(trace)))
    _edit(
        folder / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    )
    tokenizer = {"AutoTokenizer": [None, "own.Tokenizer"]}
    _edit(folder / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=tokenizer)
    return folder, trace


def _edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("load", [load_model, load_processing_class, is_masked_checkpoint, trained_classes])
def test_code_in_a_checkpoint_is_never_run_whatever_is_answered(
    own_code: tuple[Path, Path], load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, trace = own_code
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to the question that transformers asks
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ValueError, match=r"needs code of its own .* never run here"):
        load(str(folder))
    assert not trace.exists()


def test_the_command_line_does_not_run_it_either(
    own_code: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, trace = own_code
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "the film", "label": "was great"}\n')
    assert (
        main(["predict", "--model", str(folder), "--dataset", str(rows), "--output", str(tmp_path / "out.jsonl")]) != 0
    )
    assert "never run here" in capsys.readouterr().err
    assert not trace.exists()


def test_a_model_that_transformers_knows_is_loaded_without_the_code_beside_it(own_code: tuple[Path, Path]) -> None:
    folder, trace = own_code
    _edit(folder / "config.json", model_type="llama")
    assert type(load_model(str(folder))).__module__.startswith("transformers.")
    assert not trace.exists()


def test_pickled_weights_are_not_opened(parts: Callable[[str], Any], tmp_path: Path) -> None:
    folder, trace = tmp_path / "model", tmp_path / "trace"
    parts("llama").model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.write_text, (trace, "executed")

    torch.save(Trap(), folder / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(OSError, match="safetensors"):
        load_model(str(folder))
    assert not trace.exists()


# --- damaged files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(parts: Callable[[str], Any], tmp_path: Path) -> Path:
    """A model of two layers with its tokenizer, in a folder."""
    folder = tmp_path / "saved"
    parts("llama").model.save_pretrained(folder)
    parts("llama").tokenizer.save_pretrained(folder)
    return folder


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("classes", [None, ("bad", "good")])
def test_weights_that_were_cut_short_are_named(saved: Path, classes: tuple[str, ...] | None) -> None:
    _cut(saved / "model.safetensors")
    with pytest.raises(ValueError, match=f"the weights of {saved} are damaged .*: download them again"):
        load_model(str(saved), classes=classes)


def test_an_adapter_that_was_cut_short_is_named(saved: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    add_lora(load_model(str(saved)), 2, 4, None, 0).save_pretrained(adapter)
    _edit(adapter / "adapter_config.json", base_model_name_or_path=str(saved))
    _cut(adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"the weights of {adapter} are damaged"):
        load_model(str(adapter))


@pytest.mark.parametrize("classes", [None, ("bad", "good")])
def test_a_configuration_that_does_not_fit_the_weights_is_named(saved: Path, classes: tuple[str, ...] | None) -> None:
    _edit(saved / "config.json", vocab_size=7)
    with pytest.raises(ValueError, match=f"the weights of {saved} have sizes other than its config.json says"):
        load_model(str(saved), classes=classes)


def test_memory_that_runs_out_while_weights_are_loaded_is_no_damage() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"), _sound_weights("model"):
        torch.empty(1 << 50)  # more than any machine has


# --- incomplete checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "lacking"), [("bert", "cls.predictions.transform.dense.weight"), ("llama", "lm_head.weight")]
)
def test_a_model_without_a_language_model_s_head_is_only_made_a_classifier(
    parts: Callable[[str], Any], tmp_path: Path, kind: str, lacking: str
) -> None:
    parts(kind).model.base_model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=f"^{tmp_path} is not a language model: of .* it lacks {lacking}, which would be random; choose",
    ):
        load_model(str(tmp_path))
    first, again = (load_model(str(tmp_path), classes=("bad", "good")) for _ in range(2))
    assert all(map(torch.equal, first.parameters(), again.parameters()))


def test_the_command_line_names_what_the_model_lacks(
    parts: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bert = parts("bert")
    bert.model.base_model.save_pretrained(tmp_path / "bare")
    bert.tokenizer.save_pretrained(tmp_path / "bare")
    rows = tmp_path / "rows.tsv"
    rows.write_text("text\tlabel\n" + "the film was great\t1\nthe film was bad\t0\n" * 8)
    words = ["--prompt", "{text} it was {mask}", "--label_words", "0=bad", "1=great", "--reward", "f1"]
    out = ["--output_dir", str(tmp_path / "out")]
    assert main(["train", "--model", str(tmp_path / "bare"), "--dataset", str(rows), *words, *out]) == 2
    assert f"{tmp_path / 'bare'} is not a language model: of BertForMaskedLM it lacks cls" in capsys.readouterr().err


def test_a_tied_head_and_a_bias_of_zeros_may_be_missing(parts: Callable[[str], Any], tmp_path: Path) -> None:
    """Neither is random: the one is the embedding, and the other the same each time."""
    gpt2, bert = parts("gpt2").model, parts("bert").model
    gpt2.base_model.save_pretrained(tmp_path / "gpt2")
    assert torch.equal(load_model(str(tmp_path / "gpt2")).lm_head.weight, gpt2.lm_head.weight)
    bert.save_pretrained(tmp_path / "bert")
    weights = load_file(tmp_path / "bert" / "model.safetensors")
    del weights["cls.predictions.bias"]
    save_file(weights, tmp_path / "bert" / "model.safetensors", metadata={"format": "pt"})
    assert not load_model(str(tmp_path / "bert")).cls.predictions.bias.any()


# --- damaged tokenizers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", '{"a": 1}'),
        ("tokenizer.json", "null"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"version": '),
        ("tokenizer.json", '{"added_tokens": [], "model": {"type": "none"}}'),
        ("tokenizer.json", "\udcff"),  # a byte that is no UTF-8
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(saved: Path, file: str, content: str) -> None:
    (saved / file).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(
        ValueError, match=f"{saved} holds no tokenizer that can be read .*: download its tokenizer.json"
    ):
        load_processing_class(str(saved))


def test_a_folder_without_a_tokenizer_keeps_the_sentence_of_transformers(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        load_processing_class(str(tmp_path / "nowhere"))


def test_a_name_that_is_neither_a_folder_nor_reachable_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = "^the model 'nope/model' is neither a folder here nor reachable on the hub$"
    for load in (load_model, is_masked_checkpoint, trained_classes):
        with pytest.raises(OSError, match=message):
            load("nope/model")
