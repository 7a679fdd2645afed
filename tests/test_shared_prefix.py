"""A prompt that is computed once for all its options gives the scores of one that is computed for each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, OpenAIGPTConfig, RemBertConfig, RobertaConfig

from zorl.parameters import ParameterSet, select
from zorl.perturbation import Scratch
from zorl.probe import CENTRE, Point
from zorl.prompts import Prompt
from zorl.scoring import LabelWords
from zorl.twin import Twin

CAUSAL = ("gpt2", "opt", "llama", "qwen2", "gpt_neox")
PROMPT = Prompt(
    "{text} , so {mask}", {"a": "a great story", "b": "it", "c": "it was terrible", "d": "it was terrible !"}
)
ROWS = [
    {"text": "the film was great and the plot was odd , very odd , and then it was good"},
    {"text": "the book"},
    {"text": "what was it like to watch the odd ending of the story"},
]
POINTS = [Point(3, 0.05), Point(3, -0.05), CENTRE]


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("evaluator", [Scratch, Twin])
def test_the_scores_are_those_of_whole_inputs(
    parts: Callable[[str], Any], kind: str, evaluator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(parts(kind).model)
    tokens: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda m, args, out: tokens.append(args[0].numel()))

    def scores(forward_tokens: int) -> Tensor:
        monkeypatch.setattr("zorl.shared_prefix.FORWARD_TOKENS", forward_tokens)
        tokens.clear()
        words = LabelWords(evaluator(model, ParameterSet(select(model)), "rank1"), parts(kind).tokenizer, PROMPT)
        return words.scores(ROWS, POINTS)

    whole, spent = scores(1 << 30), sum(tokens)
    shared = scores(-(1 << 30))
    torch.testing.assert_close(shared, whole, atol=2e-4, rtol=1e-4)
    assert sum(tokens) < 0.7 * spent
    assert (whole[0] - whole[1]).abs().max() > 1e-3


def scores_shared_and_whole(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The scores of the rows where a second forward always pays, and where it never does."""
    found = []
    for forward_tokens in (-(1 << 30), 1 << 30):
        monkeypatch.setattr("zorl.shared_prefix.FORWARD_TOKENS", forward_tokens)
        words = LabelWords(Scratch(model, ParameterSet(select(model)), "rank1"), tokenizer, PROMPT)
        found.append(words.scores(ROWS, POINTS))
    return found


@pytest.mark.parametrize(
    "make_config",
    [
        lambda **shape: RobertaConfig(**shape, intermediate_size=48, is_decoder=True),
        lambda **shape: OpenAIGPTConfig(**shape),
        lambda **shape: RemBertConfig(**shape, intermediate_size=48, is_decoder=True),
    ],
    ids=["positions from padding_idx + 1", "no cache", "a cache of another kind"],
)
def test_a_model_whose_prompts_cannot_be_continued_reads_whole_inputs(
    parts: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    tokenizer = parts("roberta").tokenizer
    config = make_config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=96,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    shared, whole = scores_shared_and_whole(model, tokenizer, monkeypatch)
    torch.testing.assert_close(shared, whole, atol=2e-4, rtol=1e-4)
    assert whole.std(dim=2).min() > 1e-2


def test_short_prompts_are_not_worth_a_second_forward(parts: Callable[[str], Any]) -> None:
    part = parts("gpt2")
    words = LabelWords(part.evaluator, part.tokenizer, PROMPT)
    (batch,) = words._likelihood.batches(words._encode(ROWS), torch.device("cpu"), 64)
    assert batch.shared is None
    long = words._likelihood.batches(
        words._encode([{"text": f"{row['text']} {i}"} for row in ROWS for i in range(16)]), torch.device("cpu"), 64
    )
    assert any(batch.shared is not None for batch in long)


def test_one_token_words_and_masked_models_share_nothing(parts: Callable[[str], Any]) -> None:
    for kind in ("gpt2", "bert"):
        part = parts(kind)
        single = Prompt("{text} it was {mask}", {"a": "great", "b": "terrible"})
        words = LabelWords(part.evaluator, part.tokenizer, single)
        (batch,) = words._likelihood.batches(words._encode([{"text": ROWS[0]["text"] * 3}]), torch.device("cpu"), 64)
        assert batch.shared is None
