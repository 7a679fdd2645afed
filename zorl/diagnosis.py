"""The shape of a model's loss where tuning starts, and the lr and ε that follow from it, in a bounded number of forwards.

Five things are measured, each on batches as training draws them:

1. ε: slopes along a few directions at ε from 1e-4 to 0.1 (`zorl.slopes`).
2. curvature and effective rank (`zorl.curvature`), at that ε.
3. the share of a slope that another batch confirms; the rest is noise of the batch.
4. the learning rate of the descent lemma with these figures (Malladi et al. 2023, Corollary 1).
5. a few real steps with that rate (or, if it is smaller, one that moves weights by ε per step), with a quarter of it and with
   four times it, from the same start and on the same batches. The rate of theory is suggested, unless the loss falls farther
   with another by more than twice the standard error of the difference.

θ is unchanged afterwards, bit for bit.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zorl.block_scales import measures
from zorl.curvature import Curvature, Estimate, Losses, forwards_of, jackknife, measure_curvature, restored
from zorl.directions import Distribution, derive_seed
from zorl.epsilon import FLOOR
from zorl.estimators import make_estimator
from zorl.mezo import MeZO
from zorl.probe import CENTRE, Point, Scores
from zorl.schedules import Directions
from zorl.slopes import EPSILONS, Look, choose_epsilon, look, rms
from zorl.theory import corollary_1, lemma_2
from zorl.trainer import MeZOTrainer
from zorl.updates import measured_in_weights

_HALF = 1e-2  # the ε from which on curvature can be measured in half precision
LOOKS = 4  # directions that ε is chosen by
TRIES = (0.25, 1.0, 4.0)  # times the learning rate that the theory gives
MEASURED_ON = 4  # batches on which the fall of the loss is measured
LEAST_CONFIRMED = 0.1  # a share measured below this is replaced by it, being hardly known


@dataclass(frozen=True, slots=True)
class Try:
    """A few real steps.

    Attributes:
        falls: how far the loss fell per step, on each of several fixed batches.
    """

    learning_rate: float
    falls: tuple[float, ...]

    @property
    def fall(self) -> float:
        """Their mean."""
        return sum(self.falls) / len(self.falls)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was measured, and what to train with.

    Attributes:
        parameters: d, the number of tuned parameters.
        n_spsa: n, directions per step.
        forwards: the evaluations of a batch that it took, `calibration_forwards` of them for the calibration at the start.
        looks: the slopes at each ε, smallest ε first.
        curvature: along random directions, and with it gradient, trace, norms and effective rank.
        lemma_2: ‖∇̂L‖² / ‖∇L‖² as expected in a run, with n directions per step: computed from d and n, not measured. (The
            only ‖∇L‖² that forward passes know is the mean square of the slopes that make up ∇̂L, so that a ratio of the two
            would agree whatever the loss.) None where the lemma does not describe the estimator: `one_point` has the noise of
            the step before, and with scaled blocks the ratio depends on how the gradient is spread over them.
        confirmed: the share of a squared slope that another batch confirms.
        corollary_1: the learning rate that follows, for `update="sgd"`; infinite where nothing curves upwards. None where
            `lemma_2` is.
        gradient: √E(z·∇L)² on a batch: times a learning rate for `update="sgd"`, one for `"normalized"` (see
            `zorl.updates.measured_in_weights`).
        tries: real steps with the run's own update rule; the middle rate is Corollary 1's (that of SPSA where the estimator
            has none), or takes weights as far as ε in a step where that is less.
        predicted_fall: the predicted fall of the loss in the first step with the middle rate; None where `corollary_1` is.
        epsilon: the ε to train with; None if no fixed one will do, so that `"auto"` should find one.
        lr_normalized, lr_sgd: the learning rates to train with.
    """

    parameters: int
    n_spsa: int
    forwards: int
    calibration_forwards: int
    looks: tuple[Look, ...]
    curvature: Curvature
    lemma_2: float | None
    confirmed: Estimate
    corollary_1: float | None
    gradient: float
    tries: tuple[Try, ...]
    predicted_fall: float | None
    epsilon: float | None
    lr_normalized: float
    lr_sgd: float


