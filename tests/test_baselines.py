"""The methods that MeZO is compared with: one contract for all, what each learns, and what it refuses."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from zorl import Prompt
from zorl.baselines import bbt, fine_tuning, grpo, in_context, linear_probing, majority, threshold, zero_shot
from zorl.baselines.problem import Fitted, NotApplicable, Problem, answers_of, progress, target_text
from zorl.baselines.selection import LOOKS, look_at
from zorl.encoding import longest_input
from zorl.goal import Goal
from zorl.loss_objectives import CrossEntropy
from zorl.probe import CENTRE, Point

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),  # peft asks transformers for it
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),  # peft, which generates without them
]
LABELS = Prompt("{text} it was {mask} .", {"bad": "terrible", "good": "great"})
TEXT = Prompt("question: was it {text} ? answer:")
ON_LABELS: dict[str, Callable[..., Fitted]] = {
    "majority": majority.fit,
    "zero_shot": zero_shot.fit,
    "threshold": threshold.fit,
    "in_context": in_context.fit,
    "linear_probing": linear_probing.fit,
    "adam": partial(fine_tuning.fit, learning_rates=(1e-3,)),
    "sgd": partial(fine_tuning.fit, optimizer="sgd", learning_rates=(1e-2,)),
    "bbt": bbt.fit,
}
ON_TEXT: dict[str, Callable[..., Fitted]] = {
    "zero_shot": zero_shot.fit,
    "in_context": in_context.fit,
    "adam": partial(fine_tuning.fit, learning_rates=(1e-3,)),
    "bbt": bbt.fit,
    "grpo": partial(grpo.fit, learning_rates=(1e-3,)),
}


def rows_of(count: int, seed: int) -> list[dict[str, str]]:
    """Sentences with one word that tells the label, which is "good" seven times out of ten."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = "good" if draw.random() < 0.7 else "bad"
        words = [draw.choice(["film", "plot", "story", "book"]), label]
        rows.append({"text": " ".join(draw.sample(words, 2)), "label": label})
    return rows


TEST = rows_of(100, 2)


