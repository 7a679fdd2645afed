"""Judges that are not people: a reward function, a classifier or a language model compares the answers.

Each is a `zorl.judge_objective.Judge`, and takes the place of any other: `judge(prompts=, first=, second=, **columns)` → choices.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zorl.devices import best_device
from zorl.probe import CENTRE, Choice
from zorl.prompts import Prompt
from zorl.reward_functions import RewardFunction, RewardFunctions
from zorl.reward_models import Messages, text_of

if TYPE_CHECKING:
    from torch import nn

    from zorl.rewards.classifier import Output

_QUESTION = "Which of two answers to a prompt is better?"
_PAIR = "Prompt:\n{prompt}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\nThe better answer is {mask}"


class RewardJudge:
    """The answer with the higher reward wins; equal rewards tie; without one (None) it abstains.

    With `noise` and `ties` it simulates a person. The verdict on a pair depends only on the seed, the prompt and the two answers:
    it is the same when they are asked about again, and in the other order.

    Args:
        reward_func: with TRL's signature, one number per completion. It gets no token ids, because a judge sees none.
        noise: the share of preferences that are reversed.
        ties: the share of pairs that are called a tie, whatever the rewards.
        seed: seeds noise and ties.

    Raises:
        ValueError: a share is not in [0, 1].
    """

    def __init__(self, reward_func: RewardFunction, noise: float = 0.0, ties: float = 0.0, seed: int = 0) -> None:
        for name, share in (("noise", noise), ("ties", ties)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is a share and must lie in [0, 1], got {share!r}")
        self._rewards = RewardFunctions(reward_func)
        self.noise = noise
        self.ties = ties
        self.seed = seed
        self.__name__ = f"reward:{self._rewards.names[0]}"

    def __call__(
        self,
        prompts: Sequence[Any],
        first: Sequence[Any],
        second: Sequence[Any],
        *,
        request_id: str | None = None,
        **columns: Sequence[Any],
    ) -> list[Choice]:
        """A choice for each pair.

        Raises:
            RewardError: the function raised, or returned something that is not a reward.
            ValueError: it scores the whole batch with one number.
        """
        if not prompts:
            return []
        scored = self._rewards(
            prompts=[*prompts, *prompts],
            completions=[*first, *second],
            completion_ids=[[] for _ in range(2 * len(prompts))],
            columns={name: [*column, *column] for name, column in columns.items()},
        )
        if scored.set_level:
            raise ValueError(
                f"reward function {self._rewards.names[0]!r} gives one number for a whole batch; a judge needs one for "
                "each answer, to tell which of two is better"
            )
        rewards = scored.total.tolist()
        return [
            self._opinion(*pair) for pair in zip(prompts, first, second, rewards, rewards[len(prompts) :], strict=False)
        ]

    def _opinion(self, prompt: Any, first: Any, second: Any, reward: float, other: float) -> Choice:
        choice = _higher(reward, other)
        if choice is Choice.ABSTAIN:
            return choice
        tie, turn = _draws(self.seed, prompt, first, second)
        if tie < self.ties:
            return Choice.TIE
        return choice.flipped if turn < self.noise else choice


class ClassifierJudge:
    """The answer to which a classifier gives more of one label wins.

    Args:
        model: a `transformers` sequence classifier (name, path or module) or a fitted scikit-learn estimator over texts.
        label: the label; None for a model with a single logit.
        output: what is compared; see `zorl.rewards.classifier`. The logarithm keeps answers apart where probabilities
            round to one.
        include_prompt: read prompt and answer as one text.
        processing_class: the model's tokenizer; by default the one saved with it.
        batch_size: texts per forward.

    Raises:
        ValueError: the model cannot be loaded, or lacks the label.
        TypeError: it is neither.
    """

    def __init__(
        self,
        model: str | Path | nn.Module | Any,
        label: str | int | None = None,
        *,
        output: Output = "log_probability",
        include_prompt: bool = False,
        processing_class: Any = None,
        batch_size: int = 32,
    ) -> None:
        from zorl.rewards.classifier import classifier

        reward = classifier(
            model,
            label,
            output=output,
            include_prompt=include_prompt,
            processing_class=processing_class,
            batch_size=batch_size,
        )
        self._judge = RewardJudge(reward)
        self.__name__ = f"classifier:{self._judge.__name__.removeprefix('reward:')}"

    def __call__(
        self, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any], **columns: Any
    ) -> list[Choice]:
        """A choice for each pair."""
        return self._judge(prompts=prompts, first=first, second=second)


class LanguageModelJudge:
    """A language model reads each pair in both orders and says A or B; its preference for a letter cancels out.

    The first answer wins where the log-likelihoods of the letters, log p(A) − log p(B), are higher on average with it as A
    than with it as B (both orders, as in Zheng et al. 2023, "Judging LLM-as-a-Judge", section 3.4).

    Args:
        model: a causal or masked language model: a name, a path or the module.
        question: the question that precedes the pair.
        chat: apply the tokenizer's chat template; by default if it has one.
        tie_below: the pair is a tie unless the mean over both orders exceeds this, in nats; by default, rounding error.
        processing_class: the model's tokenizer; by default the one saved with it.
        batch_size: pairs per forward, each in one order.

    Raises:
        ValueError: `tie_below` is negative, or a module does not say where its tokenizer is.
        OSError: there is no such model.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        question: str = _QUESTION,
        chat: bool | None = None,
        tie_below: float = 1e-4,
        processing_class: Any = None,
        batch_size: int = 16,
    ) -> None:
        # These load transformers, which a RewardJudge does not need.
        from zorl.models import load_model, load_processing_class
        from zorl.parameters import ParameterSet, plain_parameters
        from zorl.perturbation import Scratch
        from zorl.scoring import LabelWords

        if not tie_below >= 0:
            raise ValueError(f"tie_below must be at least 0, got {tie_below!r}")
        named = isinstance(model, str | Path)
        source = str(model) if named else str(getattr(getattr(model, "config", None), "_name_or_path", ""))
        if processing_class is None and not source:
            raise ValueError("the model does not say where its tokenizer is; pass it as processing_class")
        module: Any = load_model(str(model)) if named else model
        if named:
            module.to(best_device())
        tokenizer = processing_class if processing_class is not None else load_processing_class(source)
        talks = tokenizer.chat_template is not None if chat is None else chat
        literal = question.replace("{", "{{").replace("}", "}}")
        prompt = Prompt(f"{literal}\n\n{_PAIR}", {"first": "A", "second": "B"}, chat=talks)
        # Nothing is tuned: the model is read where it is, at offset 0.
        evaluator = Scratch(module, ParameterSet(plain_parameters(module)))
        self._scorer = LabelWords(evaluator, tokenizer, prompt, batch_size=batch_size)
        self.tie_below = tie_below
        self.__name__ = f"model:{source.rstrip('/').split('/')[-1] or type(module).__name__}"

    def __call__(
        self, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any], **columns: Any
    ) -> list[Choice]:
        """A choice for each pair.

        Raises:
            FloatingPointError: the model's scores are NaN.
        """
        if not prompts:
            return []
        asked = [_readable(prompt) for prompt in prompts]
        pairs = [(text_of(one), text_of(other)) for one, other in zip(first, second, strict=True)]
        orders = [pairs, [pair[::-1] for pair in pairs]]
        rows = [
            {"prompt": prompt, "first": a, "second": b}
            for order in orders
            for prompt, (a, b) in zip(asked, order, strict=True)
        ]
        scores = self._scorer.scores(rows, [CENTRE])[0].double()  # (2 · pairs, letters)
        if scores.isnan().any():
            raise FloatingPointError(f"the judge {self.__name__} gives NaN: its weights are out of range")
        odds = (scores[:, 0] - scores[:, 1]).view(2, -1)  # (orders, pairs): how much A is preferred to B
        margins = ((odds[0] - odds[1]) / 2).tolist()
        return [Choice.TIE if abs(margin) <= self.tie_below else _higher(margin, 0.0) for margin in margins]


def _higher(first: float, second: float) -> Choice:
    """The choice of the higher number; NaN abstains."""
    if first == second:
        return Choice.TIE
    return Choice.FIRST if first > second else Choice.SECOND if first < second else Choice.ABSTAIN


def _draws(seed: int, prompt: Any, first: Any, second: Any) -> tuple[float, float]:
    """Two numbers in [0, 1) that a prompt and two answers determine, whatever the order of the answers."""
    answers = sorted(json.dumps(answer, sort_keys=True) for answer in (first, second))
    text = json.dumps([seed, json.dumps(prompt, sort_keys=True), *answers])
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    tie, turn = (int.from_bytes(part, "little") / 2.0**64 for part in (digest[:8], digest[8:]))
    return tie, turn


def _readable(prompt: str | Messages) -> str:
    """A prompt as text; a conversation with the role before each message."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
