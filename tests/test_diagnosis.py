"""The theory, checked by numbers, and the learning rate and ε that a trainer is told to take."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zorl import MeZO, MeZOConfig, MeZOTrainer, Prompt
from zorl.diagnosis import Look, Try, choose_epsilon, choose_try, corollary_1, diagnose, estimated_norm, lemma_2, look
from zorl.directions import Distribution, key
from zorl.kernels import kernel_for
from zorl.parameters import ParameterSet
from zorl.probe import Point, Scores
from zorl.rewards import accuracy

pytestmark = pytest.mark.usefixtures("one_thread")

# --- Lemma 2, Theorem 1 and Corollary 1 -------------------------------------------------------------------------------


def directions(distribution: str, count: int, shape: tuple[int, int]) -> Tensor:
    """Shape (count, d): zorl's own, or the paper's on the sphere of radius √d."""
    kind: Distribution = "gaussian" if distribution == "sphere" else distribution  # type: ignore[assignment]
    zero, z = torch.zeros(shape), torch.empty(count, *shape)
    for seed in range(count):
        kernel_for(zero).perturb(zero, key(seed, "w"), 1.0, kind, z[seed])
    flat = z.flatten(1).double()
    return flat * math.sqrt(flat.shape[1]) / flat.norm(dim=1, keepdim=True) if distribution == "sphere" else flat


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("distribution", ["sphere", "rademacher", "rank1", "gaussian"])
def test_the_estimate_is_as_long_as_lemma_2_says(distribution: str, n: int) -> None:
    """(d + n − 1)/n on the sphere, for ±1 and for rank one; (d + n + 1)/n for Gaussian z. With d = 10 the two are 20% apart."""
    z = directions(distribution, 9000, (2, 5)).view(-1, n, 10)
    gradient = torch.tensor([3.0, -1.0, 0.5, 2.0, 0.0, 1.0, -0.2, 0.7, -2.0, 1.5], dtype=torch.float64)
    estimates = ((z @ gradient).unsqueeze(2) * z).mean(dim=1)
    ratios = estimates.square().sum(dim=1) / gradient.square().sum()
    error = ratios.std().item() / math.sqrt(len(ratios))
    expected = lemma_2(10, n, "gaussian" if distribution == "gaussian" else "rademacher")
    assert ratios.mean().item() == pytest.approx(expected, abs=4 * error)
    assert expected == (10 + n + (1 if distribution == "gaussian" else -1)) / n
    assert error < 0.05 * expected, "the comparison means something"


@pytest.mark.parametrize("distribution", ["rademacher", "rank1", "rank4", "gaussian"])
def test_the_estimates_norm_is_that_of_the_sum_of_directions(distribution: Distribution) -> None:
    shapes = {"w": (4, 6), "b": (5,)}
    parameters = ParameterSet((name, torch.randn(shape)) for name, shape in shapes.items())
    slopes = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    total = 0.0
    for name, shape in shapes.items():
        zero, one = torch.zeros(shape), torch.empty(shape)
        estimate = torch.zeros(shape, dtype=torch.float64)
        for seed, slope in enumerate(slopes.tolist()):
            kernel_for(zero).perturb(zero, key(seed, name), 1.0, distribution, one)
            estimate += slope * one.double() / 3
        total += estimate.square().sum().item()
    assert estimated_norm(slopes, parameters, distribution, range(3)) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("n", [1, 4])
def test_no_rate_lets_the_loss_fall_farther_in_a_step_than_corollary_1s(n: int) -> None:
    eigenvalues = torch.tensor([5.0, *[1.0] * 15, *[0.0] * 14], dtype=torch.float64)  # r = 4
    theta = torch.zeros(30, dtype=torch.float64)
    theta[:16] = torch.linspace(-1.0, 1.0, 16)
    theta[0] = 0.5
    gradient = eigenvalues * theta
    z = directions("gaussian", 12000, (5, 6)).view(-1, n, 30)
    steps = ((z @ gradient).unsqueeze(2) * z).mean(dim=1)

    def change(rate: float) -> float:
        return (-rate * steps @ gradient + 0.5 * rate**2 * (steps.square() @ eigenvalues)).mean().item()

    rate = corollary_1(eigenvalues.sum().item(), eigenvalues.max().item(), n)
    # ∇LᵀH∇L is ‖H‖‖∇L‖² at most: the rate is the best one or, by a little, a smaller one.
    assert change(rate) < min(change(0.0), change(rate / 2), change(rate * 3))
    best = min((change(rate * 2.0 ** (i / 8)), i) for i in range(-16, 17))
    assert 0 <= best[1] <= 8
    assert change(rate) < 0.8 * best[0]


def steps_to_a_tenth(quadratic: Callable[..., Any], rank: int, dimension: int) -> float:
    """Steps of MeZO until the loss is a tenth of what it was, the mean of several runs, with Corollary 1's rate."""
    taken = []
    for seed in range(4):
        problem = quadratic([1.0] * rank, "rademacher", dimension)
        problem.linear.zero_()
        start = problem.basis @ torch.ones(rank, dtype=torch.float64)
        problem.parameters["w"].copy_(start.view(-1, 20).float())
        mezo = MeZO(problem.parameters.items(), lr=corollary_1(float(rank), 1.0, 1), epsilon=1e-3, seed=seed)
        goal = 0.1 * problem.at(Point(0, 0.0))
        for step in itertools.count():
            if problem.at(Point(0, 0.0)) <= goal:
                taken.append(step)
                break
            probe = mezo.ask()
            mezo.tell(probe.id, Scores.of_losses(problem.losses(probe.points)))
            mezo.step()
    return sum(taken) / len(taken)


