"""Labels by a sequence-classification model's own head: what transformers itself answers, at points around θ."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForSequenceClassification

from zorl.choosing import Choosing
from zorl.classifier_head import ClassifierHead
from zorl.classifier_models import class_names, has_new_head, prepare_classifier, sorted_labels
from zorl.models import load_model, trained_classes
from zorl.parameters import ParameterSet
from zorl.perturbation import Scratch
from zorl.probe import CENTRE, Point
from zorl.prompts import Prompt
from zorl.twin import Twin

FAMILIES = ("bert", "roberta", "gpt2", "opt", "llama", "qwen2")
PROMPT = Prompt("{text}", classes=("bad", "odd", "good"))
ROWS = [
    {"text": "the film was great"},
    {"text": "a terrible plot and an odd ending, nobody knows who wrote the book"},
    {"text": "odd"},
    {"text": "Was it great? It was terrible! The answer was good, the answer was bad."},
]


@dataclass(frozen=True)
class Classifier:
    model: Any
    tokenizer: Any
    path: str

    def policy(self, kind: type = Scratch, prompt: Prompt = PROMPT, **options: Any) -> ClassifierHead:
        return ClassifierHead(
            kind(self.model, ParameterSet(self.model.named_parameters()), "rank1"), self.tokenizer, prompt, **options
        )


@pytest.fixture(scope="module")
def classifier(parts: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Classifier]:
    """A family's language model with a new head of three classes."""
    made: dict[str, Classifier] = {}

    def make(kind: str) -> Classifier:
        if kind not in made:
            path, tokenizer = str(tmp_path_factory.mktemp(kind)), parts(kind).tokenizer
            parts(kind).model.save_pretrained(path)
            tokenizer.save_pretrained(path)
            model = load_model(path, classes=PROMPT.labels).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "classifier" in name or "score" in name:
                        parameter.mul_(20)  # answers that differ
            prepare_classifier(model, PROMPT, tokenizer)
            made[kind] = Classifier(model, tokenizer, path)
        return made[kind]

    return make


def alone(made: Classifier, *texts: str) -> torch.Tensor:
    """What transformers says of one text, without padding."""
    with torch.no_grad():
        return made.model(**made.tokenizer(*texts, return_tensors="pt")).logits.log_softmax(dim=-1)[0]


@pytest.mark.parametrize("kind", FAMILIES)
def test_scores_are_those_of_the_model_itself_text_by_text(classifier: Callable[[str], Classifier], kind: str):
    made = classifier(kind)
    scores = made.policy().scores(ROWS, [CENTRE])[0]
    for row, found in zip(ROWS, scores, strict=True):
        torch.testing.assert_close(found, alone(made, row["text"]), atol=1e-4, rtol=1e-4)
    assert (scores[0] - scores[1]).abs().max() > 0.05


