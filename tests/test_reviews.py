"""The demonstration task and its model: fair splits, no give-away words, and a gap that tuning can close."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from zorl.apps.embedded import REVIEWER
from zorl.parameters import ParameterSet, select
from zorl.perturbation import Scratch
from zorl.probe import CENTRE
from zorl.prompts import Prompt
from zorl.scoring import LabelWords
from zorl.tasks import reviews


def test_the_same_seed_gives_the_same_reviews_and_another_seed_others() -> None:
    first, again, other = reviews.load(50, 20, seed=1), reviews.load(50, 20, seed=1), reviews.load(50, 20, seed=2)
    assert first[0]["text"] == again[0]["text"]
    assert first[1]["text"] == again[1]["text"]
    assert first[0]["text"] != other[0]["text"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_and_held_out_reviews_share_no_sentence(seed: int) -> None:
    train, test = reviews.load(1000, 500, seed)
    assert not set(train["text"]) & set(test["text"])
    assert len(set(train["text"])) == 1000
    assert all(reviews.split_of(text) == "test" for text in test["text"])


def test_three_reviews_in_four_are_positive() -> None:
    counts = Counter(reviews.load(2000, 0)[0]["label"])
    assert 0.72 < counts["positive"] / 2000 < 0.78


def test_single_words_do_not_give_the_verdict_away() -> None:
    train, test = reviews.load(2000, 1000)
    words = CountVectorizer()
    model = LogisticRegression(max_iter=1000, class_weight="balanced").fit(
        words.fit_transform(train["text"]), train["label"]
    )
    predicted = model.predict(words.transform(test["text"]))
    assert f1_score(test["label"], predicted, average="macro") < 0.75


def test_a_split_that_does_not_exist_and_a_negative_size_are_refused() -> None:
    with pytest.raises(ValueError, match="split must be"):
        next(reviews.reviews("dev"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        reviews.load(-1)


def test_the_embedded_model_is_no_better_than_three_quarters_before_tuning() -> None:
    model = AutoModelForCausalLM.from_pretrained(REVIEWER, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(REVIEWER, local_files_only=True)
    assert [len(tokenizer(word)["input_ids"]) for word in reviews.LABEL_WORDS.values()] == [1, 1]
    policy = LabelWords(
        Scratch(model, ParameterSet(select(model))), tokenizer, Prompt(reviews.PROMPT, reviews.LABEL_WORDS)
    )
    rows = reviews.load(0, 1000)[1].to_list()
    predicted = [answer.completion for answer in policy.answers(rows, [CENTRE])[0]]
    zero_shot = f1_score([row["label"] for row in rows], predicted, average="macro")
    assert 0.5 < zero_shot <= 0.75