def test_the_number_of_steps_grows_with_the_effective_rank_and_not_with_the_dimension(
    quadratic: Callable[..., Any],
) -> None:
    """Theorem 1: E L falls by 1 − 1/(r + 2) a step, so that it takes about 2.3·(r + 2), whatever d is."""
    steps = {(r, d): steps_to_a_tenth(quadratic, r, d) for r in (8, 32) for d in (80, 1280)}
    for (r, _), taken in steps.items():
        assert 0.5 < taken / (2.3 * (r + 2)) < 1.5, steps
    assert steps[8, 1280] / steps[8, 80] < 2, f"sixteen times the dimension: {steps}"
    assert steps[32, 1280] / steps[32, 80] < 1.5, steps
    assert steps[32, 80] / steps[8, 80] > 2, f"four times the rank: {steps}"


# --- ε ----------------------------------------------------------------------------------------------------------------

EPSILONS = [1e-4, 1e-3, 1e-2, 1e-1]


def along_a_line(loss: Callable[[float], float]) -> Callable[[Sequence[Point]], Tensor]:
    """A loss that depends on the offset alone, with another slope for every seed."""
    return lambda points: torch.tensor([loss(p.offset) * (1 + p.seed) for p in points], dtype=torch.float64)


def test_the_largest_epsilon_that_the_third_derivative_leaves_alone_is_chosen() -> None:
    looks = look(along_a_line(lambda x: x + 2e3 * x**3), range(4), EPSILONS)  # the slope is off by 2000·ε²
    assert [found.slope_error for found in looks] == pytest.approx([1e-3, 1e-3, 0.2, 20.0], rel=0.02)
    assert choose_epsilon(looks, 0.8) == 1e-3
    straight = look(along_a_line(lambda x: 3.0 * x), range(4), EPSILONS)
    assert choose_epsilon(straight, 0.8) == 1e-1