def diagnose(trainer: MeZOTrainer, budget: int = 500, progress: Callable[[int], object] = lambda n: None) -> Diagnosis:
    """Measures a trainer's objective where its training would start, without training it.

    Args:
        trainer: with a training set, and a reward or a loss that has a value for every answer.
        budget: the most evaluations of a batch, calibration included.
        progress: called with the number of evaluations made.

    Raises:
        ValueError: the budget is too small, no direction finds a difference, the objective is a judge's, which has no
            value to measure, or the estimator is the forward gradient.
    """
    args, parameters = trainer.args, trainer.tuned
    if args.estimator == "forward_gradient":
        raise ValueError(
            "a diagnosis measures slopes by differences, and estimator='forward_gradient' computes them exactly: leave it out"
        )
    n = Directions.parse(args.n_spsa).at(0)
    one_sided = args.estimator == "one_sided"
    described = args.estimator in ("spsa", "one_sided")  # by Lemma 2 and Corollary 1
    distribution: Distribution = args.distribution  # type: ignore[assignment]
    sides = make_estimator(args.estimator, args.comparison).sides  # type: ignore[arg-type]
    trainer.calibrate()
    calibration = trainer.calibration_forwards
    a_step = n * sides
    scaled = args.estimator in ("variance_spsa", "expectation_spsa")
    measuring = sides * len(parameters) if scaled and args.block_scales == "gradient_norms" else 0
    costs = Costs(a_step, measuring, args.block_scales_every)
    plan = Plan.of(budget - calibration, costs)
    if plan is None:
        least = next(b for b in itertools.count() if Plan.of(b, costs)) + calibration
        raise ValueError(
            f"a budget of {budget} forwards is too small: {least} are needed, {calibration} of them to calibrate"
        )
    progress(calibration)
    batches = _batches(trainer)
    seeds = [derive_seed(args.seed, "diagnosis", i) for i in range(plan.directions)]
    one, other = (_losses(trainer, next(batches), i, a_step, progress) for i in range(2))

    epsilons = [e for e in EPSILONS if e >= max(FLOOR[dtype] for dtype in parameters.dtypes)]
    looks = look(one, seeds[:LOOKS], epsilons)
    epsilon = choose_epsilon(looks, args.informative_target)
    at = epsilon if epsilon is not None else max(looks, key=lambda found: (found.informative, -found.epsilon)).epsilon
    if at < _HALF and any(dtype != torch.float32 for dtype in parameters.dtypes):
        warnings.warn(
            f"at epsilon={at:g} rounding outweighs the curvature of a model in half precision, and with it the effective rank "
            "and the learning rate of Corollary 1: load it with dtype='float32' to diagnose it",
            stacklevel=2,
        )
    curvature = measure_curvature(one, parameters, distribution, seeds, at)
    losses = other([Point(seed, sign * at) for seed in seeds for sign in (1.0, -1.0)]).view(-1, 2)
    second = (losses[:, 0] - losses[:, 1]) / (2.0 * at)
    confirmed = _confirmed(curvature.slopes, second)

    share = min(max(confirmed.value, LEAST_CONFIRMED), 1.0)
    gradient = math.sqrt((curvature.slopes.square().mean() + second.square().mean()).item() / 2.0)
    theory = share * _corollary_1_of(curvature, n, one_sided)
    if gradient == 0.0:
        raise ValueError(
            f"all {plan.directions} directions tie at ε = {at:g}: there is no slope to follow; ask for a reward that moves, "
            "such as label_reward='expected', or for larger batches"
        )
    sgd = min(theory, at / gradient)  # a typical step is no longer than the distance at which slopes were measured
    unit = gradient if measured_in_weights(args.update) else 1.0  # from `sgd` to the rate of the run's own rule
    rates = [times * sgd * unit for times in TRIES]
    tries = _descend(trainer, rates, at, plan.steps, a_step, batches, progress)
    best = choose_try(tries).learning_rate / unit
    return Diagnosis(
        parameters=parameters.numel,
        n_spsa=n,
        forwards=calibration + plan.forwards(costs, len(epsilons)),
        calibration_forwards=calibration,
        looks=tuple(looks),
        curvature=curvature,
        lemma_2=lemma_2(parameters.numel, n, distribution, one_sided=one_sided) if described else None,
        confirmed=confirmed,
        corollary_1=theory if described else None,
        gradient=gradient,
        tries=tuple(tries),
        predicted_fall=sgd * share * gradient**2 * (1.0 - sgd / (2.0 * theory)) if described else None,
        epsilon=epsilon,
        lr_normalized=best * gradient,
        lr_sgd=best,
    )


def _corollary_1_of(curvature: Curvature, n: int, one_sided: bool) -> float:
    """Corollary 1 with the trace, or its upper end if it cannot be told from zero; infinite if nothing curves upwards."""
    trace = curvature.trace
    steepest = trace.value if trace.low > 0.0 else trace.high
    norm = max(curvature.norm.value, 0.0)
    return corollary_1(steepest, norm, n, one_sided=one_sided) if steepest > 0.0 else math.inf


# --- the measurements -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Costs:
    """Points that the steps of training evaluate.

    Attributes:
        step: points per step that moves θ.
        measuring: points per step that measures the gradient norms of blocks (see `zorl.block_scales`); 0: there are none.
        every: one step of this many measures.
    """

    step: int
    measuring: int = 0
    every: int = 2

    def of(self, steps: int) -> int:
        """Points of this many steps that move θ, and of the measuring steps before and between them."""
        return steps * self.step + math.ceil(steps / (self.every - 1)) * self.measuring


