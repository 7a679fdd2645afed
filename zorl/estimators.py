"""From answers to one projected gradient per direction: an estimate of z·∇L that never saw a gradient.

The losses' *difference* is all that is used, so any answer to "by how much is one side better?" will do. Rewards become
losses here, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zorl.comparisons import COMPARISONS, Comparison, preference_difference
from zorl.probe import Answers, Point, Scores, Verdicts


@dataclass(frozen=True, slots=True)
class SPSA:
    """Simultaneous perturbation: g = [L(θ+εz) − L(θ−εz)] / 2ε (Spall 1992, eq. 2.1; MeZO, Definition 1 and Algorithm 1).

    With several seeds each is estimated on its own (n-SPSA, MeZO Algorithm 2).

    Args:
        comparison: what verdicts say of the difference of rewards: "share", "logit" or "sign" (see `zorl.comparisons`).

    Raises:
        ValueError: there is no such comparison.
    """

    comparison: Comparison = "share"

    def __post_init__(self) -> None:
        if self.comparison not in COMPARISONS:
            raise ValueError(f"comparison={self.comparison!r}; choose one of {', '.join(map(repr, COMPARISONS))}")

    def points(self, seeds: tuple[int, ...], epsilon: float) -> tuple[Point, ...]:
        """θ + εz and θ − εz for each seed in turn."""
        return tuple(Point(seed, sign * epsilon) for seed in seeds for sign in (1.0, -1.0))

    def project(self, answers: Answers, directions: int, epsilon: float) -> list[float]:
        """One projected gradient of the loss a direction: NaN where nobody had an opinion, 0 where the sides tie.

        Scores: prompts on which a side abstained are left out, the others averaged. Verdicts: `comparison` makes them a
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
        else:
            differences = [preference_difference(p, self.comparison) for p in _preferences(answers, directions)]
        # A reward is a negative loss, so the loss difference is the reward difference with its sign turned.
        return [-difference / (2.0 * epsilon) + 0.0 for difference in differences]


def _preferences(verdicts: Verdicts, directions: int) -> list[list[float]]:
    """Of each direction, one a verdict: +1 for its plus side, −1 for its minus side, 0 for neither, NaN for no opinion."""
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