def test_steps_of_a_reward_call_for_a_larger_epsilon() -> None:
    stairs = look(along_a_line(lambda x: round(x / 3e-3) * 3e-3), range(4), EPSILONS)
    assert [found.informative for found in stairs] == [0.0, 0.0, 1.0, 1.0]
    assert choose_epsilon(stairs, 0.8) == 1e-1
    flat = look(along_a_line(lambda x: 0.0), range(4), EPSILONS)
    assert all(math.isnan(found.slope_error) for found in flat)
    assert choose_epsilon(flat, 0.8) is None


def test_an_epsilon_that_is_not_informative_enough_is_not_chosen() -> None:
    looks = [Look(1e-3, 1.0, 0.3), Look(1e-2, 0.9, 0.2), Look(1e-1, 0.5, 0.01)]
    assert choose_epsilon(looks, 0.8) == 1e-2, "none is within the tolerance: the best of the informative ones"
    assert choose_epsilon(looks, 0.95) == 1e-3
    assert choose_epsilon(looks, 0.4) == 1e-1


def test_another_rate_than_the_theorys_has_to_win_by_more_than_chance() -> None:
    middle = Try(1e-3, (1.0, 1.2, 0.8, 1.0))
    assert choose_try([Try(2.5e-4, (0.9, 0.9, 0.9, 0.9)), middle, Try(4e-3, (1.6, 0.7, 1.6, 0.6))]) is middle
    clear = Try(4e-3, (1.6, 1.7, 1.5, 1.4))
    assert choose_try([Try(2.5e-4, (0.9, 0.9, 0.9, 0.9)), middle, clear]) is clear
    slow = Try(2.5e-4, (0.1, 0.1, 0.1, 0.1))
    assert choose_try([slow, Try(1e-3, (math.nan,) * 4), Try(4e-3, (math.nan,) * 4)]) is slow


# --- a trainer --------------------------------------------------------------------------------------------------------


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
        import copy

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


@pytest.mark.parametrize(
    ("goal", "settings"),
    [
        ({"loss": "cross_entropy"}, {}),
        ({"loss": "cross_entropy"}, {"update": "sgd", "distribution": "gaussian", "n_spsa": "2"}),
        ({"reward_funcs": accuracy()}, {"calibration": "bias", "gradient_accumulation_steps": 2}),
    ],
    ids=["cross entropy", "the paper's recipe", "accuracy"],
)
def test_a_diagnosis_keeps_to_its_budget_and_leaves_the_model_alone(
    trainer: Callable[..., MeZOTrainer], goal: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    subject = trainer(goal, **settings)
    before, made = subject.tuned.sha256(), []
    found = diagnose(subject, 200, made.append)
    assert sum(made) == found.forwards <= 200
    assert found.calibration_forwards == subject.calibration_forwards
    assert subject.tuned.sha256() == before
    assert not any((tmp_path / "out").iterdir())
    assert 0 < found.lr_sgd < math.inf
    assert found.epsilon is None or found.epsilon in [entry.epsilon for entry in found.looks]
    assert found.lemma_2_measured[0] == pytest.approx(found.lemma_2_measured[1], rel=0.2)
    assert [t.learning_rate / found.tries[0].learning_rate for t in found.tries] == pytest.approx([1.0, 4.0, 16.0])
    again = diagnose(trainer(goal, **settings), 200)
    assert (again.lr_sgd, again.epsilon, again.tries) == (found.lr_sgd, found.epsilon, found.tries)


def test_what_cannot_be_diagnosed_is_told(trainer: Callable[..., MeZOTrainer]) -> None:
    with pytest.raises(ValueError, match=r"a budget of 50 forwards is too small: \d+ are needed, 0 to calibrate"):
        diagnose(trainer({"loss": "cross_entropy"}), 50)
    with pytest.raises(ValueError, match="a judge only compares"):
        diagnose(trainer({"judge": lambda prompts, **columns: ["tie"] * len(prompts)}))
    flat = trainer({"reward_funcs": lambda completions, **columns: [1.0] * len(completions)}, label_reward="best")
    with pytest.raises(ValueError, match="directions tie at ε = .* no slope to follow"):
        diagnose(flat)
