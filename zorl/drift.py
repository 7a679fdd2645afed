"""How far tuning has carried a model from where it started, measured by forward passes.

A reward or a judge can be pleased by text that falls apart, so what a run gains is worth what it keeps. The measure is
KL(π_θ ‖ π_θ₀) a token, estimated on answers that the tuned model itself wrote: the mean of log π_θ(y|x) − log π_θ₀(y|x)
(the penalty of Ziegler et al. 2019, eq. 2, without a reward model around it).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zorl.generation import Generation
from zorl.parameters import ParameterSet
from zorl.probe import CENTRE, Point
from zorl.prompts import Answer

T = TypeVar("T")


class StartingModel:
    """The model as it is now, whatever becomes of it: an evaluator that knows one point.

    Copies the tuned parameters and shares everything else with the model.

    Args:
        model: before its first step.
        parameters: the tuned ones, taken from this model.
    """

    def __init__(self, model: nn.Module, parameters: ParameterSet) -> None:
        memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        memo |= {id(t): nn.Parameter(t.detach().clone(), requires_grad=False) for t in parameters.values()}
        self.module: Any = copy.deepcopy(model, memo=memo).eval()

    @torch.no_grad()
    def evaluate(self, point: Point, forward: Callable[[], T], *, head_rows: Tensor | None = None) -> T:
        """The result of `forward()`.

        Raises:
            ValueError: the point is not the centre.
        """
        if point.offset != 0.0:
            raise ValueError(f"the starting model stays where it is; it cannot go to offset {point.offset}")
        return forward()


def drift(policy: Generation, start: Generation, rows: Sequence[Mapping[str, Any]], answers: Sequence[Answer]) -> float:
    """KL divergence of the tuned model from the starting one, in nats a token; NaN where all answers are empty.

    Args:
        policy: answers at θ.
        start: answers with the starting model.
        rows: prompts.
        answers: of the tuned model to these prompts.
    """
    now, before = (p.log_likelihoods(rows, answers, [CENTRE])[0] for p in (policy, start))
    tokens = sum(len(answer.completion_ids) for answer in answers)
    return (now - before).sum().item() / tokens if tokens else float("nan")
