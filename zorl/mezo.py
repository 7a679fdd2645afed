"""MeZO: ask where to look, tell what was found, step.

`ask` and `tell` are the optimizer; answers may come minutes later and from anywhere. `step(closure)` wraps them for code
that can compute a loss. MeZO is a `torch.optim.Optimizer`, so learning-rate schedulers work with it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from zorl.block_scales import BlockScales, check_block_scales, measures
from zorl.comparisons import Comparison
from zorl.directions import DISTRIBUTIONS, Distribution
from zorl.epsilon import Epsilon
from zorl.estimators import EstimatorName, make_estimator
from zorl.forward_gradient import ForwardGradient
from zorl.in_place import InPlace
from zorl.interrupts import uninterrupted
from zorl.moments import Averaging, Keeping
from zorl.parameters import ParameterSet
from zorl.probe import Answers, Point, Probe, Scores
from zorl.replay import Updater, grid_of
from zorl.schedules import Directions
from zorl.trajectory import (
    SCHEMA,
    Record,
    Trajectory,
    check_header,
    check_parameters,
    direction_seed,
    directions_of,
    read,
)
from zorl.updates import UpdateName, bfloat16, update_rule


class MeZO(torch.optim.Optimizer):
    """Tunes parameters with forward passes alone (Malladi et al. 2023, Algorithms 1 and 2).

    Args:
        named_parameters: as from `model.named_parameters()`; each must be float32, bfloat16 or float16. Frozen parameters
            (`requires_grad=False`) are left alone, as in torch's optimizers; plain tensors are tuned.
        lr: learning rate. With `update="sgd"` and `"momentum"` it multiplies the projected gradient; with `"normalized"` and
            `"adam"` it is the typical change of a weight in one step.
        epsilon: the perturbation's size, or `"auto"`: it grows, to 16 times its start at most, until `informative_target` of
            the directions find a difference (see `zorl.epsilon.Epsilon`).
        n_spsa: directions per step: a number, or a schedule such as `"1-8/1000"`.
        distribution: the distribution of z: `"rademacher"` (±1), `"gaussian"` (the paper's), `"rank1"` or `"rank4"`
            (low-rank).
        update: `"sgd"` (the paper's), `"normalized"`, `"momentum"` or `"adam"`.
        beta1: decay of the moving average of gradients (momentum and Adam), per step.
        beta2: decay of the moving average of squared gradients (Adam), per step.
        moment_window: past steps in a recomputed average; `zorl.moments` says what that leaves out and costs.
        moments: `"recomputed"` from the log, which takes no memory of the model's size, or `"stored"`.
        seed: the master seed, from which every direction follows.
        informative_target: share of directions that should find a difference, for `epsilon="auto"`.
        estimator: `"spsa"`, two forward passes per direction; `"one_sided"`, one per direction, compared with the step's other
            directions; `"one_point"`, one per direction, compared with the step before; `"variance_spsa"` or
            `"expectation_spsa"`, with blocks of parameters that are perturbed by scales of their own (see `zorl.estimators` and
            `zorl.block_scales`); `"forward_gradient"`, the slope of the loss itself (see `zorl.forward_gradient`).
        block_scales: what sets these scales: `"parameter_norms"` or `"gradient_norms"`.
        block_scales_every: steps between updates of these scales.
        comparison: what verdicts say about a difference: "share", "logit" or "sign" (see `zorl.comparisons`).
        trajectory: a file to log to. If it exists, the run is resumed: the parameters must hold the base weights, and are
            moved to where the log ends.
        writes: False where another process writes the trajectory and this one only starts from what it holds.
        header: more JSON values to write into the trajectory's header, and to compare on resuming.

    Raises:
        ValueError: an argument is out of range, or a parameter holds NaN.
        TypeError: a parameter is not float32, bfloat16 or float16.
        TrajectoryError: the trajectory is damaged or in use, or belongs to another model or other settings.

    Example::

        optimizer = zorl.MeZO(model.named_parameters(), lr=1e-6, epsilon=1e-3)
        loss = optimizer.step(closure)  # closure() -> float, called on both sides under no_grad
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        lr: float = 1e-6,
        epsilon: float | Literal["auto"] = "auto",
        *,
        n_spsa: int | str = 1,
        distribution: Distribution = "rademacher",
        update: UpdateName = "sgd",
        beta1: float = 0.9,
        beta2: float = 0.95,
        moment_window: int = 64,
        moments: Keeping = "recomputed",
        seed: int = 0,
        informative_target: float = 0.8,
        estimator: EstimatorName = "spsa",
        block_scales: BlockScales = "parameter_norms",
        block_scales_every: int = 1000,
        comparison: Comparison = "share",
        trajectory: str | Path | None = None,
        writes: bool = True,
        header: Mapping[str, Any] | None = None,
    ) -> None:
        if not (math.isfinite(lr) and lr > 0.0):
            raise ValueError(f"lr must be a positive number, got {lr!r}")
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution={distribution!r}; choose one of {', '.join(map(repr, DISTRIBUTIONS))}")
        if not 0 <= seed < 1 << 63:
            raise ValueError(f"seed must be in 0 … 2⁶³−1, got {seed}")
        named = list(named_parameters)
        if any(not isinstance(item, tuple) for item in named):
            raise ValueError(
                "MeZO needs (name, parameter) pairs: pass model.named_parameters(), not model.parameters()"
            )
        self.parameters = ParameterSet(
            (n, p) for n, p in named if p.requires_grad or not isinstance(p, torch.nn.Parameter)
        )
        super().__init__(list(self.parameters.items()), {"lr": lr})
        self.distribution = distribution
        self.seed = seed
        self.directions = Directions.parse(n_spsa)
        self.estimator = make_estimator(estimator, comparison)
        check_block_scales(block_scales, block_scales_every)
        scaled = estimator in ("variance_spsa", "expectation_spsa")
        self.rule = update_rule(update, beta1)
        averaging = Averaging(beta1, beta2 if update == "adam" else None, moment_window, moments)
        self.epsilon = Epsilon(epsilon, self.parameters.dtypes, target=informative_target)
        self.steps = 0
        self.forwards = 0  # evaluations of points
        self.informative = self.tied = self.abstained = 0  # directions so far
        self.recent: deque[float] = deque(
            maxlen=100
        )  # whether the last answered directions found a difference: 1.0 or 0.0
        self._probes = 0
        self._open: dict[int, Probe] = {}  # by the step that they are for
        self._pending: list[Record] = []  # told, but not applied yet
        self._in_place: InPlace | None = None
        self._updater: Updater | None = None
        self.trajectory: Trajectory | None = None
        self.truncated: str | None = None  # what resuming cut off a damaged file
        self._header = {
            "schema": SCHEMA,
            "seed": seed,
            "distribution": distribution,
            "n_spsa": str(self.directions),
            "epsilon": epsilon,
            "informative_target": informative_target,
            "update": update,
            **(asdict(averaging) if update in ("momentum", "adam") else {}),
            "estimator": estimator,
            **({"block_scales": block_scales, "block_scales_every": block_scales_every} if scaled else {}),
            "comparison": comparison,
            **(header or {}),
        }
        self._directions_at = directions_of({**self._header, "parameters": self.parameters})
        self._path = None if trajectory is None else Path(trajectory)
        self._writes = writes
        if self._path is not None:
            # Resuming or replaying on other base weights would reproduce neither run.
            if "base_sha256" not in self._header:  # hashing takes a copy of all weights from the device
                self._header["base_sha256"] = self.parameters.sha256()
            if self._path.exists():
                self._resume(self._path)

    # --- the core ---------------------------------------------------------------------------------------------------

    def ask(self, ahead: int = 0) -> Probe:
        """The next question. Asking again before telling replaces the open probe; its directions stay those of the step.

        Args:
            ahead: ask for the step this many steps later, so that its answers can be gathered while those of earlier steps
                are awaited. The points lie around the present θ, which is up to `ahead` updates old when they are told.

        Raises:
            ValueError: `ahead` is negative, or blocks are scaled and `ahead` is not 0 or a step was told but not applied.
        """
        if ahead < 0:
            raise ValueError(f"ahead must be at least 0, got {ahead}")
        step = self.steps + ahead
        seeds = self._seeds(step)
        points = self.estimator.points(seeds, self.epsilon.value)
        if "block_scales" in self._header:
            if ahead or self._pending:
                raise ValueError("block scales depend on θ at the step: apply what was told, and do not ask ahead")
            points = self._scaled(points, step)
        self._open[step] = Probe(self._probes, step, self.epsilon.value, seeds, points, made_at=self.steps)
        self._probes += 1
        return self._open[step]

    def reopen(self, probe: Probe) -> Probe:
        """Reopens a probe that was asked before, perhaps by an earlier process: the same probe with a new id.

        Raises:
            ValueError: its step has been told already, or its directions are not that step's.
        """
        if probe.step < self.steps:
            raise ValueError(f"probe {probe.id} is of step {probe.step}, and {self.steps} steps have been told already")
        if probe.seeds != self._seeds(probe.step):
            raise ValueError(f"probe {probe.id} looks along other directions than step {probe.step} of this run")
        self._open[probe.step] = replace(probe, id=self._probes)
        self._probes += 1
        return self._open[probe.step]

    def tell(self, probe_id: int, answers: Answers) -> Record:
        """Takes the answers to an open probe, commits the step to the trajectory, and leaves θ for `step` to move.

        Raises:
            TypeError: the answers are not Scores, Verdicts or Slopes.
            ValueError: that probe is not open or not the next step's, or the answers do not fit it, or are so large that the step
                would be infinite.
            OSError: the trajectory could not be written; nothing has changed.
        """
        if not isinstance(answers, Answers):
            raise TypeError(
                f"tell takes Scores, Verdicts or Slopes of zorl.probe, got {type(answers).__name__}: wrap numbers as "
                "Scores(tensor), of shape (points, rows), where higher is better"
            )
        probe = next((p for p in self._open.values() if p.id == probe_id), None)
        if probe is None:
            others = " and ".join(str(p.id) for p in self._open.values())
            raise ValueError(f"probe {probe_id} is not open" + (f"; probe {others} is" if others else ""))
        if probe.step != self.steps:
            raise ValueError(f"probe {probe_id} is for step {probe.step}: tell the answers for step {self.steps} first")
        if self._pending:
            raise ValueError("the last step was told but not applied: call step() first")
        measured = self.estimator.project(answers, len(probe.seeds), probe.epsilon)
        # Decisions use the logged values, so that a replayed log decides the same.
        projected = tuple(bfloat16(g) for g in measured)
        if any(math.isinf(g) for g in projected):
            raise ValueError(
                f"the projected gradients of step {probe.step} are {list(projected)}: answers this large make no step; rescale "
                "them, or take a larger epsilon"
            )
        if measures(self._header, probe.step):
            record = Record(projected, (0.0,) * len(projected))
        else:
            coefficients = tuple(self.rule.coefficients(projected, self.param_groups[0]["lr"]))
            if not all(map(math.isfinite, coefficients)):
                raise ValueError(
                    f"the coefficients of step {probe.step} would be {list(coefficients)}: lower the learning rate"
                )
            record = Record(projected, coefficients, self.estimator.losses(answers))
        with uninterrupted():
            if self._path is not None and self._writes:
                self._log().append(record)
            del self._open[probe.step]
            self.forwards += len(probe.points)
            self._pending = [record]
            self._observe(record)
        return record

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float | None:  # type: ignore[override]
        """Applies what was told. With a closure it first asks, evaluates and tells, writing θ and restoring it exactly.

        Args:
            closure: returns the loss (a float, or a tensor with one element; NaN abstains). It is called at each point of the
                probe, such as θ+εz and θ−εz, must see the same data each time, and needs no backward pass.

        Returns:
            With a closure, the mean loss over the evaluated points; None without.

        Raises:
            ValueError: the closure returned an infinite loss, the estimator is `"forward_gradient"`, which a closure cannot
                serve, or the run began with `ask` and `tell`.
            OSError: the trajectory could not be written; nothing has changed.
        """
        loss = None
        if closure is not None:
            if isinstance(self.estimator, ForwardGradient):
                raise ValueError(
                    "estimator='forward_gradient' differentiates the model, which a closure does not show: ask, find the "
                    "slopes with zorl.forward_gradient.DirectionalDerivative, and tell"
                )
            if self._pending:  # told, but interrupted before it was applied
                self.step()
            in_place = self._closure_evaluator()
            probe = self.ask()
            losses = [float(in_place.evaluate(point, closure)) for point in probe.points]
            if any(math.isinf(value) for value in losses):
                raise ValueError(
                    f"the closure returned {losses}: an infinite loss cannot be compared; return NaN to abstain"
                )
            self.tell(probe.id, Scores.of_losses(losses))
            loss = sum(losses) / len(losses)
        with uninterrupted():
            if self._pending:
                self._theta.apply(self._pending)
            self._pending = []
        return loss

    # --- state ------------------------------------------------------------------------------------------------------

    @property
    def informative_share(self) -> float:
        """The share of answered directions that found a difference (NaN before the first)."""
        answered = self.informative + self.tied
        return self.informative / answered if answered else math.nan

    @property
    def recent_informative_share(self) -> float:
        """The same over the last hundred answered directions."""
        return sum(self.recent) / len(self.recent) if self.recent else math.nan

    @property
    def header(self) -> dict[str, Any]:
        """The header of this run's trajectory: everything that decides where its steps lead."""
        described = {"in_place": self._in_place is not None, "parameters": self.parameters.describe()}
        return {**self._header, **described}

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with the number of steps. What these steps found is in the trajectory alone."""
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.

        Raises:
            ValueError: it is of another step than this optimizer, which would repeat directions that have been taken.
        """
        if state_dict.get("steps") != self.steps:
            raise ValueError(
                f"the state_dict is of step {state_dict.get('steps')}, and the optimizer is at step {self.steps}: what the steps "
                "found is in the trajectory. Give MeZO(…, trajectory='run.zorl'), and it continues from there when it is made "
                "again on the base weights"
            )
        super().load_state_dict(state_dict)

    def close(self) -> None:
        """Syncs and closes the trajectory."""
        if self.trajectory is not None:
            self.trajectory.close()

    def _observe(self, record: Record) -> None:
        """Updates all state that follows from a committed step, live and in replay."""
        if measures(self._header, self.steps):
            self.steps += 1
            return
        self.estimator.observe(record.losses)
        self.rule.observe(record.projected)
        self.epsilon.observe(record.projected)
        for g in record.projected:
            if math.isnan(g):
                self.abstained += 1
            else:
                self.informative += g != 0.0
                self.tied += g == 0.0
                self.recent.append(float(g != 0.0))
        self.steps += 1

    def _seeds(self, step: int) -> tuple[int, ...]:
        """The seeds of a step's directions: a function of the master seed, so only the step has to be remembered."""
        return tuple(direction_seed(self.seed, step, i) for i in range(self._directions_at(step)))

    def _scaled(self, points: tuple[Point, ...], step: int) -> tuple[Point, ...]:
        """The points with scaled blocks: each along z in a single block, or along d⁻¹⊙z."""
        if measures(self._header, step):
            blocks = [name for name in self.parameters for _ in range(self.estimator.sides)]
            return tuple(replace(point, scales={name: 1.0}) for point, name in zip(points, blocks, strict=True))
        scales = self._theta.scales
        assert scales is not None
        inverse = {name: 1.0 / scale for name, scale in scales.items()}
        return tuple(replace(point, scales=inverse) for point in points)

    @property
    def _theta(self) -> Updater:
        """Writes θ as a replay of the log would. Made at the first step, when it is known whether a closure drives the run."""
        if self._updater is None:
            self._updater = Updater(self.header, self.parameters, self._in_place)
        return self._updater

    def _closure_evaluator(self) -> InPlace:
        if self._in_place is None:
            if self.steps:
                raise ValueError(
                    "this run began with ask and tell; a closure writes θ on another grid, so the run cannot continue with one"
                )
            self._in_place = grid_of(self._header, self.parameters)
            self._updater = None
        return self._in_place

    def _log(self) -> Trajectory:
        assert self._path is not None
        if self.trajectory is None:
            self.trajectory = Trajectory.create(self._path, self.header)
        return self.trajectory

    def _resume(self, path: Path) -> None:
        if self._writes:
            self.trajectory, self.truncated = Trajectory.resume(path)
            recorded, records = self.trajectory.header, self.trajectory.records
        else:
            recorded, records = read(path)
        try:
            check_parameters(recorded, self.parameters)
            check_header(recorded, self._header)
        except ValueError:
            self.close()
            raise
        if recorded["in_place"]:
            self._closure_evaluator()
        for record in records:
            self._observe(record)
            self.forwards += self.estimator.sides * len(record.projected)
        self._theta.apply(records)
