"""What a run follows: rewards, a judge or a loss, with the settings and the objective that follow from it."""

from __future__ import annotations

import copy
import hashlib
import inspect
from dataclasses import dataclass
from typing import Any

from zorl import processes
from zorl.choosing import Choosing
from zorl.config import MeZOConfig
from zorl.expected_reward import LabelReward
from zorl.generation import Generation
from zorl.judge_objective import Judge, JudgeObjective
from zorl.label_loss import LabelLoss
from zorl.loss_objectives import CallableLoss, CrossEntropy, LossFunction
from zorl.objectives import Objective
from zorl.policies import Policy
from zorl.prompts import Prompt
from zorl.reward_functions import RewardFunctions
from zorl.reward_objective import RewardObjective
from zorl.teacher_forcing import TeacherForcing


@dataclass(frozen=True, slots=True)
class Goal:
    """Exactly one of rewards, a judge and a loss.

    Args:
        rewards: functions whose sum is maximised.
        judge: compares two completions.
        loss: `"cross_entropy"`, or a function of the model and the rows that is minimised.
        metrics: functions that are recorded at evaluations and never optimised.

    Raises:
        ValueError: not exactly one of rewards, judge and loss is given.
    """

    rewards: RewardFunctions | None = None
    judge: Judge | None = None
    loss: str | LossFunction | None = None
    metrics: RewardFunctions | None = None

    def __post_init__(self) -> None:
        goals = {"reward_funcs": self.rewards, "judge": self.judge, "loss": self.loss}
        given = [name for name, value in goals.items() if value is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise ValueError(f"give exactly one of reward_funcs, judge and loss: got {found}")

    def settings(self, args: MeZOConfig, prompt: Prompt) -> MeZOConfig:
        """The settings with what the goal decides: the estimator of a judge, and greedy decoding of text that is taught.

        Raises:
            ValueError: the estimator cannot follow this goal.
        """
        if self.judge is not None:
            args = args.judged()
            if args.estimator in ("one_sided", "one_point"):
                raise ValueError(
                    f"a judge compares two sides of a direction, and estimator={args.estimator!r} looks at one: use "
                    "estimator='spsa', or a reward or loss in place of the judge"
                )
        if args.estimator == "forward_gradient":
            if processes.count() > 1:
                raise ValueError("estimator='forward_gradient' runs in one process; with several use estimator='spsa'")
            if self.loss is None:
                raise ValueError(
                    "estimator='forward_gradient' differentiates a loss, and a reward or a judge has no slope: use "
                    "estimator='spsa', or give a loss"
                )
        if self.loss == "cross_entropy" and not prompt.chooses:
            args = copy.copy(args)
            args.temperature = 0.0  # taught token by token, nothing is sampled
        return args

    def sha256(self) -> str:
        """The SHA-256 of the source of what the run follows and records; of what has none, its type's name."""
        functions = [function for of in (self.rewards, self.metrics) if of is not None for function in of.funcs]
        functions += [part for part in (self.judge, self.loss) if callable(part)]
        digest = hashlib.sha256()
        for function in functions:
            code: Any = function if inspect.isroutine(function) else type(function)
            try:
                digest.update(inspect.getsource(code).encode())
            except (OSError, TypeError):  # made at a prompt, or compiled
                digest.update(code.__qualname__.encode())
        return digest.hexdigest()

    def objective(
        self, policy: Policy, *, label_column: str = "label", label_reward: LabelReward = "expected"
    ) -> Objective:
        """The objective, with answers from a policy.

        Raises:
            ValueError: `loss` is neither a function nor `"cross_entropy"`, or the policy cannot tell how likely an answer is.
        """
        if self.rewards is not None:
            return RewardObjective(policy, self.rewards, self.metrics, label_reward)
        if self.judge is not None:
            return JudgeObjective(policy, self.judge, self.metrics)
        if callable(self.loss):
            return CallableLoss(policy, self.loss, self.metrics)
        if self.loss != "cross_entropy":
            raise ValueError(f"loss must be 'cross_entropy' or a function of (model, rows), got {self.loss!r}")
        if isinstance(policy, Generation):
            return CrossEntropy(policy, TeacherForcing(policy, label_column), self.metrics)
        if not isinstance(policy, Choosing):
            raise ValueError(
                f"loss='cross_entropy' needs a policy that scores what is right, and {type(policy).__name__} does not"
            )
        return CrossEntropy(policy, LabelLoss(policy, label_column), self.metrics)
