"""The learning rate and ε that a trainer is told to take."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from zorl import MeZOConfig, MeZOTrainer, Prompt
from zorl.diagnosis import Costs, Plan, Try, choose_try, diagnose
from zorl.rewards import accuracy

pytestmark = pytest.mark.usefixtures("one_thread")


def test_another_rate_than_the_theorys_has_to_win_by_more_than_chance() -> None:
    middle = Try(1e-3, (1.0, 1.2, 0.8, 1.0))
    assert choose_try([Try(2.5e-4, (0.9, 0.9, 0.9, 0.9)), middle, Try(4e-3, (1.6, 0.7, 1.6, 0.6))]) is middle
    clear = Try(4e-3, (1.6, 1.7, 1.5, 1.4))
    assert choose_try([Try(2.5e-4, (0.9, 0.9, 0.9, 0.9)), middle, clear]) is clear
    slow = Try(2.5e-4, (0.1, 0.1, 0.1, 0.1))
    assert choose_try([slow, Try(1e-3, (math.nan,) * 4), Try(4e-3, (math.nan,) * 4)]) is slow


@pytest.fixture
def trainer(parts: Callable[[str], Any], tmp_path: Path) -> Callable[..., MeZOTrainer]:
    """Of a tiny masked language model of its own, on forty short reviews."""
    rng = random.Random(0)
    words = {"0": ("bad", "terrible"), "1": ("good", "great")}
    rows = [
        {"text": f"the {rng.choice(['film', 'plot'])} was {rng.choice(words[label])} .", "label": label}
        for label in ("0", "1") * 20
    ]

    def make(goal: dict[str, Any], **settings: Any) -> MeZOTrainer:
        settings = {"calibration": "none", "per_device_train_batch_size": 8, **settings}
        return MeZOTrainer(
            copy.deepcopy(parts("bert").model),
            **goal,
            prompt=Prompt("{text} it was {mask} .", {"0": "terrible", "1": "great"}),
            processing_class=parts("bert").tokenizer,
            train_dataset=rows,
            args=MeZOConfig(output_dir=str(tmp_path / "out"), disable_tqdm=True, use_cpu=True, **settings),
        )

    return make


def test_half_precision_is_warned_of(trainer: Callable[..., MeZOTrainer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zorl.diagnosis.choose_epsilon", lambda looks, target: 3e-3)
    of = trainer({"loss": "cross_entropy"})
    of.model.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="rounding outweighs the curvature of a model in half precision"):
        diagnose(of, 300)


@pytest.mark.parametrize(
    ("goal", "settings"),
    [
        ({"loss": "cross_entropy"}, {}),
        ({"loss": "cross_entropy"}, {"update": "sgd", "distribution": "gaussian", "n_spsa": "2", "estimator": "spsa"}),
        ({"reward_funcs": accuracy()}, {"calibration": "bias", "gradient_accumulation_steps": 2}),
        ({"loss": "cross_entropy"}, {"estimator": "one_point"}),
        (
            {"loss": "cross_entropy"},
            {
                "estimator": "variance_spsa",
                "n_spsa": "1",
                "block_scales": "gradient_norms",
                "block_scales_every": 4,
                "parameters": "*attention.self.query*",
            },
        ),
    ],
    ids=["cross entropy", "the paper's recipe", "accuracy", "one point", "measured blocks"],
)
def test_a_diagnosis_keeps_to_its_budget_and_leaves_the_model_alone(
    trainer: Callable[..., MeZOTrainer], goal: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    subject = trainer(goal, **settings)
    before, made = subject.tuned.sha256(), []
    found = diagnose(subject, 300, made.append)
    assert sum(made) == found.forwards <= 300
    assert found.calibration_forwards == subject.calibration_forwards
    assert subject.tuned.sha256() == before
    assert not any((tmp_path / "out").iterdir())
    assert 0 < found.lr_sgd < math.inf
    assert found.epsilon is None or found.epsilon in [entry.epsilon for entry in found.looks]
    assert [t.learning_rate / found.tries[0].learning_rate for t in found.tries] == pytest.approx([1.0, 4.0, 16.0])
    again = diagnose(trainer(goal, **settings), 300)
    assert (again.lr_sgd, again.epsilon, again.tries) == (found.lr_sgd, found.epsilon, found.tries)


@pytest.mark.parametrize(
    ("settings", "other"),
    [
        (
            {"estimator": "expectation_spsa", "block_scales": "parameter_norms"},
            {"estimator": "expectation_spsa", "block_scales": "gradient_norms"},
        ),
        ({"update": "momentum", "beta1": 0.9}, {"update": "momentum", "beta1": 0.1}),
        ({"update": "adam", "n_spsa": "2", "beta2": 0.95}, {"update": "adam", "n_spsa": "2", "beta2": 0.1}),
    ],
    ids=["block scales", "beta1", "beta2"],
)
def test_the_tries_take_the_settings_of_the_run(
    trainer: Callable[..., MeZOTrainer], settings: dict[str, Any], other: dict[str, Any]
) -> None:
    few = {"n_spsa": "1", "estimator": "spsa", "parameters": "*attention.self.query*"}
    one, two = (diagnose(trainer({"loss": "cross_entropy"}, **{**few, **s}), 300) for s in (settings, other))
    assert [t.learning_rate for t in one.tries] == [t.learning_rate for t in two.tries]
    assert [t.falls for t in one.tries] != [t.falls for t in two.tries]


@pytest.mark.parametrize("every", [2, 3, 100])
def test_a_plan_spends_no_more_than_its_budget(every: int) -> None:
    for budget in range(100, 700, 7):
        costs = Costs(2, 12, every)
        plan = Plan.of(budget, costs)
        if plan is not None:
            assert plan.forwards(costs) <= budget
            measured = sum(step % every == 0 for step in range(plan.steps * 2) if step - -(-step // every) < plan.steps)
            assert costs.of(plan.steps) == 2 * plan.steps + 12 * measured


def test_what_cannot_be_diagnosed_is_told(trainer: Callable[..., MeZOTrainer]) -> None:
    with pytest.raises(
        ValueError, match=r"a budget of 50 forwards is too small: \d+ are needed, 0 of them to calibrate"
    ):
        diagnose(trainer({"loss": "cross_entropy"}), 50)
    with pytest.raises(ValueError, match="estimator='forward_gradient' computes them exactly"):
        diagnose(trainer({"loss": "cross_entropy"}, estimator="forward_gradient"))
    with pytest.raises(ValueError, match="a judge only compares"):
        diagnose(trainer({"judge": lambda prompts, **columns: ["tie"] * len(prompts)}))
    flat = trainer({"reward_funcs": lambda completions, **columns: [1.0] * len(completions)}, label_reward="best")
    with pytest.raises(ValueError, match="directions tie at ε = .* no slope to follow"):
        diagnose(flat)