@pytest.fixture(scope="session")
def folder(parts: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a saved model, by kind."""

    @cache
    def save(kind: str) -> str:
        path = tmp_path_factory.mktemp(kind)
        parts(kind).model.save_pretrained(path)
        parts(kind).tokenizer.save_pretrained(path)
        return str(path)

    return save


@pytest.fixture
def labels(folder: Callable[[str], str]) -> Callable[..., Problem]:
    def problem(kind: str = "bert", **changes: Any) -> Problem:
        values = {"train": rows_of(64, 0), "dev": rows_of(32, 1), "batch_size": 8, "budget": 20, **changes}
        return Problem(model=folder(kind), **{"prompt": LABELS, **values})

    return problem


@pytest.fixture
def text(labels: Callable[..., Problem]) -> Callable[..., Problem]:
    def problem(**changes: Any) -> Problem:
        small = {"train": rows_of(16, 0), "dev": rows_of(4, 1), "max_completion_length": 4}
        return labels("gpt2", **{"prompt": TEXT, "reward": brief, **small, **changes})

    return problem


def brief(completions: list[str], **columns: Any) -> list[float]:
    """Few characters."""
    return [-float(len(text)) for text in completions]


def completions(fitted: Fitted, rows: list[dict[str, str]]) -> list[Any]:
    return [answer.completion for answer in fitted.answers(rows)]


def state_of_the_world(model: str) -> tuple[Any, ...]:
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(model).iterdir())}
    generators = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    return files, generators, torch.is_grad_enabled()


def check_contract(method: Callable[..., Fitted], problem: Problem, rows: list[dict[str, str]]) -> None:
    before = state_of_the_world(problem.model)
    spent: list[int] = []
    fitted, again = method(problem, spent.append), method(problem, lambda forwards: None)
    assert 0 <= fitted.forwards <= problem.budget
    assert sum(spent) == fitted.chosen.get("search_forwards", fitted.forwards)
    found = fitted.answers(rows)
    assert len(found) == len(rows)
    assert found == again.answers(rows) == fitted.answers(rows)
    assert fitted.answers(rows[:1]) == found[:1]
    assert fitted.answers([]) == []
    assert (fitted.forwards, fitted.chosen) == (again.forwards, again.chosen)
    assert state_of_the_world(problem.model) == before


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("method", ON_LABELS.values(), ids=ON_LABELS)
def test_every_method_keeps_its_budget_repeats_itself_and_leaves_the_world_as_it_was(method, kind, labels) -> None:
    problem = labels(kind)
    check_contract(method, problem, TEST[:8])
    assert {answer.completion for answer in method(problem, lambda n: None).answers(TEST)} <= {"bad", "good"}


@pytest.mark.parametrize("method", ON_TEXT.values(), ids=ON_TEXT)
def test_so_does_every_method_that_generates(method, text) -> None:
    check_contract(method, text(), [{"text": word, "label": "x"} for word in ("good", "bad")])


# --- what they learn ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("bert", linear_probing.fit),
        ("bert", partial(fine_tuning.fit, learning_rates=(1e-6, 1e-2))),
        ("llama", partial(fine_tuning.fit, learning_rates=(1e-6, 1e-2))),
        ("llama", partial(fine_tuning.fit, optimizer="sgd", learning_rates=(1e-6, 1e-1))),
    ],
)
def test_what_the_sentence_says_is_learnt(kind, method, labels) -> None:
    problem = labels(kind, budget=100)
    fitted = method(problem, lambda n: None)
    assert problem.score(TEST, fitted.answers(TEST)) >= 0.95
    assert fitted.chosen.get("learning_rate", 1.0) > 1e-6


def test_the_commonest_label_is_that_of_the_training_rows_and_the_first_among_equals(labels) -> None:
    problem = labels()
    one_each = [next(row for row in problem.train if row["label"] == label) for label in ("good", "bad")]
    for train, label in ((problem.train, "good"), (one_each, "bad")):
        fitted = majority.fit(replace(problem, train=train))
        assert {answer.completion for answer in fitted.answers(TEST)} == {label}
        assert (fitted.forwards, fitted.chosen) == (0, {"label": label})


def test_a_threshold_is_at_least_as_good_as_the_more_frequent_label(labels) -> None:
    problem = labels()
    assert problem.score(TEST, zero_shot.fit(problem).answers(TEST)) < 0.5
    fitted = threshold.fit(problem)
    assert problem.score(problem.train, fitted.answers(problem.train)) >= 0.65
    assert fitted.forwards == 8
    few = threshold.fit(replace(problem, budget=2))
    assert (few.forwards, few.chosen["rows"]) == (2, 16)


def test_methods_follow_a_reward_in_place_of_the_label(labels) -> None:
    def contrary(completions: list[str], label: list[str], **columns: Any) -> list[float]:
        return [float(a != b) for a, b in zip(completions, label, strict=True)]

    problem = labels(reward=contrary, budget=40)
    for method in (threshold.fit, bbt.fit):
        fitted = method(problem, lambda n: None)
        assert problem.score(TEST, fitted.answers(TEST)) >= 0.65


def test_a_soft_prompt_is_moved_by_the_reward(labels) -> None:
    def rare(completions: list[str], **columns: Any) -> list[float]:
        return [float(text == "bad") for text in completions]

    problem = labels("gpt2", budget=100, reward=rare)
    start = problem.score(TEST, bbt.fit(replace(problem, budget=20), lambda n: None).answers(TEST))
    fitted = bbt.fit(problem, lambda n: None)
    assert fitted.chosen["generation"] > 0
    assert problem.score(TEST, fitted.answers(TEST)) >= max(0.8, start)


def test_text_is_learnt_by_teacher_forcing(text) -> None:
    rows = [{"text": row["text"], "label": "great story"} for row in rows_of(16, 0)]
    problem = text(reward=None, train=rows, dev=rows[:4], budget=60)
    fitted = fine_tuning.fit(problem, lambda n: None, learning_rates=(3e-3,))
    assert completions(fitted, [{"text": "good plot"}]) == [" great story"]


def test_the_loss_of_fine_tuning_has_the_gradients_of_the_models_own_whatever_the_length_of_texts(text) -> None:
    rows = [{"text": "film", "label": "great"}, {"text": "plot", "label": "an odd story, and a great film"}]
    problem = text(train=rows, dev=rows, max_completion_length=40)
    model, tokenizer = problem.load()
    model.requires_grad_(True)
    objective = Goal(loss="cross_entropy").objective(problem.policy(model, tokenizer))
    assert isinstance(objective, CrossEntropy)
    objective.losses(rows, [CENTRE]).mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    losses = []
    for row in rows:
        prompt = tokenizer(f"question: was it {row['text']} ? answer:")["input_ids"]
        answer = [*tokenizer(f" {row['label']}")["input_ids"], tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        losses.append(F.cross_entropy(logits, torch.tensor(answer)))
    torch.stack(losses).mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_grpo_raises_the_reward_of_generated_text(text) -> None:
    problem = text(budget=40)
    start = problem.score(problem.dev, zero_shot.fit(problem).answers(problem.dev))
    fitted = grpo.fit(problem, lambda n: None, learning_rates=(1e-3,))
    assert fitted.chosen["step"] > 0
    assert problem.score(problem.dev, fitted.answers(problem.dev)) > start + 1


@pytest.mark.parametrize("prompt", [Prompt("{text}", system="be brief"), Prompt("{messages}")], ids=["chat", "rows"])
def test_grpo_shows_rewards_what_other_methods_show_them(prompt, text, folder) -> None:
    seen = []

    def note(prompts: list[Any], completions: list[Any], label: list[str], **columns: Any) -> list[float]:
        seen.append((type(prompts[0]), type(completions[0]), len(label), sorted(columns)))
        return [float(len(str(completion))) for completion in completions]

    rows = [{**row, "messages": [{"role": "user", "content": row["text"]}]} for row in rows_of(8, 0)]
    problem = text(prompt=prompt, train=rows, dev=rows, reward=note, budget=4)
    grpo.fit(replace(problem, model=folder("qwen2")), lambda n: None, learning_rates=(1e-5,))
    assert len(seen) == 3  # before the step, in it, and after it
    assert len(set(map(str, seen))) == 1
    assert seen[0][:2] == ((list, list) if prompt.fields == ("messages",) else (str, str))


def test_a_run_that_diverges_leaves_the_weights_of_the_start(labels) -> None:
    problem = labels(budget=30)
    fitted = fine_tuning.fit(problem, lambda n: None, optimizer="sgd", learning_rates=(1e30,))
    assert (fitted.chosen["learning_rate"], fitted.chosen["step"]) == (None, 0)
    assert fitted.answers(TEST) == zero_shot.fit(problem).answers(TEST)


def test_grpo_counts_the_steps_of_a_run_that_diverges_and_no_more(text) -> None:
    spent: list[int] = []
    fitted = grpo.fit(text(budget=40), spent.append, learning_rates=(1e30,))
    assert (fitted.chosen["learning_rate"], fitted.chosen["step"]) == (None, 0)
    assert fitted.chosen["search_forwards"] == sum(spent) < 40


# --- demonstrations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "gap"), [("bert", " "), ("llama", "\n\n")])
def test_demonstrations_stand_before_the_prompt(kind, gap, labels) -> None:
    problem = labels(kind)
    fitted = in_context.fit(problem)
    rows = problem.sample(fitted.chosen["demonstrations"])
    assert {row["label"] for row in rows} == {"bad", "good"}
    text = gap.join(f"{row['text']} it was {LABELS.label_words[row['label']]} ." for row in rows)
    longer = Prompt(f"{text}{gap}{LABELS.template}", LABELS.label_words)
    assert fitted.answers(TEST) == answers_of(problem.policy(*problem.load(), longer), TEST)


@pytest.mark.parametrize(("stop", "ends"), [(None, "\n\n"), ("?", "?")])
def test_text_ends_where_a_demonstration_does_unless_it_ends_elsewhere(text, stop, ends) -> None:
    (generation,) = in_context.fit(text(stop=stop)).answers.args
    assert generation.stop == ends


def test_long_demonstrations_are_cut_until_as_many_fit_as_there_are_labels(labels) -> None:
    long = [{"text": f"{{odd}} {row['text']} " * 40, "label": row["label"]} for row in rows_of(16, 0)]
    problem = labels("gpt2", train=long)
    fitted = in_context.fit(problem)
    assert fitted.chosen["demonstrations"] == 2
    assert 0 < fitted.chosen["cut_to_characters"] < 200
    assert len(fitted.answers(long)) == 16


# --- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [majority.fit, threshold.fit, linear_probing.fit])
def test_what_needs_labels_refuses_a_prompt_without(method, text) -> None:
    with pytest.raises(NotApplicable, match="needs a prompt with label words, and 'question: was it"):
        method(text())


def test_probing_refuses_words_of_several_tokens(labels) -> None:
    prompt = Prompt("{text} it was{mask}", {"bad": "xyzzy", "good": "plugh"})
    with pytest.raises(NotApplicable, match="label words of one token"):
        linear_probing.fit(labels("gpt2", prompt=prompt))


def test_grpo_refuses_labels_masked_models_scores_of_sets_and_too_little_budget(labels, text) -> None:
    with pytest.raises(NotApplicable, match="answered with one of its label words"):
        grpo.fit(labels())
    with pytest.raises(NotApplicable, match="BertForMaskedLM is not one"):
        grpo.fit(labels(prompt=TEXT))
    with pytest.raises(NotApplicable, match="'whole' scores a batch as a whole"):
        grpo.fit(text(reward=whole), lambda n: None)
    with pytest.raises(NotApplicable, match="the budget is 3"):
        grpo.fit(text(budget=3))
    with pytest.raises(NotApplicable, match="batch_size is 1"):
        grpo.fit(text(batch_size=1))


def whole(completions: list[str], **columns: Any) -> float:
    return 1.0


def test_a_budget_that_pays_no_step_is_refused(labels) -> None:
    with pytest.raises(NotApplicable, match="a generation of BBT costs 20 forwards, and the budget is 19"):
        bbt.fit(labels(budget=19))
    with pytest.raises(NotApplicable, match="a step of fine-tuning costs 3 forwards, and the budget is 2"):
        fine_tuning.fit(labels(budget=2))


def test_there_is_nothing_to_demonstrate_before_a_conversation_or_without_answers(text) -> None:
    chat = [{"messages": [{"role": "user", "content": "what was it like"}], "label": "great"}] * 4
    with pytest.raises(NotApplicable, match="its column holds conversations"):
        in_context.fit(text(prompt=Prompt("{messages}"), train=chat, dev=chat))
    with pytest.raises(NotApplicable, match="no column 'target' to demonstrate"):
        in_context.fit(text(label_column="target"))
    with pytest.raises(NotApplicable, match="no column 'target' with the text to learn"):
        fine_tuning.fit(text(label_column="target"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0}, "budget must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"dev": []}, "dev is empty"),
        ({"dev": [{"text": "good"}]}, "the rows of dev have no column 'label'"),
        ({"train": [{"text": "odd", "label": "odd"}]}, "'odd' (1 row) without a label word"),
    ],
)
def test_a_problem_that_cannot_be_learnt_is_refused(changes, message, labels) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        labels(**changes)


# --- parts ----------------------------------------------------------------------------------------------------------------


def test_without_a_reward_answers_are_compared_with_the_label(text) -> None:
    problem = text(reward=None, train=[{"text": "a", "label": " yes"}], dev=[{"text": "a", "label": "yes"}])
    answer = answers_of(problem.policy(*problem.load()), problem.dev)[0]
    right, wrong = replace(answer, completion=" yes\n"), replace(answer, completion="no")
    assert problem.score(problem.dev * 2, [right, wrong]) == 0.5


def test_batches_hold_all_rows_in_every_epoch(labels) -> None:
    problem = labels(train=rows_of(20, 0))
    batches = problem.batches()
    first, second = ([next(batches) for _ in range(3)] for _ in range(2))
    assert [len(batch) for batch in first] == [8, 8, 4]
    assert first != second
    once = [sorted(str(row) for batch in epoch for row in batch) for epoch in (first, second)]
    assert once == [sorted(map(str, problem.train))] * 2


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 19, 166])
def test_the_development_rows_are_looked_at_ten_times_at_most_and_at_the_end(steps) -> None:
    looks = [step for step in range(1, steps + 1) if look_at(step, steps)]
    assert 1 <= len(looks) <= LOOKS
    assert looks[-1] == steps


def test_the_text_of_an_answer_continues_the_prompt() -> None:
    row = {"text": "odd", "label": "good"}
    assert target_text(LABELS, row, "label") == "great"
    assert target_text(TEXT, row, "label") == " good"
    assert target_text(Prompt("{text}\n"), row, "label") == "good"
    assert target_text(replace(LABELS, template="{text}?{mask}", chat=True), row, "label") == " great"
    assert target_text(TEXT, {**row, "label": ["5 mm", "5"]}, "label") == " 5 mm"
    assert target_text(TEXT, {**row, "label": 5}, "label") == " 5"


def test_a_bar_is_shown_where_nobody_else_is_told(capsys) -> None:
    with progress("BBT", 40, None) as spend:
        spend(20)
    assert "BBT" in capsys.readouterr().err
    told: list[int] = []
    with progress("BBT", 40, told.append) as spend:
        spend(20)
    assert told == [20]
    assert capsys.readouterr().err == ""


def test_the_centre_moves_nowhere_and_a_soft_prompt_leaves_room_for_text(labels) -> None:
    problem = labels()
    model, tokenizer = problem.load()
    with pytest.raises(ValueError, match="evaluated as it is, not at an offset of 0.1"):
        problem.policy(model, tokenizer).scores(TEST[:1], [Point(1, 0.1)])
    assert bbt.fit(problem, lambda n: None).chosen["tokens"] == longest_input(model, tokenizer) // 8


@pytest.mark.parametrize("method", [fine_tuning.fit, grpo.fit])
def test_what_methods_score_and_answer_ends_before_the_stop_string(
    text: Callable[..., Problem], method: Callable[..., Fitted]
) -> None:
    scored: list[str] = []

    def seen(completions: list[str], **columns: Any) -> list[float]:
        scored.extend(completions)
        return brief(completions)

    free = text()
    stop = next(said for said in completions(method(free, learning_rates=(1e-6,)), free.dev) if said.strip())[1]
    problem = text(reward=seen, stop=stop)
    scored += completions(method(problem, learning_rates=(1e-6,)), problem.dev)
    assert any(scored)
    assert not any(stop in said for said in scored)
