"""Forward gradients: exact slopes, of language models too, and what has no slope is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zorl.config import MeZOConfig
from zorl.directions import DISTRIBUTIONS, Distribution, key
from zorl.forward_gradient import DirectionalDerivative, ForwardGradient
from zorl.kernels import reference
from zorl.label_loss import LabelLoss
from zorl.loss_objectives import CrossEntropy
from zorl.mezo import MeZO
from zorl.parameters import ParameterSet
from zorl.probe import CENTRE, Point, Scores, Slopes
from zorl.prompts import Prompt
from zorl.scoring import LabelWords
from zorl.trainer import MeZOTrainer

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
LABELS = (X @ torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5, -1.0]) > 0).long()
SEEDS = (3, 8, 11)
ROWS = [{"text": "the film was great", "label": "good"}, {"text": "it was a terrible plot", "label": "bad"}] * 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2))


def along(parameters: ParameterSet, gradients: dict[str, Tensor], seed: int, distribution: Distribution) -> float:
    """z·∇L from gradients that backpropagation found."""
    total = 0.0
    for name, tensor in parameters.items():
        width = tensor[0].numel() if tensor.ndim > 1 else 0
        z = reference.sample(torch.arange(tensor.numel()), key(seed, name), distribution, width)
        total += float((z.double() * gradients[name].reshape(-1).double()).sum())
    return total


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_slope_is_that_of_backpropagation(distribution: Distribution):
    model = network()
    parameters = ParameterSet(model.named_parameters())
    loss = nn.functional.cross_entropy(model(X), LABELS)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    before = {name: tensor.clone() for name, tensor in parameters.items()}
    derivative = DirectionalDerivative(model, parameters, distribution)
    value, slopes = derivative.slopes(
        [Point(seed, 0.0) for seed in SEEDS], lambda: nn.functional.cross_entropy(derivative.module(X), LABELS)
    )
    assert value == pytest.approx(loss.item(), rel=1e-5)
    expected = [along(parameters, gradients, seed, distribution) for seed in SEEDS]
    assert slopes.values == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert all(torch.equal(parameters[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "roberta", "opt", "qwen2", "llama"])
def test_language_models_have_slopes(parts: Callable[[str], Any], kind: str):
    """Against a central difference of the same loss."""
    model, tokenizer = parts(kind).model, parts(kind).tokenizer
    parameters = ParameterSet(model.named_parameters())
    derivative = DirectionalDerivative(model, parameters, "rank1")
    prompt = Prompt("{text} it was {mask} .", {"bad": "terrible", "good": "great"})
    policy = LabelWords(derivative.evaluator, tokenizer, prompt)
    objective = CrossEntropy(policy, LabelLoss(policy, "label"))
    attention = model.config._attn_implementation
    _, slopes = derivative.slopes([Point(5, 0.0)], lambda: objective.losses(ROWS, [CENTRE]).mean())
    plus, minus = objective.losses(ROWS, [Point(5, 2e-3), Point(5, -2e-3)]).mean(dim=1).tolist()
    assert slopes.values[0] == pytest.approx((plus - minus) / 4e-3, rel=0.05, abs=2e-2)
    assert model.config._attn_implementation == attention
    assert model.config is not derivative.module.config


def test_slopes_descend_a_small_model():
    model = network()
    optimizer = MeZO(model.named_parameters(), lr=0.02, update="normalized", estimator="forward_gradient", n_spsa=2)
    derivative = DirectionalDerivative(model, optimizer.parameters)
    values = []
    for _ in range(100):
        probe = optimizer.ask()
        assert [point.offset for point in probe.points] == [0.0, 0.0]
        value, slopes = derivative.slopes(
            probe.points, lambda: nn.functional.cross_entropy(derivative.module(X), LABELS)
        )
        optimizer.tell(probe.id, slopes)
        optimizer.step()
        values.append(value)
    assert values[-1] < values[0] / 2


def tune(parts: Callable[[str], Any], folder: Any, **goal: Any) -> MeZOTrainer:
    args = MeZOConfig(
        output_dir=str(folder), max_steps=40, estimator="forward_gradient", per_device_train_batch_size=8, use_cpu=True,
        learning_rate=5e-3, logging_steps=5, report_to="none", calibration="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    import copy

    return MeZOTrainer(
        copy.deepcopy(parts("gpt2").model), args=args, processing_class=parts("gpt2").tokenizer, train_dataset=ROWS,
        prompt=Prompt("{text} it was {mask} .", {"bad": "terrible", "good": "great"}), **goal,
    )  # fmt: skip


def test_the_trainer_follows_slopes(parts: Callable[[str], Any], tmp_path: Any):
    def own(model: Any, rows: Any) -> Tensor:
        ids = torch.tensor([[5, 6, 7, 8]])
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    for name, loss in (("words", "cross_entropy"), ("own", own)):
        trainer = tune(parts, tmp_path / name, loss=loss)
        trainer.train()
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        assert rewards[-1] > 0.9 * rewards[0]  # they are negative losses


class Steep(nn.Module):
    """A loss whose slopes along directions of unit size are beyond float16, and it is not."""

    def __init__(self, steepness: float = 3000.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((8,), 30.0 / steepness, dtype=torch.float16))
        self.steepness = steepness

    def forward(self) -> Tensor:
        return (self.w * self.steepness).square().sum() / 8


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_half_precision_has_slopes(distribution: Distribution):
    model = Steep()
    parameters = ParameterSet(model.named_parameters())
    derivative = DirectionalDerivative(model, parameters, distribution)
    value, slopes = derivative.slopes([Point(seed, 0.0) for seed in SEEDS], derivative.module)
    assert value == pytest.approx(900, rel=0.01)
    gradient = {"w": torch.full((8,), 2 * 3000**2 * 0.01 / 8)}
    expected = [along(parameters, gradient, seed, distribution) for seed in SEEDS]
    assert slopes.values == pytest.approx(expected, rel=0.02, abs=1000)


def test_a_slope_beyond_the_dtype_is_an_error_and_no_abstention():
    model = Steep(6e4)
    derivative = DirectionalDerivative(model, ParameterSet(model.named_parameters()))
    with pytest.raises(ValueError, match="its derivative overflows the model's dtype"):
        derivative.slopes([Point(seed, 0.0) for seed in SEEDS], lambda: derivative.module() * 60)


def test_what_has_no_slope_is_refused(parts: Callable[[str], Any], tmp_path: Any):
    with pytest.raises(ValueError, match="differentiates a loss, and a reward or a judge has no slope"):
        tune(parts, tmp_path, reward_funcs=lambda completions, **_: [0.0] * len(completions))
    with pytest.raises(ValueError, match="differentiates a loss, and a reward or a judge has no slope"):
        tune(parts, tmp_path, judge=lambda **_: [])
    with pytest.raises(ValueError, match="returns a number without a derivative"):
        tune(parts, tmp_path, loss=lambda model, rows: 1.0).train()
    with pytest.raises(ValueError, match="scores and verdicts have no slope"):
        ForwardGradient().project(Scores(torch.zeros(2, 1)), 1, 0.1)
    with pytest.raises(ValueError, match="expected slopes along 2 directions, got 1"):
        ForwardGradient().project(Slopes((1.0,)), 2, 0.1)
    with pytest.raises(ValueError, match="differentiates the model, which a closure does not show"):
        MeZO([("w", torch.ones(3))], estimator="forward_gradient").step(lambda: 1.0)
    optimizer = MeZO([("w", torch.ones(3))])
    with pytest.raises(ValueError, match="SPSA takes scores or verdicts, not slopes"):
        optimizer.tell(optimizer.ask().id, Slopes((1.0,)))
