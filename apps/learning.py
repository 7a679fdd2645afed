"""How verdicts become updates of the model: directly, or by replay.

Direct: the two answers of a pair are those of θ+εz and θ−εz, and the verdicts on them give the loss difference of one step.

Replay: the two answers are samples of the current model. The newest decided pairs are kept, and each step draws some of
them. It finds out, by forward passes alone, which of θ+εz and θ−εz makes the preferred answers likelier
(`zorl.preference_replay`). No click is wasted on an uninformative direction, and each is used many times.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from zorl.answer_logits import TokenAnswer
from zorl.directions import derive_seed
from zorl.generation import Generation
from zorl.mezo import MeZO
from zorl.preference_replay import Preference, PreferenceReplay
from zorl.probe import CENTRE, Choice, Probe, Verdict, Verdicts
from zorl.prompts import Answer
from zorl.rewards.judgment_records import AUTOMATIC, JudgedPair, NewPair, StoredProbe, Vote
from zorl.rewards.majority import majority
from zorl.trajectory import Record

_PAIRS_PER_UPDATE = 4  # newly judged pairs per update of replay


class Learner(Protocol):
    ahead: int  # probes that may be open at once

    def pairs(self, prompts: Sequence[str], ahead: int, noise_seed: int) -> tuple[list[NewPair], dict[str, Any]]:
        """The pairs for people to compare, for the step `ahead` steps from now; and what the store keeps (epsilon and seeds)."""

    def learn(self, stored: StoredProbe, votes: Sequence[Vote], judged: Sequence[JudgedPair]) -> list[Record]:
        """Updates the model with the votes on a probe, and returns a record of each update.

        Args:
            stored: the probe.
            votes: the votes on it; empty if it has expired.
            judged: all judged pairs of the run that were not undone, including those of this probe, oldest first.
        """


class Direct:
    """Makes one step from the verdicts on the two sides of each direction (see `zorl.estimators`)."""

    ahead = 2  # one that is being judged, and the next; a third would come from a model that is too old

    def __init__(self, mezo: MeZO, policy: Generation) -> None:
        self.mezo, self.policy = mezo, policy

    def pairs(self, prompts: Sequence[str], ahead: int, noise_seed: int) -> tuple[list[NewPair], dict[str, Any]]:
        probe = self.mezo.ask(ahead)
        rows = [{"prompt": prompt} for prompt in prompts]
        found = []
        for direction in range(len(probe.seeds)):
            mine = list(range(direction, len(rows), len(probe.seeds)))
            points = probe.points[2 * direction : 2 * direction + 2]
            plus, minus = self.policy.answers([rows[i] for i in mine], points, noise_seed=noise_seed)
            found += [
                NewPair(direction, i, prompts[i], text(a), text(b)) for i, a, b in zip(mine, plus, minus, strict=True)
            ]
        return found, {"epsilon": probe.epsilon, "seeds": probe.seeds}

    def learn(self, stored: StoredProbe, votes: Sequence[Vote], judged: Sequence[JudgedPair]) -> list[Record]:
        points = self.mezo.estimator.points(stored.seeds, stored.epsilon)
        # Always from the store: probes of this process and of an earlier one are treated alike.
        probe = self.mezo.reopen(Probe(stored.id, stored.step, stored.epsilon, stored.seeds, points, stored.made_at))
        verdicts = [Verdict(2 * v.direction, 2 * v.direction + 1, v.row, v.choice) for v in votes]
        nobody = [Verdict(2 * i, 2 * i + 1, 0, Choice.ABSTAIN) for i in range(len(stored.seeds))]
        record = self.mezo.tell(probe.id, Verdicts(tuple(verdicts or nobody)))
        self.mezo.step()
        return [record]


class Replay:
    """Makes steps from all pairs decided so far (see `zorl.preference_replay`)."""

    ahead = 6  # preferences between answers of a slightly older model are useful too, and nobody has to wait

    def __init__(self, mezo: MeZO, policy: Generation, replay: PreferenceReplay) -> None:
        self.mezo, self.policy, self.replay = mezo, policy, replay

    def pairs(self, prompts: Sequence[str], ahead: int, noise_seed: int) -> tuple[list[NewPair], dict[str, Any]]:
        rows = [{"prompt": prompt} for prompt in prompts]
        first, second = (
            self.policy.answers(rows, [CENTRE], noise_seed=derive_seed(noise_seed, "answer", i))[0] for i in range(2)
        )
        ids = self.policy.prompt_ids(rows)
        return [
            NewPair(0, i, prompt, text(a), text(b), json.dumps([ids[i], a.completion_ids, b.completion_ids]))
            for i, (prompt, a, b) in enumerate(zip(prompts, first, second, strict=True))
        ], {}

    def learn(self, stored: StoredProbe, votes: Sequence[Vote], judged: Sequence[JudgedPair]) -> list[Record]:
        self.replay.pairs = []
        self.replay.add([preference for pair in judged if (preference := preference_of(pair)) is not None])
        # Several votes on one pair make one preference; identical answers were not shown to anybody.
        shown = len({vote.pair for vote in votes if vote.rater != AUTOMATIC})
        updates = max(1, shown // _PAIRS_PER_UPDATE) if shown and self.replay.pairs else 0
        return [self.replay.step(self.mezo) for _ in range(updates)]


def preference_of(pair: JudgedPair) -> Preference | None:
    """The answer that the raters prefer; None if they prefer neither, or an answer is empty."""
    choice = majority(vote.choice for vote in pair.votes)
    prompt, plus, minus = (tuple(ids) for ids in json.loads(pair.tokens))
    if choice not in (Choice.FIRST, Choice.SECOND) or not plus or not minus:
        return None
    answers = TokenAnswer(prompt, plus), TokenAnswer(prompt, minus)
    return Preference(*(answers if choice is Choice.FIRST else answers[::-1]))


def text(answer: Answer) -> str:
    """The answer as people are shown it."""
    assert isinstance(answer.completion, str)
    return answer.completion.strip()
