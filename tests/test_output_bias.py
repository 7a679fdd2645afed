"""A bias on the output embedding: it starts as nothing, steers, and is saved so that plain transformers has it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from zorl.output_bias import add_output_bias, move_output_bias_to_generation_config, output_bias_name
from zorl.parameters import ParameterSet, select

CAUSAL = ("gpt2", "opt", "llama", "qwen2")
TOKENS = torch.tensor([[5, 6, 7, 8]])


def fresh(parts, kind):
    return copy.deepcopy(parts(kind).model)


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_new_bias_changes_nothing_and_is_the_only_new_parameter(parts, kind):
    model = fresh(parts, kind)
    before = model(TOKENS).logits
    names = {name for name, _ in model.named_parameters()}
    bias = add_output_bias(model)
    assert torch.equal(model(TOKENS).logits, before)
    assert {name for name, _ in model.named_parameters()} - names == {output_bias_name(model)}
    assert ParameterSet(select(model, output_bias_name(model))).numel == bias.numel() == before.shape[-1]
    assert add_output_bias(model) is bias  # a second time it is there


@pytest.mark.parametrize("kind", CAUSAL)
def test_tied_weights_stay_tied(parts, kind):
    model = fresh(parts, kind)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    add_output_bias(model)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("kind", CAUSAL)
def test_what_was_saved_generates_the_same_in_plain_transformers(parts, kind, tmp_path):
    model = fresh(parts, kind)
    plain = model.generate(TOKENS, max_new_tokens=8, do_sample=False, pad_token_id=0)
    bias = add_output_bias(model)
    with torch.no_grad():
        bias.copy_(torch.linspace(-6, 6, bias.numel()).roll(17))
    steered = model.generate(TOKENS, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert not torch.equal(steered, plain)
    move_output_bias_to_generation_config(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(TOKENS, max_new_tokens=8, do_sample=False, pad_token_id=0), steered)


def test_an_untouched_bias_leaves_no_trace(parts):
    model = fresh(parts, "llama")
    add_output_bias(model)
    move_output_bias_to_generation_config(model)
    assert model.generation_config.sequence_bias is None
    assert model.get_output_embeddings().bias is None


def test_what_cannot_be_done_is_said(parts):
    model = fresh(parts, "llama")
    with pytest.raises(ValueError, match=r"has no bias; call add_output_bias\(model\) first"):
        output_bias_name(model)
    add_output_bias(model)
    model.generation_config.sequence_bias = [[[5], 1.0]]
    with pytest.raises(ValueError, match="already has a sequence_bias"):
        move_output_bias_to_generation_config(model)
    headless = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(TypeError, match=r"has no linear output embedding \(NoneType\)"):
        add_output_bias(headless.encoder)
