"""Momentum and Adam: averages that are recomputed from the log are those that others store."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zorl.directions import DISTRIBUTIONS, Distribution, derive_seed, key
from zorl.kernels import reference
from zorl.mezo import MeZO
from zorl.moments import Averaging, Keeping
from zorl.parameters import ParameterSet
from zorl.perturbation import Scratch
from zorl.probe import Scores
from zorl.replay import replay, steps_of
from zorl.trajectory import Record, read
from zorl.updates import UpdateName

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
TRUTH = torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5, -1.0])
LABELS = (X @ TRUTH > 0).long()
UPDATES: tuple[UpdateName, ...] = ("momentum", "adam")
KEEPING: tuple[Keeping, ...] = ("recomputed", "stored")
each_update = pytest.mark.parametrize("update", UPDATES)
each_keeping = pytest.mark.parametrize("moments", KEEPING)
each_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 2)).to(dtype)


def tuned(steps: int, *, dtype: torch.dtype = torch.float32, tied: bool = True, **options: Any) -> dict[str, Tensor]:
    """The weights of a small classifier after some steps, one of them tied and one abstained."""
    model = network(dtype)
    optimizer = MeZO(model.named_parameters(), epsilon=1e-2, **{"lr": 0.02, **options})
    scratch = Scratch(model, optimizer.parameters, optimizer.distribution)
    for _ in range(steps - optimizer.steps):
        probe = optimizer.ask()
        losses = [
            scratch.evaluate(p, lambda: nn.functional.cross_entropy(scratch.module(X.to(dtype)).float(), LABELS).item())
            for p in probe.points
        ]
        if tied and probe.step in (3, 4):
            losses = [1.0 if probe.step == 3 else math.nan] * len(losses)
        optimizer.tell(probe.id, Scores.of_losses(losses))
        optimizer.step()
    optimizer.close()
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@each_update
@each_distribution
@pytest.mark.parametrize("n_spsa", [1, 3])
def test_what_is_recomputed_is_what_is_stored(update: UpdateName, distribution: Distribution, n_spsa: int):
    options: dict[str, Any] = {"update": update, "distribution": distribution, "n_spsa": n_spsa, "beta1": 0.8}
    stored = tuned(12, moments="stored", **options)
    assert distance(stored, dict(network().named_parameters())) > 1e-2
    assert distance(tuned(12, moments="recomputed", moment_window=12, **options), stored) < 1e-5
    # A window leaves out what is older, and a longer one leaves out less.
    errors = [
        distance(tuned(12, moments="recomputed", moment_window=window, **options), stored) for window in (1, 5, 9)
    ]
    assert errors[0] > errors[1] > errors[2] > 1e-5


def truncated(path: Path, steps: int, window: int, **options: Any) -> tuple[float, list[Record], list[list[float]]]:
    """How far a window moves θ from that of stored averages by the same log: ‖Δθ‖, the records, and the ‖z‖ of each."""
    stored = tuned(steps, moments="stored", tied=False, trajectory=path, **options)
    header, records = read(path)
    model = network()
    parameters = ParameterSet(model.named_parameters())
    replay({**header, "moments": "recomputed", "moment_window": window}, records, parameters)
    squares = [(stored[name] - p.detach()).double().square().sum().item() for name, p in parameters.items()]
    lengths = []
    for s in range(steps):
        lengths.append([])
        for of_step in steps_of(header, records[s : s + 1], s):
            z = ParameterSet({name: torch.zeros_like(p) for name, p in stored.items()}.items())
            z.add([replace(of_step, coefficient=1.0)], header["distribution"])
            lengths[-1].append(math.sqrt(sum(p.double().square().sum().item() for _, p in z.items())))
    return math.sqrt(sum(squares)), records, lengths


@each_distribution
@pytest.mark.parametrize("n_spsa", [1, 3])
@pytest.mark.parametrize("window", [1, 8, 16])
def test_what_momentum_s_window_leaves_out_has_a_bound(
    tmp_path: Path, distribution: Distribution, n_spsa: int, window: int
):
    """β₁ʷ Σ lr |g|/m ‖z‖, which is at most ten times the error: near-orthogonal directions add up to less than their lengths."""
    steps, beta1, lr = 24, 0.8, 0.02
    options: dict[str, Any] = {"update": "momentum", "distribution": distribution, "n_spsa": n_spsa}
    error, records, lengths = truncated(tmp_path / "log", steps, window, beta1=beta1, lr=lr, **options)
    moved = [
        lr * sum(abs(g) * length for g, length in zip(record.projected, of, strict=True)) / n_spsa
        for record, of in zip(records, lengths, strict=True)
    ]
    bound = beta1**window * sum(moved[: steps - window])
    assert bound / 10 < error < bound


@pytest.mark.parametrize("distribution", ["rademacher", "rank1"])
@pytest.mark.parametrize("window", [4, 8, 16])
def test_what_adam_s_window_leaves_out_has_a_bound(tmp_path: Path, distribution: Distribution, window: int):
    """2q·lr·max ‖ĝ‖/√v̂ per step: at most fifty times the error, as all of what is left out could point the other way."""
    steps, beta1, beta2, lr = 24, 0.8, 0.95, 0.02
    options: dict[str, Any] = {"update": "adam", "distribution": distribution, "n_spsa": 1}
    error, records, lengths = truncated(tmp_path / "log", steps, window, beta1=beta1, beta2=beta2, lr=lr, **options)
    bound = v = largest = 0.0
    for t, record in enumerate(records, 1):
        (g,), (length,) = record.projected, lengths[t - 1]
        v = beta2 * v + (1.0 - beta2) * g * g
        largest = max(largest, abs(g) * length)
        share = max(0.0, beta1**window - beta1**t) / (1.0 - beta1**t)
        bound += 2.0 * share * lr * largest / math.sqrt(v / (1.0 - beta2**t))
    assert bound / 50 < error < bound


@each_distribution
@pytest.mark.parametrize("n_spsa", [1, 4])
@pytest.mark.parametrize("update", UPDATES)
def test_the_averages_are_those_of_the_formulas(update: UpdateName, distribution: Distribution, n_spsa: int):
    """Against the textbook in float64, with torch's own Adam for Adam."""
    w = torch.zeros(3, 8)
    target = torch.linspace(-1, 1, 24).view(3, 8)
    optimizer = MeZO(
        [("w", w)], lr=2.0**-5, epsilon=2.0**-6, update=update, n_spsa=n_spsa, distribution=distribution, beta1=0.75
    )
    expected = nn.Parameter(torch.zeros(3, 8, dtype=torch.float64))
    adam = torch.optim.Adam([expected], lr=2.0**-5, betas=(0.75, 0.95))
    m = torch.zeros(3, 8, dtype=torch.float64)
    for step in range(15):
        probe = optimizer.ask()
        z = [reference.sample(torch.arange(24), key(seed, "w"), distribution, 8).view(3, 8) for seed in probe.seeds]
        losses = [
            (w + p.offset * z[i // 2] - target).double().square().sum().item() for i, p in enumerate(probe.points)
        ]
        record = optimizer.tell(probe.id, Scores.of_losses(losses))
        optimizer.step()
        gradient = sum(g * of.double() for g, of in zip(record.projected, z, strict=True)) / n_spsa
        with torch.no_grad():
            if update == "adam":
                expected.grad = gradient
                adam.step()
            else:
                m = 0.75 * m + 0.25 * gradient
                expected -= 2.0**-5 * m
        torch.testing.assert_close(w.double(), expected.data, rtol=0, atol=1e-3 * (step + 1) * 2.0**-5 * 4)
    assert w.abs().max() > 0.05


@each_update
@each_keeping
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("closure", [False, True], ids=["ask and tell", "closure"])
def test_a_quadratic_is_descended(update: UpdateName, moments: Keeping, distribution: Distribution, closure: bool):
    w = torch.zeros(6)
    lr = 0.05
    optimizer = MeZO(
        [("w", w)],
        lr=lr,
        epsilon=1e-2,
        update=update,
        moments=moments,
        moment_window=32,
        distribution=distribution,
        n_spsa=2,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)

    def loss(theta: Tensor) -> float:
        return (X @ theta - X @ TRUTH).square().mean().item()

    first = loss(w)
    for _ in range(120):
        if closure:
            optimizer.step(lambda: loss(w))
        else:
            probe = optimizer.ask()
            sides = [
                loss(w + p.offset * reference.sample(torch.arange(6), key(p.seed, "w"), distribution))
                for p in probe.points
            ]
            optimizer.tell(probe.id, Scores.of_losses(sides))
            optimizer.step()
        schedule.step()
    assert loss(w) < first / 50


@each_update
@each_keeping
@pytest.mark.parametrize("n_spsa", [1, "1-3/6"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distribution", ["rank1", "gaussian"])
def test_a_run_that_was_interrupted_continues_to_the_same_bits_and_is_replayed(
    tmp_path: Path,
    update: UpdateName,
    moments: Keeping,
    n_spsa: int | str,
    dtype: torch.dtype,
    distribution: Distribution,
):
    options: dict[str, Any] = {
        "update": update, "moments": moments, "n_spsa": n_spsa, "distribution": distribution, "dtype": dtype,
        "moment_window": 4,
    }  # fmt: skip
    straight = tuned(10, trajectory=tmp_path / "straight", **options)
    for stop in (1, 4, 7, 10):
        broken = tuned(stop, trajectory=tmp_path / "broken", **options)
    assert equal(broken, straight)
    assert (tmp_path / "broken").read_bytes() == (tmp_path / "straight").read_bytes()
    for until in (6, 10):
        model = network(dtype)
        replay(*read(tmp_path / "straight", until), ParameterSet(model.named_parameters()))
        expected = tuned(until, **options) if until < 10 else straight
        assert equal({n: p.detach() for n, p in model.named_parameters()}, expected)


@each_update
@each_keeping
def test_a_closure_s_run_continues_to_the_same_bits(tmp_path: Path, update: UpdateName, moments: Keeping):
    def run(path: Path, stops: list[int]) -> Tensor:
        for stop in stops:
            w = torch.linspace(-1, 1, 40)
            optimizer = MeZO([("w", w)], lr=0.02, update=update, moments=moments, n_spsa=2, trajectory=path)
            while optimizer.steps < stop:
                optimizer.step(lambda w=w: (w - 0.5).square().sum())
            optimizer.close()
        return w

    straight = run(tmp_path / "straight", [9])
    assert torch.equal(run(tmp_path / "broken", [2, 5, 9]), straight)
    w = torch.linspace(-1, 1, 40)
    replay(*read(tmp_path / "straight"), ParameterSet([("w", w)]))
    assert torch.equal(w, straight)


@each_update
def test_momentum_goes_on_through_a_tie_and_waits_when_nobody_answers(update: UpdateName):
    w = torch.zeros(10)
    optimizer = MeZO([("w", w)], lr=0.1, epsilon=0.1, update=update)
    seen = []
    for losses in ([1.0, 0.0], [1.0, 1.0], [math.nan, 0.0]):
        optimizer.tell(optimizer.ask().id, Scores.of_losses(losses))
        optimizer.step()
        seen.append(w.clone())
    assert not torch.equal(seen[1], seen[0])
    assert torch.equal(seen[2], seen[1])


def test_the_second_moment_of_a_single_sign_is_a_number_that_no_window_cuts_short():
    options: dict[str, Any] = {"update": "adam", "beta1": 0.0, "tied": False}
    assert equal(tuned(12, moment_window=1, **options), tuned(12, moment_window=12, **options))
    # Of two directions the squares are elementwise, and the window tells.
    assert not equal(tuned(12, moment_window=1, n_spsa=2, **options), tuned(12, moment_window=12, n_spsa=2, **options))


def test_settings_that_decide_the_averages_must_be_those_of_the_log(tmp_path: Path):
    path = tmp_path / "log"
    tuned(2, update="adam", trajectory=path)
    with pytest.raises(ValueError, match=r"beta2 was 0.95, is now 0.9$"):
        tuned(3, update="adam", beta2=0.9, trajectory=path)
    with pytest.raises(ValueError, match="moments was 'recomputed', is now 'stored'"):
        tuned(3, update="adam", moments="stored", trajectory=path)
    tuned(2, update="sgd", trajectory=tmp_path / "sgd")
    tuned(3, update="sgd", beta2=0.9, trajectory=tmp_path / "sgd")  # says nothing to SGD


@pytest.mark.parametrize("shape", [(7,), (5, 9), ()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dense_change_keeps_its_mean_in_half_precision(shape: tuple[int, ...], dtype: torch.dtype):
    change = torch.full(shape, 1e-5)
    theta = torch.ones(shape, dtype=torch.float64)
    for seed in range(400):
        half = torch.full(shape, 0.1, dtype=dtype)
        before = half.double()
        reference.add_dense(half, change, key(derive_seed(seed, "w"), "w"))
        theta += half.double() - before
    spacing = 2.0 ** (-11 if dtype == torch.bfloat16 else -14)  # at 0.1
    bound = 5 * math.sqrt(400 * 1e-5 * spacing)
    assert ((theta - 1.0 - 400 * 1e-5).abs() < bound).all()


def test_a_dense_change_of_a_tensor_that_is_not_contiguous_arrives():
    theta = torch.zeros(3, 4).T
    reference.add_dense(theta, torch.arange(12.0).view(4, 3), key(0, "w"))
    assert torch.equal(theta, torch.arange(12.0).view(4, 3))


@pytest.mark.parametrize("setting", ["beta1", "beta2"])
@pytest.mark.parametrize("bad", [1.0, -0.5, math.nan])
def test_a_decay_out_of_range_is_named(setting: str, bad: float):
    make: Callable[..., Averaging] = Averaging
    with pytest.raises(ValueError, match=f"{setting} must be at least 0 and below 1"):
        make(**{setting: bad})