@pytest.mark.parametrize("kind", FAMILIES)
def test_all_points_in_one_forward_are_what_each_is_alone(classifier: Callable[[str], Classifier], kind: str):
    points = [CENTRE, Point(3, 1e-2), Point(3, -1e-2), Point(4, 1e-2)]
    one_by_one = classifier(kind).policy(Scratch).scores(ROWS, points)
    together = classifier(kind).policy(Twin).scores(ROWS, points)
    torch.testing.assert_close(together, one_by_one, atol=2e-4, rtol=1e-3)
    assert (one_by_one[1] - one_by_one[0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["bert", "opt"])
def test_batches_do_not_matter_and_states_make_the_scores(classifier: Callable[[str], Classifier], kind: str):
    policy = classifier(kind).policy()
    scores, states = policy.words_and_states(ROWS)
    in_twos = classifier(kind).policy(batch_size=2).scores(ROWS, [CENTRE])[0]
    torch.testing.assert_close(in_twos, scores, atol=1e-4, rtol=1e-4)
    assert states is not None
    assert policy.head is not None
    torch.testing.assert_close(policy.head(states).log_softmax(1).detach(), scores, atol=1e-4, rtol=1e-4)


def test_answers_are_the_likeliest_classes(classifier: Callable[[str], Classifier]):
    policy = classifier("roberta").policy()
    assert isinstance(policy, Choosing)
    best = policy.scores(ROWS, [CENTRE])[0].argmax(1).tolist()
    assert [answer.completion for answer in policy.answers(ROWS, [CENTRE])[0]] == [PROMPT.labels[i] for i in best]
    assert [answer.completion for answer in policy.every_answer(ROWS[:1])[0]] == ["bad", "odd", "good"]
    assert policy.answers([], [CENTRE]) == [[]]


@pytest.mark.parametrize("template", ["{text}{sep}{more}", "{text} {sep} {more}"])
def test_a_pair_goes_through_the_tokenizer_as_a_pair(classifier: Callable[[str], Classifier], template: str):
    made = classifier("bert")
    tokenizer = copy.deepcopy(made.tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    made = replace(made, tokenizer=tokenizer)
    row = {"text": "the film was great", "more": "it was odd"}
    scores = made.policy(prompt=Prompt(template, classes=PROMPT.labels)).scores([row, {**row, "more": "bad"}], [CENTRE])
    torch.testing.assert_close(scores[0, 0], alone(made, row["text"], row["more"]), atol=1e-4, rtol=1e-4)
    assert (scores[0, 0] - alone(made, row["text"] + " " + row["more"])).abs().max() > 1e-3  # BERT's token types count


def test_a_text_that_is_too_long_loses_its_end(classifier: Callable[[str], Classifier]):
    made = classifier("gpt2")
    policy = made.policy(max_length=8)
    text = "the film was great . " * 3
    whole, start = policy.scores([{"text": text}, {"text": text + "but bad"}], [CENTRE])[0]
    torch.testing.assert_close(whole, start)


def test_nan_is_an_error(classifier: Callable[[str], Classifier]):
    made = classifier("opt")
    policy = made.policy()
    kept = made.model.score.weight.detach().clone()
    try:
        with torch.no_grad():
            made.model.score.weight.fill_(float("nan"))
        with pytest.raises(FloatingPointError, match="label scores are NaN"):
            policy.answers(ROWS, [CENTRE])
    finally:
        with torch.no_grad():
            made.model.score.weight.copy_(kept)


def test_a_model_without_such_a_head_is_refused(parts: Callable[[str], Any], classifier: Callable[[str], Classifier]):
    bert = parts("bert")
    with pytest.raises(TypeError, match="need a sequence-classification model; BertForMaskedLM is not one"):
        ClassifierHead(bert.evaluator, bert.tokenizer, PROMPT)
    with pytest.raises(ValueError, match="head has 3 outputs, and there are 2 classes"):
        classifier("bert").policy(prompt=Prompt("{text}", classes=("a", "b")))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_new_head_is_the_same_each_time_and_known_for_one(classifier: Callable[[str], Classifier], kind: str):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = (load_model(classifier(kind).path, classes=("a", "b")) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert has_new_head(first)
    assert trained_classes(classifier(kind).path) is None


def test_names_of_classes(classifier: Callable[[str], Classifier], tmp_path: Path):
    made = classifier("bert")
    plain = AutoModelForSequenceClassification.from_pretrained(made.path, num_labels=3)
    assert class_names(plain.config, ["10", 9, "2"], new_head=True) == ("2", "9", "10")
    assert class_names(plain.config, ["10", 9, "2"]) == ("0", "1", "2")
    assert class_names(made.model.config, ["x"], new_head=True) == PROMPT.labels
    assert sorted_labels(["b", 1, "a", "b"]) == ("1", "a", "b")
    made.model.save_pretrained(tmp_path)
    assert trained_classes(str(tmp_path)) == PROMPT.labels
    with pytest.raises(ValueError, match="classifier of 3 classes, and 2 are asked for"):
        load_model(str(tmp_path), classes=("a", "b"))


def test_a_classifiers_own_classes_in_another_order_are_refused(
    classifier: Callable[[str], Classifier], tmp_path: Path
):
    made = classifier("bert")
    made.model.save_pretrained(tmp_path)
    other = ("good", "odd", "bad")
    with pytest.raises(ValueError, match="in another order than its outputs have: give them as 'bad', 'odd', 'good'"):
        load_model(str(tmp_path), classes=other)
    with pytest.raises(ValueError, match="the classes 'good', 'odd', 'bad' are the model's own in another order"):
        prepare_classifier(made.model, replace(PROMPT, classes=other), made.tokenizer)
    assert class_names(made.model.config) == PROMPT.labels
    renamed = load_model(str(tmp_path), classes=("poor", "strange", "fine"))
    assert class_names(renamed.config) == ("poor", "strange", "fine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ("a",)}, "at least two different labels"),
        ({"classes": (1, "1")}, "at least two different labels"),
        ({"classes": ("a", "b"), "label_words": {0: "x", 1: "y"}}, "not both"),
        ({"template": "{text} {mask}", "classes": ("a", "b")}, "no label_words or options to put there"),
        ({"template": "{a}{sep}{b}{sep}{c}", "classes": ("a", "b")}, "a \\{sep\\} too many"),
        ({"template": "{a}{sep}{b}{mask}", "label_words": {0: "x", 1: "y"}}, "for sequence-classification models"),
    ],
)
def test_prompts_that_do_not_fit_together(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Prompt(**{"template": "{text}", **options})


def test_a_prompt_with_classes_comes_back_from_json():
    prompt = Prompt("{a}{sep}{b}", classes=(0, 1))
    assert Prompt.from_dict(prompt.to_dict()) == prompt
    assert prompt.labels == ("0", "1")
    assert prompt.fields == ("a", "b")
    with pytest.raises(ValueError, match="holds '2' \\(1 row\\), and the model's classes are '0', '1'"):
        prompt.check_labels([0, 1, 2])