@dataclass(frozen=True, slots=True)
class Plan:
    """How a budget is spent.

    Attributes:
        directions: the number along which curvature is measured.
        steps: the steps that move θ with each learning rate.
    """

    directions: int
    steps: int

    @classmethod
    def of(cls, budget: int, costs: Costs) -> Plan | None:
        """Up to 16 directions for at most two fifths of the budget, the rest for real steps; None where it is too small."""
        directions = max((m for m in range(6, 17) if forwards_of(m) + 2 * m <= 0.4 * budget), default=6)
        left = budget - cls(directions, 0).forwards(costs)
        steps = max(left, 0) // (costs.step * len(TRIES))
        while costs.of(steps) * len(TRIES) > left and steps >= 4:
            steps -= 1
        return cls(directions, steps) if steps >= 4 else None

    def forwards(self, costs: Costs, epsilons: int = len(EPSILONS)) -> int:
        of_looks = 2 * LOOKS * epsilons
        of_curvature = forwards_of(self.directions) + 2 * self.directions  # the second batch has slopes alone
        of_tries = MEASURED_ON * (1 + len(TRIES)) + costs.of(self.steps) * len(TRIES)
        return of_looks + of_curvature + of_tries


def choose_try(tries: Sequence[Try]) -> Try:
    """The try with which the loss fell farthest; the middle one, unless that leads by more than twice the standard error of
    the difference over the batches. (With four batches chance alone does so in about one case of fourteen.)"""
    middle = tries[len(tries) // 2]
    best = max(tries, key=lambda found: found.fall if math.isfinite(found.fall) else -math.inf)
    if not math.isfinite(middle.fall):
        return best
    leads = torch.tensor(best.falls, dtype=torch.float64) - torch.tensor(middle.falls, dtype=torch.float64)
    return best if leads.mean() > 2.0 * leads.std() / math.sqrt(len(leads)) else middle


def _confirmed(one: Tensor, other: Tensor) -> Estimate:
    """E[g g′] / √(E g² · E g′²) of slopes along the same directions on two batches: ‖∇L‖² over the batches' own."""

    def share(i: Tensor) -> float:
        scale = rms(one[i]) * rms(other[i])
        return (one[i] * other[i]).mean().item() / scale if scale > 0.0 else math.nan

    return jackknife(share, len(one))


def _descend(
    trainer: MeZOTrainer,
    rates: Sequence[float],
    epsilon: float,
    steps: int,
    a_step: int,
    batches: Iterator[list[dict[str, Any]]],
    progress: Callable[[int], object],
) -> list[Try]:
    """The same few steps with each learning rate, along the same directions, from the current θ."""
    args = trainer.args
    n = Directions.parse(args.n_spsa).at(0)
    measured = [_losses(trainer, next(batches), 2 + i, a_step, progress) for i in range(MEASURED_ON)]
    rows: list[list[dict[str, Any]]] = []

    def levels() -> list[float]:
        return [losses([CENTRE]).item() for losses in measured]

    before, tries = levels(), []
    with restored(trainer.tuned) as restore:
        for rate in rates:
            mezo = MeZO(
                trainer.tuned.items(), rate, epsilon, n_spsa=n, distribution=args.distribution,  # type: ignore[arg-type]
                update=args.update, seed=derive_seed(args.seed, "tries"),  # type: ignore[arg-type]
                estimator=args.estimator,  # type: ignore[arg-type]
                beta1=args.beta1, beta2=args.beta2, moment_window=args.moment_window,
                moments=args.moments,  # type: ignore[arg-type]
                block_scales=args.block_scales,  # type: ignore[arg-type]
                block_scales_every=args.block_scales_every,
            )  # fmt: skip
            header, moved = mezo.header, 0
            while moved < steps:
                moved += not measures(header, mezo.steps)
                if len(rows) == mezo.steps:
                    rows.append(next(batches))
                probe = mezo.ask()
                noise = derive_seed(args.seed, "tries", mezo.steps)
                mezo.tell(probe.id, trainer.objective.ask(rows[mezo.steps], probe.points, noise).answers)
                mezo.step()
                progress(len(probe.points))
            falls = [(start - end) / steps for start, end in zip(before, levels(), strict=True)]
            tries.append(Try(rate, tuple(falls)))
            restore()
    return tries


def _losses(
    trainer: MeZOTrainer, rows: list[dict[str, Any]], number: int, a_step: int, progress: Callable[[int], object]
) -> Losses:
    """The mean loss on these rows, at as many points at a time as a training step has, always with the same noise."""
    noise = derive_seed(trainer.args.seed, "diagnosis", "noise", number)

    def losses(points: Sequence[Point]) -> Tensor:
        found = []
        for start in range(0, len(points), a_step):
            chunk = points[start : start + a_step]
            answers = trainer.objective.ask(rows, chunk, noise).answers
            if not isinstance(answers, Scores):
                raise ValueError("a judge only compares, so there is no value whose curvature could be measured")
            found.append(answers.losses)
            progress(len(chunk))
        return torch.cat(found)

    return losses


def _batches(trainer: MeZOTrainer) -> Iterator[list[dict[str, Any]]]:
    """Batches as training draws them, over and over."""
    while True:
        loader = iter(trainer.get_train_dataloader())
        while parts := list(itertools.islice(loader, trainer.args.gradient_accumulation_steps)):
            yield [row for part in parts for row in part.rows]
