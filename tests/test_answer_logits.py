"""Logits of given answers: those of a whole forward of each alone, whatever the batch, the padding and the cache."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from zorl.answer_logits import AnswerLogits, TokenAnswer, answer_sums, chosen, divergence
from zorl.output_bias import add_output_bias, output_bias_name
from zorl.parameters import ParameterSet, select
from zorl.perturbation import Scratch
from zorl.probe import CENTRE, Point

CAUSAL = ("gpt2", "opt", "llama", "qwen2")
ANSWERS = [
    TokenAnswer((5, 6, 7), (8, 9)),
    TokenAnswer((5,), (10, 11, 12, 13)),
    TokenAnswer((9, 8, 7, 6, 5, 4), (6,)),
    TokenAnswer((5, 6, 7), (8, 9)),  # again
]
POINTS = (CENTRE, Point(3, 0.1), Point(3, -0.1))


def with_bias(part):
    model = copy.deepcopy(part.model)
    add_output_bias(model)
    return model


def parts_of(model, names=None):
    parameters = ParameterSet(select(model, names))
    return Scratch(model, parameters), parameters


def one_by_one(evaluator, point, temperature=1.0):
    rows = []
    for answer in ANSWERS:
        ids = torch.tensor([[*answer.prompt_ids, *answer.ids]])
        logits = evaluator.evaluate(point, lambda ids=ids: evaluator.module(input_ids=ids).logits)
        start = len(answer.prompt_ids) - 1
        rows.append((logits[0, start : start + len(answer.ids)] / temperature).log_softmax(-1))
    return torch.cat(rows)


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_they_are_those_of_each_answer_alone(parts, kind, batch_size):
    evaluator, parameters = parts_of(parts(kind).model)
    reader = AnswerLogits(evaluator, parameters, batch_size=batch_size, temperature=0.7)
    assert not reader.cached
    for point in POINTS:
        found = reader.log_probabilities(ANSWERS, point)
        torch.testing.assert_close(found, one_by_one(evaluator, point, 0.7), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", CAUSAL)
def test_where_the_output_bias_alone_is_tuned_a_point_costs_no_forward(parts, kind):
    model = with_bias(parts(kind))
    evaluator, parameters = parts_of(model, output_bias_name(model))
    reader = AnswerLogits(evaluator, parameters)
    assert reader.cached
    forwards = []
    evaluator.module.get_input_embeddings().register_forward_pre_hook(lambda *_: forwards.append(1))
    for point in POINTS:
        found = reader.log_probabilities(ANSWERS, point)
    assert len(forwards) == 1
    assert reader.cached
    torch.testing.assert_close(found, one_by_one(evaluator, POINTS[-1]), atol=1e-4, rtol=1e-4)


def test_what_is_kept_follows_the_bias_when_it_moves(parts):
    model = with_bias(parts("llama"))
    evaluator, parameters = parts_of(model, output_bias_name(model))
    reader = AnswerLogits(evaluator, parameters)
    before = reader.log_probabilities(ANSWERS)
    with torch.no_grad():
        parameters["lm_head.bias"][8] += 3.0
    after = reader.log_probabilities(ANSWERS)
    assert (after[:, 8] > before[:, 8]).all()
    torch.testing.assert_close(after, one_by_one(evaluator, CENTRE), atol=1e-4, rtol=1e-4)


def test_forgetting_keeps_what_it_is_told_to(parts):
    model = with_bias(parts("llama"))
    evaluator, parameters = parts_of(model, output_bias_name(model))
    reader = AnswerLogits(evaluator, parameters)
    before = reader.log_probabilities(ANSWERS)
    forwards = []
    evaluator.module.get_input_embeddings().register_forward_pre_hook(lambda *_: forwards.append(1))
    reader.forget(ANSWERS)
    assert torch.equal(reader.log_probabilities(ANSWERS), before)
    assert not forwards
    reader.forget()
    torch.testing.assert_close(reader.log_probabilities(ANSWERS), before)
    assert forwards


def test_a_tied_embedding_that_is_tuned_takes_whole_forwards(parts):
    model = copy.deepcopy(parts("gpt2").model)
    evaluator, parameters = parts_of(model, "transformer.wte.weight")
    assert not AnswerLogits(evaluator, parameters).cached


def test_logits_that_are_changed_after_the_output_embedding_take_whole_forwards(parts):
    model = with_bias(parts("llama"))
    evaluator, parameters = parts_of(model, output_bias_name(model))
    plain = evaluator.module.forward
    evaluator.module.forward = lambda **kwargs: SimpleNamespace(logits=5 * (plain(**kwargs).logits / 5).tanh())
    reader = AnswerLogits(evaluator, parameters)
    found = reader.log_probabilities(ANSWERS, POINTS[1])
    assert not reader.cached
    torch.testing.assert_close(found, one_by_one(evaluator, POINTS[1]), atol=1e-4, rtol=1e-4)


def test_sums_tokens_and_divergences_are_of_the_right_places():
    log_probabilities = torch.randn(9, 20, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert answer_sums(torch.arange(9.0), ANSWERS).tolist() == [1.0, 14.0, 6.0, 15.0]
    picked = chosen(log_probabilities, ANSWERS)
    assert picked[0] == log_probabilities[0, 8]
    assert picked[6] == log_probabilities[6, 6]
    assert divergence(log_probabilities, log_probabilities).tolist() == [0.0] * 9
    other = torch.randn(9, 20, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    expected = torch.nn.functional.kl_div(other, log_probabilities, log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(divergence(log_probabilities, other), expected)
    assert (expected > 0).all()


def test_bad_arguments_are_refused(parts):
    evaluator, parameters = parts_of(parts("llama").model)
    with pytest.raises(ValueError, match="temperature must be positive, not 0"):
        AnswerLogits(evaluator, parameters, temperature=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        AnswerLogits(evaluator, parameters, batch_size=0)
    with pytest.raises(ValueError, match="at least one token each"):
        TokenAnswer((), (1,))
