"""Drift: a starting model that stays, and a distance that is zero at the start."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from zorl.directions import Step
from zorl.drift import StartingModel, drift
from zorl.generation import Generation
from zorl.parameters import ParameterSet, select
from zorl.perturbation import Scratch
from zorl.probe import CENTRE, Point
from zorl.prompts import Answer, Prompt

ROWS = [{"prompt": text} for text in ("the film was", "a great", "the user asked and the assistant said")]


def policies(parts: Any, patterns: list[str] | None = None) -> tuple[Generation, Generation, ParameterSet]:
    """A model that may be tuned, answered by itself and by what it was."""
    model = copy.deepcopy(parts.model)
    tuned = ParameterSet(select(model, patterns))
    made = [
        Generation(evaluator, parts.tokenizer, Prompt("{prompt}"), max_new_tokens=8)
        for evaluator in (Scratch(model, tuned), StartingModel(model, tuned))
    ]
    return made[0], made[1], tuned


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "qwen2"])
def test_drift_is_zero_at_the_start_and_positive_after_a_step(parts: Callable[[str], Any], kind: str):
    policy, start, tuned = policies(parts(kind))
    (answers,) = policy.answers(ROWS, [CENTRE], noise_seed=1)
    assert drift(policy, start, ROWS, answers) == 0.0
    tuned.add([Step(seed=5, coefficient=0.05)], "rademacher")
    rows = ROWS * 20
    (answers,) = policy.answers(rows, [CENTRE], noise_seed=1)
    near = drift(policy, start, rows, answers)
    tuned.add([Step(seed=5, coefficient=0.05)], "rademacher")
    (answers,) = policy.answers(rows, [CENTRE], noise_seed=1)
    assert 0.0 < near < drift(policy, start, rows, answers)


def test_the_starting_model_stays_and_copies_the_tuned_parameters_alone(parts: Callable[[str], Any]):
    policy, start, tuned = policies(parts("gpt2"), ["*ln_f*"])
    (before,) = start.answers(ROWS, [CENTRE], noise_seed=1)
    with torch.no_grad():
        for tensor in tuned.values():
            tensor.add_(0.5)
    assert start.answers(ROWS, [CENTRE], noise_seed=1)[0] == before
    named = dict(policy.evaluator.module.named_parameters())
    apart = {n for n, p in start.evaluator.module.named_parameters() if p.data_ptr() != named[n].data_ptr()}
    assert apart == {"transformer.ln_f.weight", "transformer.ln_f.bias"}


def test_the_starting_model_knows_one_point(parts: Callable[[str], Any]):
    _, start, _ = policies(parts("gpt2"))
    with pytest.raises(ValueError, match=r"stays where it is; it cannot go to offset 0\.1"):
        start.answers(ROWS, [Point(1, 0.1)])


def test_answers_without_tokens_have_no_drift(parts: Callable[[str], Any]):
    policy, start, _ = policies(parts("gpt2"))
    assert math.isnan(drift(policy, start, ROWS, [Answer("", [])] * len(ROWS)))
