"""The shipped rewards, against scikit-learn and exact values, and one contract for all of them."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score, matthews_corrcoef
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from transformers import BertConfig, BertForSequenceClassification

from zorl.reward_functions import RewardError, RewardFunctions
from zorl.rewards import accuracy, balanced_accuracy, classifier, exact_match, f1, matthews, squad_f1
from zorl.rewards.text import normalized

LABELS = ["a", "b", "c"]
GOOD = ["great film", "a great story", "great , great", "good and great"]
BAD = ["terrible film", "a terrible story", "terrible , bad", "bad and odd"]


def fitted(estimator: Any):
    return make_pipeline(CountVectorizer(), estimator).fit(GOOD + BAD, ["good"] * 4 + ["bad"] * 4)


# --- the contract that every reward keeps ---


@dataclass(frozen=True)
class Case:
    """A reward with completions that deserve more, and others that deserve less."""

    reward: Callable[..., Any]
    columns: dict[str, list[Any]]
    better: list[str]
    worse: list[str]
    set_level: bool


TRUTH = {"label": ["a", "b", "a", "c", "b", "a"]}
RIGHT, WRONG = ["a", "b", "a", "c", "b", "a"], ["b", "b", "c", "a", "b", "a"]
GOLD = {"answers": [["the cat"], "Paris", {"text": ["1912", "in 1912"], "answer_start": [0, 0]}]}
CASES = {
    "accuracy": Case(accuracy(), TRUTH, RIGHT, WRONG, False),
    "f1": Case(f1(), TRUTH, RIGHT, WRONG, True),
    "f1_macro": Case(f1("macro"), TRUTH, RIGHT, WRONG, True),
    "f1_micro": Case(f1(average="micro"), TRUTH, RIGHT, WRONG, True),
    "f1_weighted": Case(f1(average="weighted"), TRUTH, RIGHT, WRONG, True),
    "f1_label": Case(f1(pos_label="a"), TRUTH, RIGHT, WRONG, True),
    "balanced_accuracy": Case(balanced_accuracy(), TRUTH, RIGHT, WRONG, True),
    "matthews": Case(matthews(), TRUTH, RIGHT, WRONG, True),
    "exact_match": Case(exact_match(), GOLD, ["cat", "paris", "in 1912"], ["cats", "paris", ""], False),
    "squad_f1": Case(squad_f1(), GOLD, ["the cat", "paris", "1912"], ["cat", "in paris", "1921"], False),
    "sklearn": Case(classifier(fitted(LogisticRegression()), "good"), {}, GOOD, BAD, False),
    "sklearn_logit": Case(classifier(fitted(LinearSVC()), "good", output="logit"), {}, GOOD, BAD, False),
}


@pytest.fixture(params=CASES, ids=str)
def case(request) -> Case:
    return CASES[request.param]


def call(case: Case, completions: list[Any], order: list[int] | None = None, **extra: Any) -> Any:
    order = list(range(len(completions))) if order is None else order
    return case.reward(
        prompts=[f"prompt {i}" for i in order],
        completions=[completions[i] for i in order],
        completion_ids=[[i] for i in order],
        trainer_state=None,
        log_extra=lambda column, values: None,
        log_metric=lambda name, value: None,
        **{name: [column[i] for i in order] for name, column in case.columns.items()},
        **extra,
    )


def test_a_better_answer_is_rewarded_more(case):
    assert np.mean(call(case, case.better)) > np.mean(call(case, case.worse))


def test_a_set_gets_one_float_and_samples_get_a_list_of_floats(case):
    result = call(case, case.better)
    if case.set_level:
        assert type(result) is float
    else:
        assert [type(value) for value in result] == [float] * len(case.better)


def test_the_order_of_samples_is_irrelevant(case):
    order = list(range(len(case.worse)))
    random.Random(0).shuffle(order)
    straight, shuffled = call(case, case.worse), call(case, case.worse, order)
    if case.set_level:
        assert shuffled == pytest.approx(straight, abs=1e-12)
    else:
        assert shuffled == pytest.approx([straight[i] for i in order], abs=1e-12)


def test_a_copy_that_was_pickled_agrees(case):
    again = Case(pickle.loads(pickle.dumps(case.reward)), case.columns, [], [], case.set_level)
    assert again.reward.__name__ == case.reward.__name__
    assert call(again, case.worse) == call(case, case.worse)


def test_rewards_have_a_name_that_can_be_a_key_of_the_log(case):
    assert case.reward.__name__.isidentifier()


def test_unknown_columns_are_ignored(case):
    assert call(case, case.worse, other_column=[0] * len(case.worse)) == call(case, case.worse)


def test_a_label_that_occurs_nowhere_changes_nothing(case):
    without = call(case, case.worse, label_names=LABELS)
    assert call(case, case.worse, label_names=[*LABELS, "absent"]) == without
    assert without == call(case, case.worse)


def test_conversational_completions_are_read(case):
    talk = [[{"role": "assistant", "content": completion}] for completion in case.worse]
    assert call(case, talk) == call(case, case.worse)


def test_one_sample_is_enough(case):
    for completion in (case.better[0], case.worse[0]):
        result = call(Case(case.reward, {n: c[:1] for n, c in case.columns.items()}, [], [], False), [completion])
        assert np.isfinite(result).all()


def test_answers_outside_the_labels_are_never_better(case):
    junk = call(case, ["", "?!", *["junk"] * (len(case.better) - 2)])
    assert np.mean(junk) < np.mean(call(case, case.better))


def test_they_run_through_reward_functions(case):
    n = len(case.better)
    result = RewardFunctions(case.reward)(["p"] * n, case.better, [[0]] * n, case.columns, label_names=LABELS)
    assert result.set_level is case.set_level
    assert result.total.mean().item() == pytest.approx(np.mean(call(case, case.better)), abs=1e-6)


def test_a_missing_column_is_named_with_the_one_that_was_meant():
    for reward in (accuracy(column="labell"), f1(column="labell"), exact_match(column="labell")):
        with pytest.raises(
            ValueError, match=r"no column 'labell'; did you mean 'label'\? \(columns: 'label', 'text'\)"
        ):
            reward(completions=["a"], label=["a"], text=["x"], prompts=["p"], label_names=["a"])


# --- classification ---

labels = st.lists(st.sampled_from(LABELS), min_size=1, max_size=12)
pairs = labels.flatmap(
    lambda truth: st.tuples(
        st.just(truth), st.lists(st.sampled_from([*LABELS, "junk"]), min_size=len(truth), max_size=len(truth))
    )
)


@given(pairs)
def test_macro_and_weighted_f1_are_those_of_the_full_label_set_up_to_a_constant_of_the_batch(pair):
    truth, answers = pair
    for average, factor in (("macro", len(LABELS) / len(set(truth))), ("weighted", 1.0)):
        full = f1_score(truth, answers, labels=LABELS, average=average, zero_division=0.0)
        value = f1(average)(completions=answers, label=truth, label_names=LABELS)
        assert value == pytest.approx(factor * full, abs=1e-12)


@given(pairs)
def test_micro_f1_is_accuracy_whatever_the_wrong_answers_are(pair):
    truth, answers = pair
    share = np.mean([a == t for a, t in zip(answers, truth, strict=True)])
    assert f1("micro")(completions=answers, label=truth, label_names=LABELS) == pytest.approx(share, abs=1e-12)
    assert np.mean(accuracy()(completions=answers, label=truth, label_names=LABELS)) == pytest.approx(share, abs=1e-12)


@given(pairs, st.sampled_from(LABELS))
def test_f1_of_a_chosen_label_is_binary_f1_of_it_against_the_rest(pair, chosen):
    truth, answers = pair
    is_true, is_answer = [t == chosen for t in truth], [a == chosen for a in answers]
    expected = f1_score(is_true, is_answer, zero_division=0.0)
    for names in (LABELS, None):
        assert f1(pos_label=chosen)(completions=answers, label=truth, label_names=names) == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
@given(pairs)
def test_balanced_accuracy_and_matthews_are_scikit_learns(pair):
    truth, answers = pair
    options = {"completions": answers, "label": truth, "label_names": LABELS}
    assert balanced_accuracy()(**options) == pytest.approx(balanced_accuracy_score(truth, answers), abs=1e-12)
    assert matthews()(**options) == pytest.approx(matthews_corrcoef(truth, answers), abs=1e-12)


def test_matthews_counts_all_answers_outside_the_labels_as_one_class():
    truth = ["a", "b", "a", "b"]
    alike = matthews()(completions=["a", "b", "x", "x"], label=truth, label_names=["a", "b"])
    assert matthews()(completions=["a", "b", "x", "y"], label=truth, label_names=["a", "b"]) == alike


def test_f1_values_by_hand():
    truth, answers = ["a", "a", "a", "b"], ["a", "a", "b", "b"]  # a: P 1, R 2/3, F 4/5; b: P 1/2, R 1, F 2/3
    values = {r.__name__: r(completions=answers, label=truth) for r in (f1(), f1("weighted"), f1(pos_label="b"))}
    assert values == pytest.approx({"macro_f1": (4 / 5 + 2 / 3) / 2, "weighted_f1": 23 / 30, "f1_b": 2 / 3})


@pytest.mark.parametrize(
    ("truth", "completions"),
    [
        ([1, 0, 1], ["1", "0", "0"]),
        ([True, False, True], ["True", "False", "False"]),
        (["x ", "y", "x"], [" x", "y", "y"]),
    ],
)
def test_labels_are_compared_as_text_without_surrounding_space(truth, completions):
    assert accuracy()(completions=completions, label=truth) == [1.0, 1.0, 0.0]


def test_binary_f1_is_of_label_1_by_default_as_in_scikit_learn():
    assert f1(average="binary")(completions=["1", "1", "0"], label=[1, 0, 1]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="pos_label '1' is not one of the labels 'no', 'yes'"):
        f1(average="binary")(completions=["no"], label=["no"], label_names=["no", "yes"])


def test_a_truth_without_a_label_is_named_with_its_row():
    for reward in (accuracy(), f1(), balanced_accuracy(), matthews()):
        with pytest.raises(
            ValueError, match="column 'label' holds 'z' in row 1 of the batch, which is not one of .*'a', 'b'"
        ):
            reward(completions=["a", "b"], label=["a", "z"], label_names=["a", "b"])


def test_a_truth_that_is_missing_is_named_with_its_row():
    with pytest.raises(ValueError, match="column 'label' holds no value in row 1"):
        accuracy()(completions=["a", "b"], label=["a", None])


def test_a_column_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="column 'label' has 1 rows for 2 completions"):
        f1()(completions=["a", "b"], label=["a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average": "samples"}, "average must be one of macro, micro, weighted, binary, got 'samples'"),
        ({"average": "macro", "pos_label": "a"}, "average='macro' is over all labels and pos_label='a' chooses one"),
    ],
)
def test_f1_refuses_what_it_cannot_mean(options, message):
    with pytest.raises(ValueError, match=message):
        f1(**options)


# --- text ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, sat!", "cat sat"),
        ("an apple a day", "apple day"),
        ("Theodore", "theodore"),
        ("U.S.A.", "usa"),
        ("\tthe\n", ""),
        ("co-operate", "cooperate"),
    ],
)
def test_squads_normalisation(text, expected):
    assert normalized(text) == expected


@pytest.mark.parametrize(
    ("completion", "gold", "exact", "overlap"),
    [
        ("The cat", "cat!", 1.0, 1.0),
        ("black cat", "cat", 0.0, 2 / 3),
        ("cat cat", "cat", 0.0, 2 / 3),  # words are counted
        ("dog", "cat", 0.0, 0.0),
        ("in 1912", ["the year 1912", "1912", "in 1912"], 1.0, 1.0),
        ("July 1912", ["the year 1912", "1912"], 0.0, 2 / 3),  # the best one counts
        ("Denver Broncos", {"text": ["Denver Broncos", "Broncos"], "answer_start": [177, 184]}, 1.0, 1.0),
        ("", {"text": [], "answer_start": []}, 1.0, 1.0),  # SQuAD 2.0: no answer
        ("Denver", [], 0.0, 0.0),
        ("", "Denver", 0.0, 0.0),
        ("the", "a", 1.0, 1.0),
    ],
)
def test_exact_match_and_token_f1(completion, gold, exact, overlap):
    assert exact_match()(completions=[completion], answers=[gold]) == [exact]
    assert squad_f1()(completions=[completion], answers=[gold]) == pytest.approx([overlap])


@pytest.mark.parametrize("gold", [1912, [1912], {"answer": "1912"}, {"text": None}])
def test_gold_answers_of_another_shape_are_named_with_their_row(gold):
    for reward in (exact_match(), squad_f1()):
        with pytest.raises(ValueError, match=r"column 'answers' holds .* in row 1 of the batch; expected a string"):
            reward(completions=["x", "y"], answers=["x", gold])


# --- classifiers ---


@pytest.fixture
def tokenizer(parts):
    return copy.deepcopy(parts("bert").tokenizer)


def bert(tokenizer, names: list[str]) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.5,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    return BertForSequenceClassification(config).eval()


def test_a_transformers_classifier_gives_a_labels_probability_or_its_logarithm_or_logit(tokenizer):
    model = bert(tokenizer, ["bad", "good", "odd"])
    with torch.no_grad():
        logits = model(**tokenizer(GOOD, return_tensors="pt", padding=True)).logits
    expected = {"logit": logits, "probability": logits.softmax(1), "log_probability": logits.log_softmax(1)}
    for output, values in expected.items():
        reward = classifier(model, "odd", output=output, processing_class=tokenizer)
        scores = reward(prompts=["p"] * 4, completions=GOOD)
        assert scores == pytest.approx(values[:, 2].tolist(), abs=1e-5)
        assert reward.__name__ == "BertForSequenceClassification_odd"
    by_number = classifier(model, 2, processing_class=tokenizer)
    assert by_number(prompts=["p"] * 4, completions=GOOD) == pytest.approx(
        expected["probability"][:, 2].tolist(), abs=1e-5
    )


def test_a_label_of_a_multi_label_classifier_has_a_probability_of_its_own(tokenizer):
    model = bert(tokenizer, ["toxic", "insult", "threat"])
    model.config.problem_type = "multi_label_classification"
    with torch.no_grad():
        logits = model(**tokenizer(GOOD, return_tensors="pt", padding=True)).logits[:, 1]
    expected = {"logit": logits, "probability": logits.sigmoid(), "log_probability": logits.sigmoid().log()}
    for output, values in expected.items():
        reward = classifier(model, "insult", output=output, processing_class=tokenizer)
        assert reward(prompts=["p"] * 4, completions=GOOD) == pytest.approx(values.tolist(), abs=1e-5)


def test_a_model_of_one_label_gives_its_logit(tokenizer):
    model = bert(tokenizer, ["score"])
    with torch.no_grad():
        logits = model(**tokenizer(BAD, return_tensors="pt", padding=True)).logits[:, 0]
    scores = classifier(model, processing_class=tokenizer)(prompts=["p"] * 4, completions=BAD)
    assert scores == pytest.approx(logits.tolist(), abs=1e-5)


def test_a_classifier_is_loaded_from_a_folder_and_pickled(tmp_path, tokenizer):
    model = bert(tokenizer, ["bad", "good"])
    model.save_pretrained(tmp_path / "tone")
    tokenizer.save_pretrained(tmp_path / "tone")
    reward = classifier(tmp_path / "tone", "good")
    expected = classifier(model, "good", processing_class=tokenizer)(prompts=["p"] * 4, completions=GOOD)
    for loaded in (reward, pickle.loads(pickle.dumps(reward))):
        assert loaded.__name__ == "tone_good"
        assert loaded(prompts=["p"] * 4, completions=GOOD) == pytest.approx(expected, abs=1e-5)


def test_the_prompt_is_read_only_on_demand():
    pipeline = fitted(LogisticRegression())
    alone, whole = (classifier(pipeline, "good", include_prompt=include) for include in (False, True))
    talk = [[{"role": "user", "content": "terrible , terrible"}]]
    for prompts in (["terrible , terrible\n"], talk):
        assert alone(prompts=prompts, completions=["great"]) == alone(prompts=["-"], completions=["great"])
        expected = pipeline.predict_proba(["terrible , terrible\ngreat"])[0, 1]
        assert whole(prompts=prompts, completions=["great"]) == pytest.approx([expected])


@pytest.mark.parametrize(("label", "sign"), [("good", 1), ("bad", -1), (1, 1), (0, -1)])
def test_a_decision_function_speaks_for_either_class(label, sign):
    pipeline = fitted(LinearSVC())
    scores = classifier(pipeline, label, output="logit")(prompts=["p"] * 4, completions=GOOD)
    assert scores == pytest.approx(list(sign * pipeline.decision_function(GOOD)))


def test_a_decision_function_of_several_classes():
    texts, truth = ["great", "terrible", "odd"] * 3, ["good", "bad", "odd"] * 3
    pipeline = make_pipeline(CountVectorizer(), LinearSVC()).fit(texts, truth)
    scores = classifier(pipeline, "odd", output="logit")(prompts=["p"] * 2, completions=["odd", "great"])
    assert scores == pytest.approx(list(pipeline.decision_function(["odd", "great"])[:, 2]))
    assert scores[0] > scores[1]


def test_a_probability_of_zero_has_a_finite_logarithm():
    forest = fitted(RandomForestClassifier(20, random_state=0, bootstrap=False))
    assert forest.predict_proba(BAD)[0, 1] == 0.0
    scores = classifier(forest, "good", output="log_probability")(prompts=["p"] * 4, completions=BAD)
    assert scores[0] == pytest.approx(np.log(1e-12))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: classifier(fitted(LinearSVC()), "good"),
            ValueError,
            "LinearSVC has no predict_proba.*try output='logit'",
        ),
        (
            lambda: classifier(LogisticRegression(), "good"),
            ValueError,
            r"LogisticRegression is not fitted; call its fit",
        ),
        (
            lambda: classifier(fitted(LogisticRegression()), "god"),
            ValueError,
            "has no label 'god'; it has 'bad', 'good'",
        ),
        (lambda: classifier(fitted(LogisticRegression()), 2), ValueError, "has no label 2; it has 'bad', 'good'"),
        (lambda: classifier(fitted(LogisticRegression())), ValueError, "has several labels; choose .* 'bad', 'good'"),
        (lambda: classifier(fitted(LogisticRegression()), 1, output="p"), ValueError, "output must be one of probab"),
        (lambda: classifier("model.joblib", 1), ValueError, "looks like a pickle.*load it yourself"),
        (lambda: classifier(len, 1), TypeError, "model must be a sequence classifier"),
    ],
)
def test_classifiers_refuse_with_a_sentence(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_transformers_classifier_needs_a_label_that_it_has(tokenizer):
    model = bert(tokenizer, ["bad", "good"])
    with pytest.raises(ValueError, match="has several labels; choose the rewarded one with label=…, of 'bad', 'good'"):
        classifier(model, processing_class=tokenizer)
    with pytest.raises(ValueError, match="has no label 'great'; it has 'bad', 'good'"):
        classifier(model, "great", processing_class=tokenizer)


def test_errors_inside_a_shipped_reward_name_it():
    with pytest.raises(RewardError, match="reward function 'macro_f1' raised ValueError.*no column 'label'"):
        RewardFunctions(f1())(["p"], ["a"], [[1]], {"text": ["x"]})


def test_every_factory_shows_its_arguments():
    assert list(inspect.signature(f1).parameters) == ["average", "column", "pos_label"]
    assert inspect.signature(accuracy).parameters["column"].default == "label"
