"""A judge as an objective: its verdicts on the answers of the two sides of each direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from zorl import processes
from zorl.directions import derive_seed
from zorl.objectives import Asked, columns_of
from zorl.policies import Policy, Row
from zorl.probe import Choice, Point, Verdict, Verdicts
from zorl.reward_functions import RewardFunctions
from zorl.reward_objective import RewardObjective


class Judge(Protocol):
    """Compares completions without knowing where they come from.

    It is called with keywords: prompts, the two completions of each, `request_id` (a text that identifies the run and step,
    so that a judge that is asked again after a restart recognises the question), and the columns of the data set.

    If it has a method `rest()`, this is called when a run ends, however it ends.
    """

    def __call__(
        self,
        prompts: Sequence[Any],
        first: Sequence[Any],
        second: Sequence[Any],
        *,
        request_id: str,
        **columns: Any,
    ) -> Sequence[Choice | str]: ...


@dataclass(slots=True)
class JudgeObjective:
    """A judge's verdicts on the two sides of each direction. It never learns which side is which.

    Identical answers tie without being shown. The order of each pair is drawn from (seed, direction, row).
    """

    policy: Policy
    judge: Judge
    metrics: RewardFunctions | None = None

    @property
    def name(self) -> str:
        return f"judge:{getattr(self.judge, '__name__', type(self.judge).__name__)}"

    def ask(self, rows: Sequence[Row], points: Sequence[Point], noise_seed: int) -> Asked:
        answers = self.policy.answers(rows, points, noise_seed=noise_seed)
        verdicts: list[Verdict] = []
        shown: list[tuple[int, int, bool]] = []  # (index of the plus side, row, flipped)
        for plus in range(0, len(points), 2):
            for i in range(len(rows)):
                if answers[plus][i].completion == answers[plus + 1][i].completion:
                    verdicts.append(Verdict(plus, plus + 1, i, Choice.TIE))
                else:
                    shown.append((plus, i, bool(derive_seed(noise_seed, "order", plus, i) & 1)))
        if shown:
            pairs = [(answers[p][i].completion, answers[p + 1][i].completion) for p, i, _ in shown]
            ordered = [pair[::-1] if flipped else pair for pair, (_, _, flipped) in zip(pairs, shown, strict=True)]
            asked = partial(
                self.judge,
                prompts=[self.policy.prompt.render(rows[i]).prompt for _, i, _ in shown],
                first=[first for first, _ in ordered],
                second=[second for _, second in ordered],
                request_id=f"{noise_seed:016x}",
                **_columns_for_judge([rows[i] for _, i, _ in shown]),
            )
            choices = processes.first(lambda: list(asked()))
            if len(choices) != len(shown):
                raise ValueError(f"the judge gave {len(choices)} verdicts on {len(shown)} pairs")
            for (plus, i, flipped), choice in zip(shown, choices, strict=True):
                opinion = Choice(choice)
                verdicts.append(Verdict(plus, plus + 1, i, opinion.flipped if flipped else opinion))
        preferences = [verdict.choice.preference for verdict in verdicts]
        informative = sum(p in (1.0, -1.0) for p in preferences) / len(preferences)
        return Asked(Verdicts(tuple(verdicts)), {"decided_share": informative})

    def evaluate(self, rows: Sequence[Row]) -> dict[str, float]:
        return RewardObjective(self.policy, self.metrics).evaluate(rows) if self.metrics is not None else {}


def _columns_for_judge(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """The columns for a judge, without `prompt`, which is in its prompts.

    Raises:
        ValueError: a column has the name of another argument of judges.
    """
    columns = {name: column for name, column in columns_of(rows).items() if name != "prompt"}
    if clash := sorted(columns.keys() & {"prompts", "first", "second", "request_id"}):
        raise ValueError(f"data set column '{clash[0]}' has the name of an argument of judges; rename it")
    return columns
