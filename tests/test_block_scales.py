"""SPSA in scaled blocks: where it looks, where it goes, and what its mean is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zorl.block_scales import LARGEST, normalized, parameter_norms
from zorl.directions import Distribution, key
from zorl.estimators import EstimatorName
from zorl.kernels import reference
from zorl.mezo import MeZO
from zorl.parameters import ParameterSet
from zorl.perturbation import Scratch
from zorl.probe import Point, Scores
from zorl.replay import replay
from zorl.trajectory import read
from zorl.twin import Twin
from zorl.updates import bfloat16

ESTIMATORS: tuple[EstimatorName, ...] = ("variance_spsa", "expectation_spsa")
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)
each_kind = pytest.mark.parametrize("kind", ["parameter_norms", "gradient_norms"])
X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
LABELS = (X @ torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5, -1.0]) > 0).long()


def blocks() -> dict[str, Tensor]:
    return {"a": torch.full((4, 4), 2.0), "b": torch.full((16,), 0.25), "c": torch.zeros(3)}


def test_scales_are_one_in_the_geometric_mean_over_elements():
    parameters = ParameterSet(blocks().items())
    scales = normalized({"a": 8.0, "b": 0.5, "c": math.nan}, parameters)
    assert scales == {"a": 4.0, "b": 0.25, "c": 1.0}, "what was not measured is left as it is"
    assert normalized({"a": 8.0, "b": 0.5, "c": 0.0}, parameters)["c"] == 1 / LARGEST
    assert normalized({"a": 0.0, "b": math.nan, "c": 0.0}, parameters) == {"a": 1.0, "b": 1.0, "c": 1.0}
    wide = normalized({"a": 1e9, "b": 1e-9, "c": 3.0}, parameters)
    assert (wide["a"], wide["b"]) == (LARGEST, 1 / LARGEST)
    assert all(scale == bfloat16(scale) for scale in normalized({"a": 3.0, "b": 0.7, "c": 1.1}, parameters).values())


def test_parameter_norms_are_the_norms():
    assert parameter_norms(ParameterSet(blocks().items())) == {
        "a": bfloat16(8**0.5),
        "b": bfloat16(8**-0.5),
        "c": 1 / LARGEST,
    }


def at(tensors: Mapping[str, Tensor], point: Point, distribution: Distribution = "rademacher") -> dict[str, Tensor]:
    out = {}
    for name, tensor in tensors.items():
        width = tensor.shape[1] if tensor.ndim > 1 else 0
        z = reference.sample(torch.arange(tensor.numel()), key(point.seed, name), distribution, width)
        out[name] = tensor.double() + point.offset_of(name) * z.view(tensor.shape).double()
    return out


@each_estimator
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "rank1"])
def test_the_mean_of_the_estimate_is_what_the_paper_says(estimator: EstimatorName, distribution: Distribution):
    """On a linear function: ∇L with the variance modified, diag(d)⁻¹∇L with the expectation modified."""
    gradient = {"a": torch.linspace(-1, 1, 16).view(4, 4).double(), "b": torch.linspace(2, -1, 16).double()}
    n, total = 800, {name: torch.zeros_like(g) for name, g in gradient.items()}
    theta = {name: tensor for name, tensor in blocks().items() if name in gradient}
    optimizer = MeZO(
        theta.items(), lr=2.0**-40, epsilon=2.0**-4, estimator=estimator, distribution=distribution, n_spsa=n
    )
    scales = parameter_norms(optimizer.parameters)
    probe = optimizer.ask()
    losses = [sum((gradient[k] * v).sum() for k, v in at(theta, p, distribution).items()) for p in probe.points]
    for seed, g in zip(probe.seeds, optimizer.tell(probe.id, Scores.of_losses(losses)).projected, strict=True):
        for name, z in at({k: torch.zeros_like(v) for k, v in theta.items()}, Point(seed, 1.0), distribution).items():
            total[name] += g * (scales[name] if estimator == "variance_spsa" else 1.0) * z / n
    for name, mean in total.items():
        expected = gradient[name] if estimator == "variance_spsa" else gradient[name] / scales[name]
        spread = math.sqrt(sum((gradient[k] / scales[k]).square().sum().item() for k in gradient) * 2 / n)
        bound = 5 * spread * (scales[name] if estimator == "variance_spsa" else 1.0)
        assert ((mean - expected).abs() < bound).all(), name


@each_estimator
@pytest.mark.parametrize("closure", [False, True])
def test_theta_moves_along_scaled_directions(estimator: EstimatorName, closure: bool):
    theta = blocks()
    optimizer = MeZO(theta.items(), lr=2.0**-6, epsilon=2.0**-6, estimator=estimator)
    scales = parameter_norms(optimizer.parameters)
    before = {name: tensor.clone() for name, tensor in theta.items()}
    if closure:
        optimizer.step(lambda: sum(tensor.sum() for tensor in theta.values()))
    else:
        probe = optimizer.ask()
        optimizer.tell(probe.id, Scores.of_losses([sum(t.sum() for t in at(theta, p).values()) for p in probe.points]))
        optimizer.step()
    moved = {name: (theta[name] - before[name]).abs().max().item() for name in theta}
    d = scales if estimator == "variance_spsa" else dict.fromkeys(scales, 1.0)
    assert moved["a"] > 0
    assert moved["a"] / moved["b"] == pytest.approx(d["a"] / d["b"], rel=1e-3)
    assert moved["c"] / moved["b"] == pytest.approx(d["c"] / d["b"], rel=1e-3)


def test_gradient_norms_are_measured_in_a_step_that_moves_nothing():
    theta = blocks()
    optimizer = MeZO(
        theta.items(), epsilon=2.0**-6, estimator="variance_spsa", block_scales="gradient_norms", block_scales_every=3
    )
    before = {name: tensor.clone() for name, tensor in theta.items()}
    probe = optimizer.ask()
    assert len(probe.seeds) == 3
    for name, points in zip("abc", zip(probe.points[0::2], probe.points[1::2], strict=True), strict=True):
        for point in points:
            assert [point.offset_of(other) != 0.0 for other in "abc"] == [other == name for other in "abc"]
    record = optimizer.tell(probe.id, Scores.of_losses([8.0, 0.0, -0.5, 0.0, 0.0, 0.0]))
    optimizer.step()
    assert record.coefficients == (0.0, 0.0, 0.0)
    assert all(torch.equal(theta[name], before[name]) for name in theta)
    assert math.isnan(optimizer.informative_share)
    assert optimizer.forwards == 6
    probe = optimizer.ask()
    assert [len(probe.points), probe.points[0].offset_of("a"), probe.points[0].offset_of("b")] == [2, 2.0**-8, 2.0**-4]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2))


def tuned(steps: int, *, closure: bool = False, **options: Any) -> tuple[dict[str, Tensor], float]:
    model = network()
    optimizer = MeZO(model.named_parameters(), epsilon=1e-2, **{"lr": 0.05, **options})
    scratch = Scratch(model, optimizer.parameters, optimizer.distribution)

    def loss(module: nn.Module) -> float:
        with torch.no_grad():
            return nn.functional.cross_entropy(module(X), LABELS).item()

    while optimizer.steps < steps:
        if closure:
            optimizer.step(lambda: loss(model))
            continue
        probe = optimizer.ask()
        losses = [scratch.evaluate(p, lambda: loss(scratch.module)) for p in probe.points]
        optimizer.tell(probe.id, Scores.of_losses(losses))
        optimizer.step()
    optimizer.close()
    return {name: p.detach().clone() for name, p in model.named_parameters()}, loss(model)


@each_estimator
@each_kind
@pytest.mark.parametrize("update", ["normalized", "momentum", "adam"])
@pytest.mark.parametrize("closure", [False, True], ids=["ask and tell", "closure"])
def test_a_run_continues_to_the_same_bits_and_is_replayed(
    tmp_path: Path, estimator: EstimatorName, kind: str, update: str, closure: bool
):
    options: dict[str, Any] = {
        "estimator": estimator, "block_scales": kind, "block_scales_every": 3, "update": update, "closure": closure,
        "moment_window": 4,
    }  # fmt: skip
    straight, _ = tuned(8, trajectory=tmp_path / "straight", **options)
    for stop in (1, 3, 4, 8):
        broken, _ = tuned(stop, trajectory=tmp_path / "broken", **options)
    assert all(torch.equal(broken[name], straight[name]) for name in straight)
    assert (tmp_path / "broken").read_bytes() == (tmp_path / "straight").read_bytes()
    model = network()
    replay(*read(tmp_path / "straight"), ParameterSet(model.named_parameters()))
    assert all(torch.equal(p, straight[name]) for name, p in model.named_parameters())


@each_estimator
@each_kind
def test_a_small_model_learns(estimator: EstimatorName, kind: str):
    _, first = tuned(0)
    _, last = tuned(150, estimator=estimator, block_scales=kind, block_scales_every=50, update="normalized", lr=0.02)
    assert last < 0.7 * first


@pytest.mark.parametrize("distribution", ["rank1", "rank4"])
def test_twin_and_scratch_agree_on_scaled_points(distribution: Distribution):
    model = network()
    parameters = ParameterSet(model.named_parameters())
    scales = {name: 1.0 / d for name, d in parameter_norms(parameters).items()}
    points = [Point(3, 0.1, scales), Point(3, -0.1, scales), Point(5, 0.1, {"0.weight": 1.0}), Point(5, 0.1)]
    scratch, twin = Scratch(model, parameters, distribution), Twin(model, parameters, distribution)
    one = [scratch.evaluate(p, lambda: scratch.module(X)) for p in points]
    other = twin.evaluate_all(points, lambda n: list(twin.module(X.repeat(n, 1)).chunk(n)))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one[2], one[3])


def test_what_scaled_blocks_cannot_do_is_said():
    optimizer = MeZO([("w", torch.ones(3))], estimator="variance_spsa", epsilon=0.1)
    with pytest.raises(ValueError, match="do not ask ahead"):
        optimizer.ask(ahead=1)
    optimizer.tell(optimizer.ask().id, Scores.of_losses([1.0, 0.0]))
    with pytest.raises(ValueError, match="apply what was told"):
        optimizer.ask()
    for options, message in (
        ({"block_scales": "sizes"}, "block_scales='sizes'; choose 'parameter_norms' or 'gradient_norms'"),
        ({"block_scales_every": 1}, "block_scales_every must be at least 2 steps, got 1"),
        ({"estimator": "two_point"}, "estimator='two_point'; choose one of 'spsa', 'one_sided', 'one_point'"),
    ):
        with pytest.raises(ValueError, match=message):
            MeZO([("w", torch.ones(3))], **options)  # type: ignore[arg-type]
