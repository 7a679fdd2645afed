"""From answers to one projected gradient per direction: an estimate of z·∇L that never saw a gradient.

Only the *difference* of losses is used, so any answer to "by how much is one side better?" will do. Rewards become losses
here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, get_args

import torch

from zorl.comparisons import COMPARISONS, Comparison, preference_difference
from zorl.forward_gradient import ForwardGradient
from zorl.probe import Answers, Point, Scores, Slopes, Verdicts

EstimatorName = Literal["spsa", "one_sided", "one_point", "variance_spsa", "expectation_spsa", "forward_gradient"]


class Estimator(Protocol):
    @property
    def sides(self) -> int:
        """Points per direction."""

    def points(self, seeds: tuple[int, ...], epsilon: float) -> tuple[Point, ...]:
        """What to evaluate, `sides` points for each seed in turn."""

    def project(self, answers: Answers, directions: int, epsilon: float) -> list[float]:
        """The projected gradient of the loss for each direction: NaN where nobody had an opinion, 0 for a tie."""

    def losses(self, answers: Answers) -> tuple[float, ...]:
        """What later steps need of the answers and is therefore logged: one float32 per direction, or nothing."""

    def observe(self, losses: Sequence[float]) -> None:
        """Adds a committed step's losses to the estimator's state; called once per step, live and in replay."""


@dataclass(frozen=True, slots=True)
class SPSA:
    """Simultaneous perturbation: g = [L(θ+εz) − L(θ−εz)] / 2ε (Spall 1992, eq. 2.1; MeZO, Definition 1 and Algorithm 1).

    With several seeds each direction is estimated on its own (n-SPSA, MeZO Algorithm 2).

    Args:
        comparison: what verdicts say about the difference of rewards: "share", "logit" or "sign" (see `zorl.comparisons`).

    Raises:
        ValueError: there is no such comparison.
    """

    comparison: Comparison = "share"
    sides: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.comparison not in COMPARISONS:
            raise ValueError(f"comparison={self.comparison!r}; choose one of {', '.join(map(repr, COMPARISONS))}")

    def points(self, seeds: tuple[int, ...], epsilon: float) -> tuple[Point, ...]:
        """θ + εz and θ − εz for each seed in turn."""
        return tuple(Point(seed, sign * epsilon) for seed in seeds for sign in (1.0, -1.0))

    def project(self, answers: Answers, directions: int, epsilon: float) -> list[float]:
        """The projected gradient of the loss for each direction: NaN where nobody had an opinion, 0 where the sides tie.

        Scores: prompts on which a side abstained are left out, the others averaged. Verdicts: `comparison` turns them into a
        difference of rewards (tie and both bad count half for each side; abstentions are left out).

        Raises:
            ValueError: the scores are not of `2 · directions` points, or a verdict does not compare two sides of one
                direction.
        """
        if isinstance(answers, Scores):
            if len(answers.values) != 2 * directions:
                raise ValueError(f"expected scores of {2 * directions} points, got {len(answers.values)}")
            plus, minus = answers.values.double()[0::2], answers.values.double()[1::2]
            differences = torch.nanmean(plus - minus, dim=1).tolist()
        elif isinstance(answers, Slopes):
            raise ValueError("SPSA takes scores or verdicts, not slopes: those are for estimator='forward_gradient'")
        else:
            differences = [preference_difference(p, self.comparison) for p in _preferences(answers, directions)]
        # A reward is a negative loss, so the loss difference is the reward difference with its sign turned.
        return [-difference / (2.0 * epsilon) + 0.0 for difference in differences]

    def losses(self, answers: Answers) -> tuple[float, ...]:
        """None: each step measures its own differences."""
        return ()

    def observe(self, losses: Sequence[float]) -> None:
        pass


class OnePoint:
    """One forward pass per direction, and the residual of the step before (MeZO, Appendix B.5; Zhang et al. 2022, eq. 3):

        gₜ = [L(θₜ+εzₜ; Bₜ) − L(θₜ₋₁+εzₜ₋₁; Bₜ₋₁)] / ε

    With several directions per step each is compared with the mean of the step before, which is independent of z and so leaves
    the estimate unbiased. The first step has nothing to compare with: it abstains and moves nothing. A step that nobody
    answered is skipped. Losses are compared as float32, as they are logged.
    """

    sides = 1

    def __init__(self) -> None:
        self._before = math.nan

    def points(self, seeds: tuple[int, ...], epsilon: float) -> tuple[Point, ...]:
        """θ + εz for each seed."""
        return tuple(Point(seed, epsilon) for seed in seeds)

    def project(self, answers: Answers, directions: int, epsilon: float) -> list[float]:
        """The projected gradient of the loss for each direction; NaN in the first step, and where a point was not scored.

        Raises:
            ValueError: the scores are not of `directions` points, or the answers are verdicts.
        """
        losses = self.losses(answers)
        if len(losses) != directions:
            raise ValueError(f"expected scores of {directions} points, got {len(losses)}")
        return [(loss - self._before) / epsilon for loss in losses]

    def losses(self, answers: Answers) -> tuple[float, ...]:
        """The mean loss at each point, over the prompts that were scored."""
        if not isinstance(answers, Scores):
            raise ValueError(
                "estimator='one_point' compares the scores of one step with those of the step before, and verdicts have none; "
                "use estimator='spsa' with a judge"
            )
        return tuple((-answers.values.double().nanmean(dim=1)).float().tolist())

    def observe(self, losses: Sequence[float]) -> None:
        known = [loss for loss in losses if not math.isnan(loss)]
        if known:
            self._before = sum(known) / len(known)


class OneSided:
    """One forward pass per direction, compared with the others of the same step:

        gᵢ = [L(θ+εzᵢ) − mean of L(θ+εzⱼ), j ≠ i] / ε

    These are FZOO's batched one-sided differences with the other directions in place of L(θ): they cost nothing extra, and
    cancel what ½ε²zᵀHz adds to all points alike. It is the leave-one-out baseline of Kool et al. (2019, eq. 8) for evolution
    strategies (Salimans et al. 2017, section 2). n directions cost n forward passes where SPSA takes 2n, and are worth n − 1.
    On a smooth loss the step is n/(n−1) times as noisy; on a rough one, where the two sides of a direction have little in
    common, it is no worse than SPSA's with as many forward passes.

    The difference is taken prompt by prompt, over the points that were scored there.
    """

    sides = 1

    def points(self, seeds: tuple[int, ...], epsilon: float) -> tuple[Point, ...]:
        """θ + εz for each seed.

        Raises:
            ValueError: there is only one seed, which has nothing to be compared with.
        """
        if len(seeds) < 2:
            raise ValueError(
                "estimator='one_sided' compares directions with each other and needs n_spsa of 2 or more; use 'spsa' for one"
            )
        return tuple(Point(seed, epsilon) for seed in seeds)

    def project(self, answers: Answers, directions: int, epsilon: float) -> list[float]:
        """The projected gradient of the loss for each direction: 0 for all where no two points differ on any prompt, NaN where
        a direction shares no scored prompt with another.

        Raises:
            ValueError: the scores are not of `directions` points, or the answers are verdicts.
        """
        if not isinstance(answers, Scores):
            raise ValueError(
                "estimator='one_sided' compares scores, and verdicts have none; use estimator='spsa' with a judge"
            )
        losses = -answers.values.double()
        if len(losses) != directions:
            raise ValueError(f"expected scores of {directions} points, got {len(losses)}")
        scored = (~losses.isnan()).sum(dim=0)  # points, for each prompt
        known = losses[:, scored > 1]
        # Relative to the smallest, so that equal losses differ by exactly zero and tie.
        above = known - known.nan_to_num(nan=math.inf).amin(dim=0)
        n = scored[scored > 1]
        ahead = (above - above.nanmean(dim=0)) * (n / (n - 1))
        return (torch.nanmean(ahead, dim=1) / epsilon + 0.0).tolist()

    def losses(self, answers: Answers) -> tuple[float, ...]:
        """None: each step measures its own differences."""
        return ()

    def observe(self, losses: Sequence[float]) -> None:
        pass


def make_estimator(name: EstimatorName, comparison: Comparison) -> Estimator:
    """A new estimator by name. SPSA with scaled blocks asks and computes as SPSA does, at other points.

    Raises:
        ValueError: there is no such estimator or comparison.
    """
    spsa = SPSA(comparison)
    if name not in get_args(EstimatorName):
        raise ValueError(f"estimator={name!r}; choose one of {', '.join(map(repr, get_args(EstimatorName)))}")
    others: dict[str, type[OneSided] | type[OnePoint] | type[ForwardGradient]] = {
        "one_sided": OneSided,
        "one_point": OnePoint,
        "forward_gradient": ForwardGradient,
    }
    return others[name]() if name in others else spsa


def _preferences(verdicts: Verdicts, directions: int) -> list[list[float]]:
    """For each direction one preference per verdict: +1 its plus side, −1 its minus side, 0 neither, NaN no opinion."""
    preferences: list[list[float]] = [[] for _ in range(directions)]
    for verdict in verdicts.items:
        direction, side = divmod(verdict.point_a, 2)
        if not 0 <= direction < directions or verdict.point_b != 2 * direction + (1 - side):
            raise ValueError(
                f"a verdict compares points {verdict.point_a} and {verdict.point_b}, not two sides of a direction"
            )
        preference = verdict.choice.preference
        preferences[direction].append(preference if side == 0 else -preference)
    return preferences
