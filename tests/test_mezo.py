"""MeZO as a whole: one contract for every direction and update rule, and the mathematics of the paper."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zorl.directions import DISTRIBUTIONS, Distribution, key
from zorl.kernels import reference
from zorl.mezo import MeZO
from zorl.parameters import ParameterSet
from zorl.perturbation import Scratch
from zorl.probe import Choice, Scores, Verdict, Verdicts
from zorl.replay import replay
from zorl.trajectory import read
from zorl.updates import UpdateName, bfloat16

UPDATES: tuple[UpdateName, ...] = ("sgd", "normalized")
each_method = pytest.mark.parametrize(
    ("distribution", "update"), list(itertools.product(DISTRIBUTIONS, UPDATES)), ids=lambda value: value
)
X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
TRUTH = torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5, -1.0])
LABELS = (X @ TRUTH > 0).long()


def model(dtype: torch.dtype = torch.float32, hidden: int = 8) -> nn.Sequential:
    """A small classifier of X with two equal-shaped layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Linear(hidden, 2)).to(dtype)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def answer(optimizer: MeZO, losses: Callable[[Any], Any]) -> list[float]:
    """Asks, answers with `losses(point)` and applies; the projected gradients."""
    probe = optimizer.ask()
    record = optimizer.tell(probe.id, Scores.of_losses([losses(point) for point in probe.points]))
    optimizer.step()
    return list(record.projected)


# --- the contract of every direction and update rule ----------------------------------------------------------------------


