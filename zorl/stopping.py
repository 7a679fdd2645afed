"""When to stop: where the held-out score no longer improves, or where more forward passes would probably not help.

Learning curves rise with the logarithm of what was spent, so a straight line through the last evaluations, over ln(forwards),
estimates what another doubling is worth, and its confidence interval how certain that is. Both rules are functions of the log
alone: a resumed run stops where it would have stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import linregress, t
from transformers import TrainerCallback

LEAST_LOOKS = 4  # evaluations on a line; with fewer its interval says nothing
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Outlook:
    """How a larger budget would change the held-out score, with a confidence interval.

    Attributes:
        gain: the estimated change of the score.
        low: the lower end of its 95% confidence interval.
        high: the upper end.
        looks: the number of evaluations on the line.
    """

    gain: float
    low: float
    high: float
    looks: int

    def can_be_told(self, scores: Sequence[float]) -> bool:
        """Whether the interval is narrower than the range of the scores so far; never where these are all the same."""
        seen = [score for score in scores if math.isfinite(score)]
        return self.high - self.low < max(seen) - min(seen)


def outlook(forwards: Sequence[float], scores: Sequence[float], times: float) -> Outlook | None:
    """What `times` as many forward passes would change, if the score continues as in the later half of the evaluations.

    Args:
        forwards: those spent at each evaluation, increasing; evaluations before the first one are left out.
        scores: the held-out score at each evaluation; not finite where there was none.
        times: at least 1.

    Returns:
        The outlook; None with fewer than `LEAST_LOOKS` evaluations in that half.
    """
    looks = [(math.log(n), s) for n, s in zip(forwards, scores, strict=True) if n > 0 and math.isfinite(s)]
    looks = looks[min(len(looks) // 2, max(len(looks) - LEAST_LOOKS, 0)) :]
    if len({x for x, _ in looks}) < LEAST_LOOKS:
        return None
    fitted = linregress(*zip(*looks, strict=True))
    error = 0.0 if math.isnan(fitted.stderr) else float(fitted.stderr)  # NaN: all scores are the same
    width = float(t.ppf((1.0 + CONFIDENCE) / 2.0, len(looks) - 2)) * error
    slope, ahead = float(fitted.slope), math.log(times)
    return Outlook(slope * ahead, (slope - width) * ahead, (slope + width) * ahead, len(looks))


def looks_of(history: Sequence[Mapping[str, Any]], metric: str = "eval_reward") -> tuple[list[float], list[float]]:
    """The forward passes and held-out scores of the evaluations in a Trainer's log.

    Args:
        history: the log.
        metric: the score, by its name there.
    """
    looks = [(n, entry[metric]) for entry in history if metric in entry
             for name, n in entry.items() if name.endswith("_forwards")]  # fmt: skip
    return [n for n, _ in looks], [score for _, score in looks]


class Stopping(TrainerCallback):
    """Ends training early.

    Args:
        patience: evaluations without a better held-out score after which to stop; None for no such rule.
        least_gain: stop once doubling the forward passes would raise the score by less than this, judged by the upper end of
            the interval after two evaluations in a row; None for no such rule. (The interval is that of a single look at
            independent errors. A curve that is looked at often, or whose errors hang together, is stopped wrongly more often.)
        metric: the held-out score, by its name in the log.
        greater_is_better: whether a higher score is the better one.
    """

    def __init__(
        self,
        patience: int | None,
        least_gain: float | None,
        metric: str = "eval_reward",
        *,
        greater_is_better: bool = True,
    ) -> None:
        self.patience = patience
        self.least_gain = least_gain
        self.metric = metric
        self.sign = 1.0 if greater_is_better else -1.0

    def reason(self, history: Sequence[Mapping[str, Any]]) -> str | None:
        """Why to stop now; None to continue."""
        forwards, values = looks_of(history, self.metric)
        scores = [self.sign * value for value in values]
        if self.patience is not None and len(scores) > self.patience:
            best = max(range(len(scores)), key=lambda i: scores[i] if math.isfinite(scores[i]) else -math.inf)
            if len(scores) - 1 - best >= self.patience:
                return f"none of the last {self.patience} evaluations did better than {values[best]:.4g}"
        if self.least_gain is not None:
            found, before = outlook(forwards, scores, times=2.0), outlook(forwards[:-1], scores[:-1], times=2.0)
            # Twice, because the question is asked after every evaluation: sooner or later chance alone would answer it once.
            if found is not None and before is not None and max(found.high, before.high) < self.least_gain:
                return (
                    f"doubling the forward passes would improve the held-out score by {found.gain:+.2g} "
                    f"({CONFIDENCE:.0%}: {found.low:+.2g} to {found.high:+.2g})"
                )
        return None

    def _stop(self, state: Any, control: Any) -> None:
        if self.reason(state.log_history) is not None:
            control.should_training_stop = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop(state, control)  # a run that has stopped does not get another step

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop(state, control)
