"""Drift: nothing at the start, and seen when the model moves."""

from __future__ import annotations

import copy

import pytest
import torch

from zorl.answer_logits import AnswerLogits
from zorl.drift import DriftMeter, distinct_2, starting_evaluator
from zorl.generation import Generation
from zorl.output_bias import add_output_bias, output_bias_name
from zorl.parameters import ParameterSet, select
from zorl.perturbation import Scratch
from zorl.probe import CENTRE
from zorl.prompts import Prompt

TOKENS = torch.tensor([[5, 6, 7, 8]])
ROWS = [{"text": text} for text in ("the film", "who wrote the book?", "good or bad")]


def logits(evaluator):
    return evaluator.evaluate(CENTRE, lambda: evaluator.module(TOKENS).logits)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_starting_model_stays_when_the_tuned_one_moves(parts, kind):
    model = copy.deepcopy(parts(kind).model)
    before = model(TOKENS).logits.detach()
    start = starting_evaluator(model, ParameterSet(select(model)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    assert not torch.equal(model(TOKENS).logits, before)
    assert torch.equal(logits(start), before)


def test_what_is_not_tuned_is_shared(parts):
    model = copy.deepcopy(parts("llama").model)
    start = starting_evaluator(model, ParameterSet(select(model, "*norm*")))
    for (name, mine), (_, its) in zip(model.named_parameters(), start.module.named_parameters(), strict=True):
        assert (mine.data_ptr() == its.data_ptr()) == ("norm" not in name)


def test_a_tied_weight_that_is_tuned_is_copied_once(parts):
    model = copy.deepcopy(parts("gpt2").model)
    start = starting_evaluator(model, ParameterSet(select(model, "transformer.wte.weight")))
    assert start.module.get_output_embeddings().weight is start.module.get_input_embeddings().weight
    assert start.module.get_output_embeddings().weight is not model.get_output_embeddings().weight


def meter(part, **options):
    model = copy.deepcopy(part.model)
    bias = add_output_bias(model)
    parameters = ParameterSet(select(model, output_bias_name(model)))
    evaluators = Scratch(model, parameters), starting_evaluator(model, parameters)
    policies = [
        Generation(evaluator, part.tokenizer, Prompt("{text}"), max_new_tokens=12, **options)
        for evaluator in evaluators
    ]
    readers = [AnswerLogits(evaluator, evaluator.parameters) for evaluator in evaluators]
    return bias, DriftMeter(*policies, *readers, ROWS, noise_seed=3)


def test_there_is_none_at_the_start(parts):
    _, drift = meter(parts("llama"))
    found = drift.measure()
    assert found.kl == pytest.approx(0.0, abs=1e-6)
    assert found.perplexity == pytest.approx(1.0, abs=1e-5)
    assert found.distinct_2 == 1.0


def test_a_model_that_says_one_word_alone_has_drifted(parts):
    bias, drift = meter(parts("llama"))
    with torch.no_grad():
        bias[9] += 50.0
    found = drift.measure()
    assert found.kl > 1.0
    assert found.perplexity > 1.5


def test_a_model_that_says_nothing_any_more_has_drifted_without_measure(parts):
    bias, drift = meter(parts("llama"))
    with torch.no_grad():
        bias[parts("llama").tokenizer.eos_token_id] += 100.0
    found = drift.measure()
    assert found.distinct_2 == 0.0


def test_distinct_2_is_the_share_of_different_word_pairs():
    assert distinct_2(["a b a b", "A b"]) == 0.5  # ab ba ab, ab
    assert distinct_2(["a", ""]) == 0.0


def test_no_prompts_are_refused(parts):
    part = parts("llama")
    policy = Generation(part.evaluator, part.tokenizer, Prompt("{text}"), max_new_tokens=4)
    reader = AnswerLogits(part.evaluator, part.evaluator.parameters)
    with pytest.raises(ValueError, match="drift is measured on prompts, and there are none"):
        DriftMeter(policy, policy, reader, reader, [])