@each_method
def test_a_regression_is_learned_from_a_closure(distribution: Distribution, update: UpdateName):
    w = torch.zeros(6)
    lr = 0.02 if update == "sgd" else 0.05
    optimizer = MeZO([("w", w)], lr=lr, epsilon=1e-2, distribution=distribution, update=update, n_spsa=2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
    first = optimizer.step(lambda: (X @ w - X @ TRUTH).square().mean())
    for _ in range(250):
        last = optimizer.step(lambda: (X @ w - X @ TRUTH).square().mean())
        schedule.step()
    assert first is not None
    assert last is not None
    assert last < first / 100
    torch.testing.assert_close(w, TRUTH, rtol=0, atol=0.2)


@each_method
def test_accuracy_itself_is_learned_by_asking_and_telling(distribution: Distribution, update: UpdateName):
    network = model()
    optimizer = MeZO(
        network.named_parameters(),
        lr=0.02 if update == "normalized" else 0.01,
        epsilon="auto",
        distribution=distribution,
        update=update,
        n_spsa=2,
        seed=1,
    )
    scratch = Scratch(network, optimizer.parameters, distribution)

    def accuracy() -> float:
        with torch.no_grad():
            return (network(X).argmax(1) == LABELS).double().mean().item()

    before = accuracy()
    for _ in range(200):
        probe = optimizer.ask()
        right = [scratch.evaluate(p, lambda: scratch.module(X).argmax(1) == LABELS) for p in probe.points]
        optimizer.tell(probe.id, Scores(torch.stack(right).double()))
        optimizer.step()
    assert before < 0.8
    assert accuracy() > 0.9


@each_method
def test_a_judge_alone_is_enough(distribution: Distribution, update: UpdateName):
    w = torch.zeros(6)
    optimizer = MeZO([("w", w)], lr=0.03, epsilon=0.05, distribution=distribution, update=update, n_spsa=4)
    if update == "sgd":  # g is ±1/2ε then
        optimizer.param_groups[0]["lr"] = 0.003

    def error(point: Any) -> float:
        z = reference.sample(torch.arange(6), key(point.seed, "w"), distribution)
        return (w + point.offset * z - TRUTH).norm().item()

    for _ in range(300):
        probe = optimizer.ask()
        sides = [(2 * i, 2 * i + 1) for i in range(len(probe.seeds))]
        choices = [Choice.FIRST if error(probe.points[a]) < error(probe.points[b]) else Choice.SECOND for a, b in sides]
        optimizer.tell(probe.id, Verdicts(tuple(Verdict(a, b, 0, c) for (a, b), c in zip(sides, choices, strict=True))))
        optimizer.step()
    assert (w - TRUTH).norm() < 0.3 * TRUTH.norm()


@each_method
@pytest.mark.parametrize("closure", [False, True], ids=["ask and tell", "closure"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_was_interrupted_anywhere_continues_to_the_same_bits(
    tmp_path: Path, distribution: Distribution, update: UpdateName, closure: bool, dtype: torch.dtype
):
    def part(path: Path, stop: int) -> dict[str, Tensor]:
        """Starts the run, or continues it, to the given step."""
        network = model(dtype, hidden=3)
        optimizer = MeZO(
            network.named_parameters(),
            lr=0.01,
            distribution=distribution,
            update=update,
            n_spsa="1-3/8",
            trajectory=path,
        )
        scratch = Scratch(network, optimizer.parameters, distribution)

        def loss(module: nn.Module) -> float:
            """Coarse, so that some directions tie; in one step it abstains."""
            if optimizer.steps == 5:
                return math.nan
            return round(nn.functional.cross_entropy(module(X.to(dtype)).float(), LABELS).item(), 2)

        while optimizer.steps < stop:
            if closure:
                optimizer.step(lambda: loss(network))
            else:
                probe = optimizer.ask()
                losses = [scratch.evaluate(p, lambda: loss(scratch.module)) for p in probe.points]
                optimizer.tell(probe.id, Scores.of_losses(losses))
                if optimizer.steps == 7 == stop:
                    break  # told, and not applied
                optimizer.step()
        optimizer.close()
        assert optimizer.abstained == (optimizer.directions.at(5) if stop > 5 else 0)
        return state(network)

    def run(path: Path, stops: list[int]) -> dict[str, Tensor]:
        return [part(path, stop) for stop in stops][-1]

    straight = run(tmp_path / "straight", [12])
    assert equal(run(tmp_path / "broken", [1, 2, 7, 12]), straight)
    assert (tmp_path / "broken").read_bytes() == (tmp_path / "straight").read_bytes()
    assert not equal(straight, state(model(dtype, hidden=3)))


@each_method
def test_the_order_of_parameters_is_irrelevant(distribution: Distribution, update: UpdateName):
    ends = []
    for order in (1, -1):
        network = model()
        named = list(network.named_parameters())[::order]
        optimizer = MeZO(named, lr=0.01, distribution=distribution, update=update)
        for _ in range(3):
            optimizer.step(lambda network=network: nn.functional.cross_entropy(network(X), LABELS))
        ends.append(state(network))
    assert equal(*ends)


@each_method
def test_equal_shaped_tensors_get_different_directions(distribution: Distribution, update: UpdateName):
    a, b = torch.zeros(50), torch.zeros(50)
    optimizer = MeZO([("a", a), ("b", b)], lr=0.1, epsilon=0.1, distribution=distribution, update=update)
    optimizer.step(lambda: a.sum() + b.sum() * 2)
    assert a.any()
    assert not torch.equal(a, b)
    assert not torch.equal(a, -b)


@each_method
def test_seed_zero_is_a_seed_like_any_other(distribution: Distribution, update: UpdateName):
    ends = []
    for seed in (0, 0, 1, (1 << 63) - 1):
        w = torch.ones(20)
        optimizer = MeZO([("w", w)], lr=0.1, distribution=distribution, update=update, seed=seed)
        optimizer.step(w.sum)
        ends.append(w)
    assert torch.equal(ends[0], ends[1])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(ends[1:], 2))


@each_method
@pytest.mark.parametrize("losses", [[1.0, 1.0], [math.nan, math.nan], [math.nan, 1.0]])
def test_ties_and_nan_never_divide_by_zero_nor_move_anything(
    distribution: Distribution, update: UpdateName, losses: list[float]
):
    w = torch.linspace(-1, 1, 10)
    before = w.clone()
    optimizer = MeZO([("w", w)], lr=0.1, distribution=distribution, update=update, n_spsa=2)
    for _ in range(3):
        probe = optimizer.ask()
        record = optimizer.tell(probe.id, Scores.of_losses(losses * 2))
        optimizer.step()
        assert record.coefficients == (0.0, 0.0)
    assert torch.equal(w, before)
    tied = losses[0] == losses[1]
    assert (optimizer.tied, optimizer.abstained, optimizer.informative) == ((6, 0, 0) if tied else (0, 6, 0))
    assert optimizer.informative_share == 0.0 if tied else math.isnan(optimizer.informative_share)
    projected = answer(optimizer, lambda p: p.offset)
    assert all(math.isfinite(g) and g > 0 for g in projected)
    assert not torch.equal(w, before)


@each_method
def test_the_scheduler_of_torch_sets_the_size_of_the_steps(distribution: Distribution, update: UpdateName):
    def coefficients(schedule: Callable[[MeZO], Any]) -> list[float]:
        optimizer = MeZO([("w", torch.zeros(4))], lr=0.5, epsilon=0.5, distribution=distribution, update=update)
        scheduler, found = schedule(optimizer), []
        for _ in range(4):
            probe = optimizer.ask()
            found += optimizer.tell(probe.id, Scores.of_losses([1.0, 0.0])).coefficients
            optimizer.step()
            scheduler.step()
        return found

    schedulers = torch.optim.lr_scheduler
    assert coefficients(lambda o: schedulers.LambdaLR(o, lambda step: 2.0**-step)) == [-0.5, -0.25, -0.125, -0.0625]
    assert coefficients(lambda o: schedulers.StepLR(o, 2, gamma=0.5)) == [-0.5, -0.5, -0.25, -0.25]
    warm = coefficients(lambda o: schedulers.LinearLR(o, 0.25, total_iters=3))
    assert warm == [-0.125, -0.25, -0.375, -0.5]


@each_method
@pytest.mark.parametrize(("dtype", "lr"), [(torch.bfloat16, 1e-4), (torch.float16, 2e-5)])
def test_half_precision_learns_from_updates_far_below_its_spacing(
    distribution: Distribution, update: UpdateName, dtype: torch.dtype, lr: float
):
    """At |w| = 0.5 numbers are 2e-3 (bfloat16) and 2e-4 (float16) apart: rounding to nearest would move nothing."""
    w = torch.full((4000,), 0.5, dtype=dtype)
    optimizer = MeZO([("w", w)], lr=lr, epsilon=0.01, distribution=distribution, update=update)
    slope = 1.0 / math.sqrt(len(w))  # so that |g| is about 1
    direction = slope * torch.sign(torch.arange(len(w)) % 2 - 0.5)

    def along() -> float:
        return (w.double() @ direction.double()).item()

    start, expected = along(), 0.0
    for _ in range(150):
        probe = optimizer.ask()
        z = reference.sample(torch.arange(len(w)), key(probe.seeds[0], "w"), distribution).double()
        g = (z @ direction.double()).item()
        record = optimizer.tell(probe.id, Scores.of_losses([g * p.offset for p in probe.points]))
        optimizer.step()
        expected += record.coefficients[0] * g
    spacing = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    noise = math.sqrt(150 * lr * spacing)  # of stochastic rounding, along a unit vector
    assert expected < -10 * lr
    assert along() - start == pytest.approx(expected, abs=5 * noise)
    assert not torch.equal(w, torch.full_like(w, 0.5))


# --- the mathematics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_second_moment_of_the_estimate_follows_lemma_2(n: int):
    """E‖ĝ‖² = (d+n−1)/n · ‖∇L‖² (Malladi et al. 2023, Lemma 2), ĝ = Σ g z/n, for ‖z‖² = d: of ±1 directions exactly.

    ‖ĝ‖² has n terms (z·∇L)²‖z‖²/n², each of mean d‖∇L‖²/n², and n(n−1) cross terms of mean ‖∇L‖²/n².
    """
    d, steps = 12, 3000
    gradient = torch.linspace(-1.0, 1.0, d, dtype=torch.float64)
    optimizer = MeZO([("w", torch.zeros(d))], lr=1e-6, epsilon=2.0**-6, n_spsa=n)
    squares = []
    for _ in range(steps):
        probe = optimizer.ask()
        z = torch.stack(
            [reference.sample(torch.arange(d), key(seed, "w"), "rademacher") for seed in probe.seeds]
        ).double()
        losses = [(gradient @ z[i // 2]).item() * p.offset for i, p in enumerate(probe.points)]
        record = optimizer.tell(probe.id, Scores.of_losses(losses))
        optimizer.step()
        estimate = torch.tensor(record.projected, dtype=torch.float64) @ z / n
        squares.append(estimate.square().sum().item())
        assert z.square().sum(1).tolist() == [d] * n
    found = torch.tensor(squares)
    expected = (d + n - 1) / n * gradient.square().sum().item()
    # bfloat16 rounds each g by at most 2⁻⁹ of it.
    assert found.mean().item() == pytest.approx(
        expected, abs=5 * found.std().item() / math.sqrt(steps) + 0.005 * expected
    )


def test_a_step_descends_a_quadratic_as_the_theory_says():
    """E[θ′] = θ − lr·∇f: the mean of many first steps is a gradient step."""
    target, total = torch.tensor([1.0, -0.5, 0.25]), torch.zeros(3, dtype=torch.float64)
    for seed in range(2000):
        w = torch.zeros(3)
        optimizer = MeZO([("w", w)], lr=0.125, epsilon=0.125, seed=seed)
        answer(optimizer, lambda p, w=w: _quadratic(p, w, target))
        total += w.double()
    torch.testing.assert_close(total / 2000, 0.125 * 2 * target.double(), rtol=0, atol=0.05)


def _quadratic(point: Any, w: Tensor, target: Tensor) -> float:
    z = reference.sample(torch.arange(3), key(point.seed, "w"), "rademacher")
    return (w + point.offset * z - target).square().sum().item()


# --- ask, tell, step --------------------------------------------------------------------------------------------------------


def test_asking_again_asks_the_same_directions_under_a_new_number():
    optimizer = MeZO([("w", torch.zeros(3))], n_spsa=2)
    first, second = optimizer.ask(), optimizer.ask()
    assert (second.id, second.points) == (first.id + 1, first.points)
    with pytest.raises(ValueError, match="probe 0 is not open; probe 1 is"):
        optimizer.tell(first.id, Scores(torch.zeros(4, 1)))
    optimizer.tell(second.id, Scores(torch.zeros(4, 1)))
    optimizer.step()
    assert not set(optimizer.ask().seeds) & set(first.seeds)


@pytest.mark.parametrize("answers", [[0.0, 1.0], torch.zeros(2, 1), None])
def test_numbers_that_do_not_say_whether_higher_is_better_are_refused(answers: Any):
    optimizer = MeZO([("w", torch.zeros(3))])
    probe = optimizer.ask()
    with pytest.raises(
        TypeError, match=f"tell takes Scores, Verdicts or Slopes .*, got {type(answers).__name__}: .*higher"
    ):
        optimizer.tell(probe.id, answers)
    optimizer.tell(probe.id, Scores(torch.zeros(2, 1)))  # it is open still


def test_telling_twice_or_before_the_last_step_is_refused():
    optimizer = MeZO([("w", torch.zeros(3))])
    with pytest.raises(ValueError, match="probe 0 is not open"):
        optimizer.tell(0, Scores(torch.zeros(2, 1)))
    probe = optimizer.ask()
    optimizer.tell(probe.id, Scores(torch.tensor([[0.0], [1.0]])))
    with pytest.raises(ValueError, match="probe 0 is not open"):
        optimizer.tell(probe.id, Scores(torch.zeros(2, 1)))
    again = optimizer.ask()
    with pytest.raises(ValueError, match="told but not applied: call step"):
        optimizer.tell(again.id, Scores(torch.zeros(2, 1)))
    optimizer.step()
    optimizer.tell(again.id, Scores(torch.zeros(2, 1)))


def test_answers_of_another_probe_leave_it_open():
    optimizer = MeZO([("w", torch.zeros(3))])
    probe = optimizer.ask()
    with pytest.raises(ValueError, match="expected scores of 2 points, got 4"):
        optimizer.tell(probe.id, Scores(torch.zeros(4, 1)))
    assert optimizer.steps == 0
    optimizer.tell(probe.id, Scores(torch.zeros(2, 1)))
    assert optimizer.steps == 1


# three votes for the plus side, a tie, and one without an opinion: 3.5 votes to 0.5
@pytest.mark.parametrize(
    ("comparison", "projected"), [("share", -0.75), ("logit", -math.log((3.5 + 0.5) / (0.5 + 0.5))), ("sign", -1.0)]
)
def test_what_verdicts_say_is_a_choice(comparison: str, projected: float):
    optimizer = MeZO([("w", torch.zeros(3))], epsilon=0.5, comparison=comparison)
    choices = (*[Choice.FIRST] * 3, Choice.TIE, Choice.ABSTAIN)
    verdicts = Verdicts(tuple(Verdict(0, 1, i, choice) for i, choice in enumerate(choices)))
    assert optimizer.tell(optimizer.ask().id, verdicts).projected == (bfloat16(projected),)


def test_a_probe_asked_ahead_looks_along_its_own_steps_directions():
    optimizer = MeZO([("w", torch.zeros(3))], lr=0.5, epsilon=0.5)
    now, ahead = optimizer.ask(), optimizer.ask(ahead=1)
    assert (ahead.step, ahead.made_at) == (1, 0)
    with pytest.raises(ValueError, match="probe 1 is for step 1: tell the answers for step 0 first"):
        optimizer.tell(ahead.id, Scores(torch.zeros(2, 1)))
    optimizer.tell(now.id, Scores.of_losses([1.0, 0.0]))
    optimizer.step()
    assert optimizer.ask().seeds == ahead.seeds, "asked late or ahead, a step's directions are the same"
    with pytest.raises(ValueError, match="ahead must be at least 0, got -1"):
        optimizer.ask(ahead=-1)


def test_a_probe_of_an_earlier_process_is_told_as_if_it_had_been_asked_here():
    first, second = (MeZO([("w", w)], lr=0.5, epsilon=0.5) for w in (torch.zeros(3), torch.zeros(3)))
    second.ask(), second.ask(ahead=1)
    probe = first.ask()
    again = second.reopen(probe)
    answers = Scores.of_losses([1.0, 0.0])
    assert first.tell(probe.id, answers) == second.tell(again.id, answers)
    with pytest.raises(ValueError, match="is of step 0, and 1 steps have been told already"):
        second.reopen(probe)
    with pytest.raises(ValueError, match="looks along other directions than step 0"):
        MeZO([("w", torch.zeros(3))], seed=1).reopen(probe)


def test_theta_moves_in_step_and_not_before():
    w = torch.zeros(3)
    optimizer = MeZO([("w", w)], lr=0.5, epsilon=0.5)
    probe = optimizer.ask()
    optimizer.tell(probe.id, Scores.of_losses([1.0, 0.0]))
    assert not w.any()
    optimizer.step()
    z = reference.sample(torch.arange(3), key(probe.seeds[0], "w"), "rademacher")
    assert torch.equal(w, -0.5 * z)
    optimizer.step()
    assert torch.equal(w, -0.5 * z), "a step without an answer moves nothing"


def test_the_closure_is_called_at_both_sides_without_gradients():
    w = torch.zeros(5, requires_grad=True)
    seen: list[tuple[Tensor, bool]] = []

    def closure() -> Tensor:
        seen.append((w.detach().clone(), torch.is_grad_enabled()))
        return (w * 2).sum()

    optimizer = MeZO([("w", w)], lr=0.1, epsilon=2.0**-6, n_spsa=2)
    loss = optimizer.step(closure)
    assert [grad for _, grad in seen] == [False] * 4
    assert all(torch.equal(plus, -minus) for (plus, _), (minus, _) in (seen[:2], seen[2:]))
    assert seen[0][0].abs().tolist() == [2.0**-6] * 5
    assert loss == pytest.approx(0.0, abs=1e-6)
    assert w.grad is None


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_an_infinite_loss_is_refused_and_leaves_theta(bad: float):
    w = torch.linspace(-1, 1, 7)
    optimizer = MeZO([("w", w)], lr=0.1)
    optimizer.step(lambda: w.sum())
    before = w.clone()
    with pytest.raises(ValueError, match="an infinite loss cannot be compared; return NaN to abstain"):
        optimizer.step(lambda: bad)
    assert torch.equal(w, before)
    assert optimizer.steps == 1


@pytest.mark.parametrize("scores", [[1e38, -1e38], [-3e38, 3e38]])
def test_answers_too_large_for_a_step_are_refused_and_nothing_is_logged(tmp_path: Path, scores: list[float]):
    module = model()
    before = state(module)
    optimizer = MeZO(module.named_parameters(), 0.1, 1e-3, trajectory=tmp_path / "t.zorl")
    with pytest.raises(ValueError, match="answers this large make no step"):
        optimizer.tell(optimizer.ask().id, Scores(torch.tensor(scores)[:, None]))
    assert optimizer.steps == 0
    optimizer.tell(optimizer.ask().id, Scores(torch.tensor([[1.0], [0.0]])))
    optimizer.step()
    optimizer.close()
    assert len(read(tmp_path / "t.zorl")[1]) == 1
    assert not equal(before, state(module))


def test_a_coefficient_that_is_not_finite_is_refused():
    optimizer = MeZO(model().named_parameters(), 1e38, 1e-3, update="sgd")
    with pytest.raises(ValueError, match="lower the learning rate"):
        optimizer.tell(optimizer.ask().id, Scores(torch.tensor([[1.0], [0.0]])))


def test_a_state_dict_does_not_stand_for_the_steps_that_were_made():
    module = model()
    optimizer = MeZO(module.named_parameters(), lr=1e-3, epsilon=1e-2)
    fresh = optimizer.state_dict()
    optimizer.load_state_dict(fresh)  # as accelerate does, to move it to a device
    optimizer.step(lambda: 0.5)
    with pytest.raises(ValueError, match=r"of step 1, and the optimizer is at step 0: .* Give MeZO\(…, trajectory="):
        MeZO(module.named_parameters(), lr=1e-3, epsilon=1e-2).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="of step None"):
        optimizer.load_state_dict(torch.optim.SGD(module.parameters(), lr=1.0).state_dict())


def test_a_closure_cannot_continue_a_run_of_ask_and_tell():
    optimizer = MeZO([("w", torch.zeros(3))])
    answer(optimizer, lambda p: p.offset)
    with pytest.raises(ValueError, match="began with ask and tell"):
        optimizer.step(lambda: 0.0)


def test_what_was_spent_and_found_is_counted():
    optimizer = MeZO([("w", torch.zeros(3))], n_spsa=4)
    probe = optimizer.ask()
    optimizer.tell(probe.id, Scores.of_losses([1.0, 2.0, 1.0, 1.0, math.nan, 1.0, 3.0, 1.0]))
    assert (optimizer.forwards, optimizer.informative, optimizer.tied, optimizer.abstained) == (8, 2, 1, 1)
    assert optimizer.informative_share == optimizer.recent_informative_share == pytest.approx(2 / 3)


# --- ε ----------------------------------------------------------------------------------------------------------------------


def test_automatic_epsilon_rises_on_ties_not_on_abstentions_and_is_capped():
    optimizer = MeZO([("w", torch.zeros(3))])
    start = optimizer.ask().epsilon
    for _ in range(3):
        answer(optimizer, lambda p: math.nan)
    assert optimizer.ask().epsilon == start
    answer(optimizer, lambda p: 1.0)
    assert optimizer.ask().epsilon > start
    for _ in range(200):
        answer(optimizer, lambda p: 1.0)
    top = optimizer.ask()
    assert top.epsilon == pytest.approx(16 * start)
    assert all(abs(point.offset) == top.epsilon for point in top.points)
    for _ in range(5):
        answer(optimizer, lambda p: p.offset)
    assert optimizer.ask().epsilon < top.epsilon


def test_automatic_epsilon_leaves_a_plateau_that_a_fixed_one_does_not():
    """The reward is 1 beyond a distance and 0 within: at ε = 5e-3 nothing is ever seen."""

    def cliff(w: Tensor) -> float:
        return 0.0 if w.sum() < 0.05 * 16 * 0.5 else -1.0

    for epsilon, escapes in ((5e-3, False), ("auto", True)):
        w = torch.zeros(16)
        optimizer = MeZO([("w", w)], lr=0.02, epsilon=epsilon, update="normalized")
        for _ in range(60):
            optimizer.step(lambda w=w: cliff(w))
        assert bool(w.any()) == escapes
        assert (optimizer.informative > 0) == escapes


def test_the_largest_epsilon_is_within_the_reach_of_the_grid():
    w = torch.linspace(-1, 1, 30)
    optimizer = MeZO([("w", w)])
    for _ in range(100):
        optimizer.step(lambda: 1.0)
    assert optimizer.ask().epsilon == pytest.approx(16 * 5e-3)


# --- parameters -------------------------------------------------------------------------------------------------------------


def test_a_wrapped_model_takes_the_same_steps():
    ends = []
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod."):
        network = model()
        named = [(prefix + name, p) for name, p in network.named_parameters()]
        optimizer = MeZO(named, lr=0.01)
        optimizer.step(lambda network=network: nn.functional.cross_entropy(network(X), LABELS))
        ends.append(state(network))
    assert all(equal(ends[0], end) for end in ends[1:])


def test_tied_weights_move_once():
    network = nn.Module()
    network.a = nn.Linear(3, 3, bias=False)
    network.b = nn.Linear(3, 3, bias=False)
    network.b.weight = network.a.weight
    before = network.a.weight.detach().clone()
    named = [("b.weight", network.b.weight), ("a.weight", network.a.weight)]
    optimizer = MeZO(named, lr=0.5, epsilon=0.5)
    answer(optimizer, lambda p: p.offset)
    assert list(optimizer.parameters) == ["b.weight"]
    torch.testing.assert_close((network.a.weight - before).abs(), torch.full((3, 3), 0.5))


def test_a_parameter_that_is_not_contiguous_is_tuned_in_place():
    whole = torch.zeros(6, 6)
    optimizer = MeZO([("w", whole.T[1:4])], lr=0.5, epsilon=0.5)
    optimizer.step(lambda: whole.sum())
    assert whole[:, 1:4].all()
    assert not whole[:, 0].any()
    assert not whole[:, 4:].any()


def test_frozen_parameters_are_left_alone():
    network = model()
    network[0].requires_grad_(False)
    before = state(network)
    optimizer = MeZO(network.named_parameters(), lr=0.1)
    optimizer.step(lambda: nn.functional.cross_entropy(network(X), LABELS))
    changed = {name for name, tensor in state(network).items() if not torch.equal(tensor, before[name])}
    assert changed == {"2.weight", "2.bias", "3.weight", "3.bias"}


def test_it_is_an_optimizer_of_torch():
    network = model()
    optimizer = MeZO(network.named_parameters(), lr=0.1)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in network.parameters()}
    optimizer.zero_grad()


# --- bad input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be a positive number, got 0.0"),
        ({"lr": -1.0}, "lr must be a positive number, got -1.0"),
        ({"lr": math.nan}, "lr must be a positive number, got nan"),
        ({"lr": math.inf}, "lr must be a positive number, got inf"),
        ({"epsilon": 0.0}, "epsilon must be a positive number or 'auto', got 0.0"),
        ({"epsilon": -1e-3}, "epsilon must be a positive number or 'auto', got -0.001"),
        ({"epsilon": "large"}, "epsilon must be a positive number or 'auto', got 'large'"),
        ({"n_spsa": 0}, "n_spsa needs at least one direction"),
        ({"n_spsa": "many"}, "n_spsa must be a number such as 4"),
        ({"distribution": "uniform"}, "distribution='uniform'; choose one of 'rademacher', 'gaussian'"),
        ({"update": "rmsprop"}, "update='rmsprop' is not an update rule"),
        ({"beta1": 1.0}, "beta1 must be at least 0 and below 1, got 1.0"),
        ({"update": "adam", "beta2": -0.1}, "beta2 must be at least 0 and below 1"),
        ({"moment_window": 0}, "moment_window must be at least 1, got 0"),
        ({"moments": "kept"}, "moments='kept'; choose 'recomputed' or 'stored'"),
        ({"seed": -1}, "seed must be in 0"),
        ({"seed": 1 << 63}, "seed must be in 0"),
        ({"informative_target": 1.0}, "informative_target must be between 0 and 1"),
    ],
)
def test_an_argument_out_of_range_is_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MeZO([("w", torch.zeros(2))], **options)


def test_parameters_without_names_are_refused():
    with pytest.raises(ValueError, match=r"pass model\.named_parameters\(\), not model\.parameters\(\)"):
        MeZO(model().parameters())  # type: ignore[arg-type]


def test_no_parameters_are_refused():
    with pytest.raises(ValueError, match="there are no parameters to tune"):
        MeZO([])
    with pytest.raises(ValueError, match="there are no parameters to tune"):
        MeZO(model().requires_grad_(False).named_parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_parameter_that_is_not_finite_is_named(bad: float):
    w = torch.zeros(5)
    w[2:4] = bad
    with pytest.raises(ValueError, match="parameter 'layer.w' holds 2 NaN or infinite values of 5"):
        MeZO([("v", torch.zeros(2)), ("layer.w", w)])


def test_a_dtype_that_cannot_be_tuned_is_named():
    with pytest.raises(TypeError, match=r"float32, bfloat16 and float16 parameters, not torch\.float64"):
        MeZO([("w", torch.zeros(5, dtype=torch.float64))])


def test_epsilon_below_what_half_precision_can_show_is_refused():
    with pytest.raises(ValueError, match=r"epsilon=0\.0001 is below 0\.001, under which torch\.bfloat16"):
        MeZO([("w", torch.zeros(5, dtype=torch.bfloat16))], epsilon=1e-4)
    assert ParameterSet([("w", torch.zeros(5))]).dtypes == {torch.float32}


# --- one point --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "rank1"])
def test_one_forward_a_step_descends_a_quadratic(distribution: Distribution):
    w = torch.zeros(6)
    optimizer = MeZO([("w", w)], lr=0.01, epsilon=0.3, distribution=distribution, estimator="one_point", seed=2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    for _ in range(800):
        optimizer.step(lambda: (w - TRUTH).square().sum())
        schedule.step()
    assert optimizer.forwards == 800
    assert (w - TRUTH).square().sum() < 0.1 * TRUTH.square().sum()


@pytest.mark.parametrize("closure", [False, True], ids=["ask and tell", "closure"])
@pytest.mark.parametrize("n_spsa", [1, "1-3/4"])
def test_a_run_of_single_points_continues_to_the_same_bits(tmp_path: Path, closure: bool, n_spsa: int | str):
    def run(path: Path, stops: list[int]) -> Tensor:
        for stop in stops:
            w = torch.linspace(-1, 1, 40)
            optimizer = MeZO([("w", w)], lr=1e-3, epsilon=0.1, n_spsa=n_spsa, estimator="one_point", trajectory=path)
            while optimizer.steps < stop:
                step = optimizer.steps

                def loss(theta: Tensor, step: int = step) -> float:
                    return math.nan if step == 5 else (theta.double() - step / 70).square().mean().item()

                if closure:
                    optimizer.step(lambda w=w, loss=loss: loss(w))
                else:
                    answer(optimizer, lambda p, w=w, loss=loss: loss(_at(w, p)))
            optimizer.close()
        return w

    straight = run(tmp_path / "straight", [20])
    assert torch.equal(run(tmp_path / "broken", [1, 2, 6, 7, 20]), straight)
    assert (tmp_path / "broken").read_bytes() == (tmp_path / "straight").read_bytes()
    w = torch.linspace(-1, 1, 40)
    replay(*read(tmp_path / "straight"), ParameterSet([("w", w)]))
    assert torch.equal(w, straight)


def _at(w: Tensor, point: Any) -> Tensor:
    return w + point.offset * reference.sample(torch.arange(w.numel()), key(point.seed, "w"), "rademacher")


def test_another_estimator_does_not_go_on_with_a_log(tmp_path: Path):
    for first, then in (("one_point", "spsa"), ("spsa", "one_point")):
        path = tmp_path / first
        optimizer = MeZO([("w", torch.ones(4))], estimator=first, trajectory=path)  # type: ignore[arg-type]
        optimizer.step(lambda: 1.0)
        optimizer.close()
        with pytest.raises(ValueError, match=f"estimator was {first!r}, is now {then!r}"):
            MeZO([("w", torch.ones(4))], estimator=then, trajectory=path)  # type: ignore[arg-type]


def test_the_optimizer_alone_loads_no_language_model_library() -> None:
    """They take seconds, and load quantisers that warn of kernels that nothing here needs."""
    slow = {"transformers", "datasets", "peft", "trl", "torchao", "bitsandbytes", "sklearn"}
    code = f"import sys; from zorl import MeZO; print({slow} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")
