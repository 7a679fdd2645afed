"""Past verdicts replayed: a loss on the pairs that somebody has judged, for probes that cost nobody a click.

A verdict on a probe is used up by the step that it decides. But it also says which of two texts is preferred, and how likely both
are can be read at any point around θ. The loss of a judged pair is that of direct preference optimisation
(Rafailov et al. 2023, eq. 7), from forward passes alone. With m the log-likelihood of the preferred answer less that of
the other, in excess of what it is in the starting model,

    L(θ) = −log σ(β·m(θ)) / β + brake · KL(θ ‖ start)

Divided by β the loss falls by half a nat for each nat of m at first, and levels off where m exceeds about 1/β: a pair
counts as learnt. KL is the exact divergence between the two models' next-token distributions, summed over an answer's
tokens and averaged over both answers: it brakes drift where the verdicts do not pay for it.

A person compared two texts, not the points that are compared here. There is no model of what people like either: the verdicts
themselves are the loss, and a pair that nobody judged has none. To MeZO these are scores like any others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zorl.answer_logits import AnswerLogits, TokenAnswer, answer_sums, chosen, divergence
from zorl.directions import derive_seed
from zorl.mezo import MeZO
from zorl.objectives import Asked
from zorl.probe import Point, Scores
from zorl.trajectory import Record


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to a prompt, of which the first was preferred. Ties teach nothing here and are left out."""

    preferred: TokenAnswer
    other: TokenAnswer


class PreferenceReplay:
    """The loss of judged pairs at points around θ.

    Args:
        current: reads answers at points of the model that is tuned.
        start: reads answers in the starting model (see `zorl.drift.starting_evaluator`); with the same temperature.
        beta: β: the larger, the sooner a pair counts as learnt.
        brake: the cost of a nat of KL per answer.
        batch_size: the most pairs per probe.
        capacity: the most pairs to keep; the newest are kept.
        seed: seeds the choice of pairs for each probe.

    Raises:
        ValueError: an argument is out of its range, or the temperatures differ.
    """

    def __init__(
        self,
        current: AnswerLogits,
        start: AnswerLogits,
        *,
        beta: float = 0.1,
        brake: float = 0.05,
        batch_size: int = 16,
        capacity: int = 1000,
        seed: int = 0,
    ) -> None:
        if not 0 < beta < math.inf:
            raise ValueError(f"beta must be a positive number, got {beta!r}")
        if not 0 <= brake < math.inf:
            raise ValueError(f"brake must be 0 or a positive number, got {brake!r}")
        for name, count in (("batch_size", batch_size), ("capacity", capacity)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if current.temperature != start.temperature:
            raise ValueError(
                f"the current model is read at temperature {current.temperature} and the starting one at"
                f" {start.temperature}; they must be the same"
            )
        self.current, self.start = current, start
        self.beta, self.brake = beta, brake
        self.batch_size, self.capacity, self.seed = batch_size, capacity, seed
        self.pairs: list[Preference] = []

    def add(self, pairs: Sequence[Preference]) -> None:
        """Adds verdicts; if there are too many, the oldest are dropped."""
        self.pairs = [*self.pairs, *pairs][-self.capacity :]
        if len(self.pairs) == self.capacity:
            kept = [answer for pair in self.pairs for answer in (pair.preferred, pair.other)]
            self.current.forget(kept)
            self.start.forget(kept)

    def ask(self, points: Sequence[Point], step: int) -> Asked:
        """Scores of the points on pairs drawn for this step, the same pairs at each point.

        Raises:
            ValueError: there are no judged pairs yet.
        """
        if not self.pairs:
            raise ValueError("nothing has been judged yet, so there is nothing to replay")
        pairs = self._drawn(step)
        answers = [*(pair.preferred for pair in pairs), *(pair.other for pair in pairs)]
        before = self.start.log_probabilities(answers)  # (places, vocabulary)
        own = chosen(before, answers)
        losses, margins, drifts = [], [], []
        for point in points:
            now = self.current.log_probabilities(answers, point)
            gained = answer_sums(chosen(now, answers) - own, answers)  # (2 · pairs,)
            margin = gained[: len(pairs)] - gained[len(pairs) :]
            loss = -torch.nn.functional.logsigmoid(self.beta * margin) / self.beta
            if self.brake:
                kl = answer_sums(divergence(now, before), answers)
                drifts.append(kl)
                loss = loss + self.brake * (kl[: len(pairs)] + kl[len(pairs) :]) / 2
            losses.append(loss)
            margins.append(margin)
        figures = {
            "replay/loss": torch.stack(losses).mean().item(),
            "replay/agreement": (torch.stack(margins) > 0).float().mean().item(),
        }
        if drifts:
            figures["replay/kl"] = torch.stack(drifts).sum().item() / (len(before) * len(points))
        return Asked(Scores.of_losses(torch.stack(losses)), figures)

    def step(self, mezo: MeZO) -> Record:
        """One step of MeZO on judged pairs: ask, evaluate, tell, step. Returns what the trajectory holds of it.

        Raises:
            ValueError: there are no judged pairs yet.
        """
        probe = mezo.ask()
        record = mezo.tell(probe.id, self.ask(probe.points, probe.step).answers)
        mezo.step()
        return record

    def _drawn(self, step: int) -> list[Preference]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "replay", step))
        order = torch.randperm(len(self.pairs), generator=generator).tolist()
        return [self.pairs[i] for i in order[: self.batch_size]]
