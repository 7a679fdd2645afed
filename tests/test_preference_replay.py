"""The loss of judged pairs: direct preference optimisation's, braked, and learnt by MeZO's own steps."""

from __future__ import annotations

import copy

import pytest
import torch

from zorl.answer_logits import AnswerLogits, TokenAnswer
from zorl.drift import starting_evaluator
from zorl.mezo import MeZO
from zorl.output_bias import add_output_bias, output_bias_name
from zorl.parameters import ParameterSet, select
from zorl.perturbation import Scratch
from zorl.preference_replay import Preference, PreferenceReplay
from zorl.probe import CENTRE, Point, Scores

PAIRS = [
    Preference(TokenAnswer((5, 6), (7, 8, 9)), TokenAnswer((5, 6), (10, 11))),
    Preference(TokenAnswer((9,), (7, 7)), TokenAnswer((9,), (12, 13, 14))),
]


def readers(part, temperature=1.0):
    model = copy.deepcopy(part.model)
    add_output_bias(model)
    parameters = ParameterSet(select(model, output_bias_name(model)))
    start = starting_evaluator(model, parameters)
    return parameters, (
        AnswerLogits(Scratch(model, parameters), parameters, temperature=temperature),
        AnswerLogits(start, start.parameters, temperature=temperature),
    )


def scores(replay, *points):
    answers = replay.ask(points, 0).answers
    assert isinstance(answers, Scores)
    return answers.values


def log_likelihood(model, answer, temperature):
    ids = torch.tensor([[*answer.prompt_ids, *answer.ids]])
    log_probabilities = (model(ids).logits[0] / temperature).log_softmax(-1)
    start = len(answer.prompt_ids) - 1
    return sum(log_probabilities[start + t, token] for t, token in enumerate(answer.ids))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_it_is_the_loss_of_direct_preference_optimisation(parts, kind):
    beta, temperature = 0.3, 0.8
    parameters, (current, start) = readers(parts(kind), temperature)
    (bias,) = parameters.values()
    with torch.no_grad():
        bias.copy_(torch.linspace(-1, 1, bias.numel()))
    replay = PreferenceReplay(current, start, beta=beta, brake=0.0)
    replay.add(PAIRS[:1])
    with torch.no_grad():
        margin = sum(
            sign * (log_likelihood(current.evaluator.module, answer, temperature)
                    - log_likelihood(start.evaluator.module, answer, temperature))
            for sign, answer in ((1, PAIRS[0].preferred), (-1, PAIRS[0].other))
        )  # fmt: skip
    expected = torch.nn.functional.logsigmoid(beta * margin) / beta
    assert scores(replay, CENTRE).item() == pytest.approx(expected.item(), abs=1e-4)


def test_the_starting_model_has_neither_margin_nor_drift(parts):
    _, (current, start) = readers(parts("llama"))
    replay = PreferenceReplay(current, start, beta=0.5, brake=10.0)
    replay.add(PAIRS)
    asked = replay.ask([CENTRE], 0)
    assert asked.figures["replay/kl"] == pytest.approx(0.0, abs=1e-6)
    assert asked.figures["replay/loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item() / 0.5, abs=1e-5)


def test_the_brake_takes_from_a_points_score_what_its_drift_costs(parts):
    point = Point(4, 0.3)
    _, (current, start) = readers(parts("llama"))
    free, braked = (PreferenceReplay(current, start, brake=brake) for brake in (0.0, 2.0))
    free.add(PAIRS)
    braked.add(PAIRS)
    kl = braked.ask([point], 0).figures["replay/kl"]  # a token
    places = sum(len(answer.ids) for pair in PAIRS for answer in (pair.preferred, pair.other))
    cost = (scores(free, point) - scores(braked, point)).sum().item()
    assert kl > 0
    assert cost == pytest.approx(2.0 * kl * places / 2, rel=1e-4)


def test_turning_a_verdict_round_turns_its_score_round(parts):
    point = Point(4, 0.1)
    _, (current, start) = readers(parts("llama"))
    one, other = (PreferenceReplay(current, start, beta=0.01, brake=0.0) for _ in range(2))
    one.add(PAIRS)
    other.add([Preference(pair.other, pair.preferred) for pair in PAIRS])
    gained = [scores(replay, point) - scores(replay, CENTRE) for replay in (one, other)]
    torch.testing.assert_close(gained[0].sum(), -gained[1].sum(), atol=1e-2, rtol=0.1)


def test_steps_make_preferred_answers_likelier_and_repeat_themselves(parts):
    found = []
    for _ in range(2):
        parameters, (current, start) = readers(parts("llama"))
        replay = PreferenceReplay(current, start, brake=0.0)
        replay.add(PAIRS)
        mezo = MeZO(parameters.items(), lr=0.1, epsilon=0.05, n_spsa=8, update="normalized")
        before = scores(replay, CENTRE).mean()
        for _ in range(20):
            record = replay.step(mezo)
        assert mezo.steps == 20
        assert scores(replay, CENTRE).mean() > before + 0.5
        assert len(record.projected) == 8
        assert replay.ask([CENTRE], step=20).figures["replay/agreement"] == 1.0
        found.append(parameters.sha256())
    assert found[0] == found[1]


def test_a_step_sees_a_batch_of_its_own_and_all_points_the_same(parts):
    _, (current, start) = readers(parts("llama"))
    replay = PreferenceReplay(current, start, batch_size=3)
    replay.add([Preference(TokenAnswer((5,), (6 + i,)), TokenAnswer((5,), (20 + i,))) for i in range(10)])
    values = {step: replay.ask([Point(1, 0.2), Point(1, 0.2)], step).answers.values for step in (0, 0, 1)}
    assert values[0].shape == (2, 3)
    assert torch.equal(values[0][0], values[0][1])
    assert not torch.equal(values[0], values[1])


def test_only_the_newest_pairs_are_kept(parts):
    _, (current, start) = readers(parts("llama"))
    replay = PreferenceReplay(current, start, capacity=2)
    newest = [Preference(TokenAnswer((5,), (6 + i,)), TokenAnswer((5,), (9,))) for i in range(5)]
    for pair in newest:
        replay.add([pair])
    assert replay.pairs == newest[-2:]


def test_bad_arguments_are_refused(parts):
    _, (current, start) = readers(parts("llama"))
    _, (warmer, _) = readers(parts("llama"), temperature=2.0)
    with pytest.raises(ValueError, match="nothing has been judged yet"):
        PreferenceReplay(current, start).ask([CENTRE], 0)
    with pytest.raises(ValueError, match="beta must be a positive number"):
        PreferenceReplay(current, start, beta=0)
    with pytest.raises(ValueError, match="brake must be 0 or a positive number"):
        PreferenceReplay(current, start, brake=-1)
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        PreferenceReplay(current, start, capacity=0)
    with pytest.raises(ValueError, match=r"at temperature 2.0 and the starting one at 1.0"):
        PreferenceReplay(warmer, start)
