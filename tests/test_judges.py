"""Judges that are no people: rewards, classifiers and language models compare answers."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from transformers import BertConfig, BertForSequenceClassification

from zorl.judge_objective import Judge, JudgeObjective
from zorl.probe import Choice, Point
from zorl.prompts import Answer, Prompt
from zorl.reward_functions import RewardError
from zorl.rewards import ClassifierJudge, HumanJudge, LanguageModelJudge, RewardJudge, f1, load_judge

pytestmark = pytest.mark.usefixtures("one_thread")

F, S, T, A = Choice.FIRST, Choice.SECOND, Choice.TIE, Choice.ABSTAIN


def shortness(completions: Sequence[str], **columns: Any) -> list[float | None]:
    return [None if text == "?" else -float(len(text)) for text in completions]


def linear_classifier() -> Any:
    texts = ["a great film", "great story", "a terrible film", "terrible plot"]
    return make_pipeline(CountVectorizer(), LogisticRegression(C=100)).fit(texts, ["good", "good", "bad", "bad"])


# --- one contract for all judges --------------------------------------------------------------------------------------


@pytest.fixture(params=["reward", "noisy reward", "classifier", "language model", "masked language model"])
def judge(request: pytest.FixtureRequest, parts: Callable[[str], Any]) -> Judge:
    if request.param == "reward":
        return RewardJudge(shortness)
    if request.param == "noisy reward":
        return RewardJudge(shortness, noise=0.3, ties=0.2, seed=1)
    if request.param == "classifier":
        return ClassifierJudge(linear_classifier(), "good")
    part = parts("gpt2" if request.param == "language model" else "bert")
    return LanguageModelJudge(part.model, processing_class=part.tokenizer, question="Which is better?")


FIRST = ["a great film", "it was terrible", "odd", "the same", "yes", "great plot"]
SECOND = ["a terrible plot", "great", "an odd story", "the same", "no", "bad"]


def test_a_judge_has_one_opinion_in_either_order_and_of_any_batch(judge: Judge) -> None:
    prompts = [f"what was it like, {i}?" for i in range(len(FIRST))]
    there = judge(prompts=prompts, first=FIRST, second=SECOND, request_id="1", label=["x"] * 6)
    back = judge(prompts=prompts, first=SECOND, second=FIRST, request_id="2", label=["x"] * 6)
    assert [Choice(choice).flipped for choice in back] == list(there)
    alone = [
        judge(prompts=[p], first=[a], second=[b], request_id="3", label=["x"])[0]
        for p, a, b in zip(prompts, FIRST, SECOND, strict=True)
    ]
    assert alone == list(there)
    assert there[3] is T
    assert {F, S} & {*there}
    assert list(judge(prompts=[], first=[], second=[], request_id="4")) == []


# --- rewards ----------------------------------------------------------------------------------------------------------


def test_the_higher_reward_wins_equal_ones_tie_and_none_abstains() -> None:
    judge = RewardJudge(shortness)
    choices = judge(prompts=["p"] * 5, first=["a", "bb", "a", "?", "a"], second=["bb", "a", "b", "a", "?"])
    assert choices == [F, S, T, A, A]
    assert judge.__name__ == "reward:shortness"


def test_a_reward_gets_the_columns_of_its_answers() -> None:
    def right(completions: Sequence[str], label: Sequence[str], prompts: Sequence[str]) -> list[float]:
        assert len(prompts) == len(label) == len(completions)
        return [float(answer == truth) for answer, truth in zip(completions, label, strict=True)]

    judge = RewardJudge(right)
    choices = judge(
        prompts=["p", "q"], first=["good", "good"], second=["bad", "bad"], label=["good", "bad"], request_id="1"
    )
    assert choices == [F, S]
    with pytest.raises(RewardError, match="needs a column 'label'"):
        judge(prompts=["p"], first=["good"], second=["bad"])


def test_noise_and_ties_are_shares_that_belong_to_a_pair_of_answers() -> None:
    n = 4000
    prompts, first, second = [f"p{i}" for i in range(n)], ["a"] * n, ["bb"] * n
    judge = RewardJudge(shortness, noise=0.1, ties=0.2, seed=7)
    choices = judge(prompts=prompts, first=first, second=second)
    assert choices.count(T) / n == pytest.approx(0.2, abs=0.02)
    assert choices.count(S) / (n - choices.count(T)) == pytest.approx(0.1, abs=0.02)
    assert judge(prompts=prompts, first=first, second=second) == choices
    assert RewardJudge(shortness, 0.1, 0.2, seed=8)(prompts=prompts, first=first, second=second) != choices
    unsure = RewardJudge(shortness, 1.0, 1.0)(prompts=["p"] * 2, first=["?", "a"], second=["a", "a"])
    assert unsure == [A, T]  # who has no opinion has none, with noise or without


def test_a_reward_that_cannot_judge_is_refused() -> None:
    with pytest.raises(ValueError, match="gives one number for a whole batch"):
        RewardJudge(f1())(prompts=["p"], first=["1"], second=["0"], label=["1"])
    for options in ({"noise": 1.5}, {"ties": -0.1}, {"noise": math.nan}):
        with pytest.raises(ValueError, match="is a share and must lie in"):
            RewardJudge(shortness, **options)


# --- classifiers ------------------------------------------------------------------------------------------------------


def test_a_classifier_prefers_what_has_more_of_its_label(parts: Callable[[str], Any]) -> None:
    pairs = {"prompts": ["p"] * 3, "first": ["great", "terrible", "story"], "second": ["terrible", "great", "story"]}
    assert ClassifierJudge(linear_classifier(), "good")(**pairs) == [F, S, T]
    assert ClassifierJudge(linear_classifier(), "bad")(**pairs) == [S, F, T]
    with pytest.raises(ValueError, match="has several labels; choose the rewarded one"):
        ClassifierJudge(linear_classifier())
    torch.manual_seed(0)
    tokenizer = parts("bert").tokenizer
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        num_labels=1, initializer_range=0.3,
    )  # fmt: skip
    judge = ClassifierJudge(BertForSequenceClassification(config), processing_class=tokenizer)
    assert {*judge(**pairs)} == {F, S, T}
    assert judge.__name__.startswith("classifier:")


# --- language models --------------------------------------------------------------------------------------------------


def test_the_liking_for_a_letter_or_a_place_cancels_out(parts: Callable[[str], Any]) -> None:
    """A model that says A whatever it reads has no opinion; one that likes a word has it in both orders."""
    part = parts("gpt2")
    judge = LanguageModelJudge(part.model, processing_class=part.tokenizer)

    class Reader:
        """Stands for a model: log p of (A, B) from what it reads."""

        def __init__(self, likes: str) -> None:
            self.likes = likes

        def scores(self, rows: Sequence[Any], points: Sequence[Point]) -> torch.Tensor:
            logits = [[5.0 + (self.likes in row["first"]), 0.0 + (self.likes in row["second"])] for row in rows]
            return torch.tensor([logits]).log_softmax(dim=-1)

    judge._scorer = Reader("nothing")  # type: ignore[assignment]
    pairs = {"prompts": ["p", "p"], "first": ["great", "bad"], "second": ["bad", "great"]}
    assert judge(**pairs) == [T, T]
    judge._scorer = Reader("great")  # type: ignore[assignment]
    assert judge(**pairs) == [F, S]
    judge.tie_below = 1.1
    assert judge(**pairs) == [T, T]


def test_a_language_model_reads_conversations_and_uses_its_chat_template(parts: Callable[[str], Any]) -> None:
    part = parts("qwen2")
    judge = LanguageModelJudge(part.model, processing_class=part.tokenizer, question="Which {one} is better?")
    assert judge._scorer.prompt.chat
    talk = [{"role": "user", "content": "what was it like?"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("great", "an odd story")]
    choices = judge(prompts=[talk], first=answers[:1], second=answers[1:])
    assert choices == [choice.flipped for choice in judge(prompts=[talk], first=answers[1:], second=answers[:1])]


def test_a_language_model_that_cannot_judge_is_refused(parts: Callable[[str], Any]) -> None:
    part = parts("gpt2")
    with pytest.raises(ValueError, match="tie_below must be at least 0"):
        LanguageModelJudge(part.model, processing_class=part.tokenizer, tie_below=-1)
    with pytest.raises(ValueError, match="does not say where its tokenizer is"):
        LanguageModelJudge(type(part.model)(part.model.config))


# --- the objective ----------------------------------------------------------------------------------------------------


class Recited:
    """A policy whose answers are written down: [point][row]."""

    prompt = Prompt("{text}")
    evaluator: Any = None

    def answers(self, rows: Sequence[Any], points: Sequence[Point], *, noise_seed: int = 0) -> list[list[Answer]]:
        return [[Answer(f"{point.offset:+}", []) for _ in rows] for point in points]


def test_a_judge_is_told_the_request_and_the_columns() -> None:
    told: list[dict[str, Any]] = []

    def judge(**keywords: Any) -> list[Choice]:
        told.append(keywords)
        return [T] * len(keywords["prompts"])

    objective = JudgeObjective(Recited(), judge)
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    for seed in (5, 6, 5):
        objective.ask(rows, [Point(1, 0.5), Point(1, -0.5)], seed)
    assert {*told[0]} == {"prompts", "first", "second", "request_id", "text", "label"}
    assert [keywords["request_id"] == told[0]["request_id"] for keywords in told] == [True, False, True]
    assert isinstance(told[0]["request_id"], str)
    for name in ("request_id", "first"):
        with pytest.raises(ValueError, match=f"column '{name}' has the name of an argument of judges"):
            objective.ask([{"text": "a", name: "x"}], [Point(1, 0.5), Point(1, -0.5)], 1)


# --- by name ----------------------------------------------------------------------------------------------------------


def test_judges_by_name(tmp_path: Path, parts: Callable[[str], Any]) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def kind(completions, **columns): return [float('please' in c) for c in completions]\n")
    judge = load_judge(f"reward:{file}:kind")
    assert judge(prompts=["p"], first=["no"], second=["yes please"]) == [S]
    judge = load_judge("reward:accuracy", column="truth")
    assert judge(prompts=["p"], first=["good"], second=["bad"], truth=["good"]) == [F]
    human = load_judge("human", judgments=tmp_path / "judgments.sqlite")
    assert isinstance(human, HumanJudge)
    human.store.close()
    part = parts("gpt2")
    part.model.save_pretrained(tmp_path / "gpt2")
    part.tokenizer.save_pretrained(tmp_path / "gpt2")
    model = load_judge(f"model:{tmp_path / 'gpt2'}")
    assert isinstance(model, LanguageModelJudge)
    assert model.__name__ == "model:gpt2"
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    tokenizer = parts("bert").tokenizer
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        **labels,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "scorer")
    tokenizer.save_pretrained(tmp_path / "scorer")
    assert load_judge(f"classifier:{tmp_path / 'scorer'},label=good").__name__ == "classifier:scorer_good"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "judgments", "expected"),
    [
        ("human", None, "needs a file to meet people in: --judgments"),
        ("reward:f1", "some.sqlite", "the judge is 'reward:f1'; leave it out"),
        ("humen", None, r"unknown judge 'humen'; did you mean 'human'\? \(a judge is human, "),
        ("classifier:", None, "the judge 'classifier:' is incomplete"),
        ("classifier:m,lable=good", None, "has no option 'lable=good'; it takes label="),
        ("reward:nothing", None, "unknown reward 'nothing'"),
        ("nowhere.py:judge", None, "there is no file 'nowhere.py'"),
        ("classifier:/no/such/model", None, "cannot load '/no/such/model'"),
    ],
)
def test_a_name_that_is_no_judge_gets_a_sentence(name: str, judgments: str | None, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        load_judge(name, judgments=judgments)


def test_rewards_load_no_database() -> None:
    code = (
        "import sys, zorl.rewards; assert not {'sqlalchemy', 'krippendorff', 'gradio'} & sys.modules.keys(); "
        "from zorl.rewards import JudgmentStore, HumanJudge; assert 'sqlalchemy' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
