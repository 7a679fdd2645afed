"""Multiple choice: each row's own options, against the model's own full forward, one option at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zorl.goal import Goal
from zorl.parameters import ParameterSet, select
from zorl.perturbation import Scratch
from zorl.probe import CENTRE, Point, Scores
from zorl.prompts import Prompt
from zorl.reward_functions import RewardFunctions
from zorl.reward_objective import RewardObjective
from zorl.rewards import accuracy
from zorl.row_options import RowOptions
from zorl.twin import Twin

pytestmark = pytest.mark.usefixtures("one_thread")

CAUSAL = ("gpt2", "opt", "llama", "qwen2")
PROMPT = Prompt("{premise} {connective} {mask}", options="choices")
ROWS: list[dict[str, Any]] = [
    {
        "premise": "the film was great and the plot was odd , very odd , and then it was good",
        "connective": "so",
        "choices": ["I liked it", "the book was terrible"],
        "label": "I liked it",
    },
    {
        "premise": "nobody knows",
        "connective": "because",
        "choices": ["it was odd", "who", "it was odd to watch", "the answer was bad"],
        "label": "who",
    },
    {"premise": "", "connective": "and", "choices": ["what", " a story ", "odd"], "label": "odd"},
]
POINTS = [Point(3, 0.05), Point(3, -0.05)]


def policy(part: Any, prompt: Prompt = PROMPT, **options: Any) -> RowOptions:
    return RowOptions(part.evaluator, part.tokenizer, prompt, **options)


def reference(part: Any, row: dict[str, Any], *, mean: bool = True) -> Tensor:
    """Each option read from an input of its own."""
    totals = []
    for option in row["choices"]:
        context = part.tokenizer(f"{row['premise']} {row['connective']}")["input_ids"]
        plain, both = (
            part.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "a " + option.strip())
        )
        tokens = both[len(plain) :]
        with torch.no_grad():
            logits = part.model(input_ids=torch.tensor([[*context, *tokens]])).logits[0].log_softmax(-1)
        steps = torch.stack([logits[len(context) - 1 + i, token] for i, token in enumerate(tokens)])
        totals.append(steps.mean() if mean else steps.sum())
    return torch.stack(totals).log_softmax(0)


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("mean", [True, False])
def test_an_option_is_scored_by_the_mean_log_likelihood_of_its_tokens(
    parts: Callable[[str], Any], kind: str, mean: bool
) -> None:
    part = parts(kind)
    scores = policy(part, average_tokens=mean).scores(ROWS, [CENTRE])
    assert scores.shape == (1, 3, 4)
    for row, found in zip(ROWS, scores[0], strict=True):
        n = len(row["choices"])
        torch.testing.assert_close(found[:n], reference(part, row, mean=mean), atol=2e-4, rtol=1e-4)
        assert (found[n:] == -torch.inf).all(), "options that the row does not have"


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
@pytest.mark.parametrize("evaluator", [Scratch, Twin])
def test_scores_depend_on_neither_batch_nor_path_nor_what_is_shared(
    parts: Callable[[str], Any], evaluator: Any, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = parts("llama")
    model = copy.deepcopy(part.model)
    expected = RowOptions(Scratch(model, ParameterSet(select(model)), "rank1"), part.tokenizer, PROMPT)
    held: list[int] = []
    for forward_tokens in (1 << 30, -(1 << 30)):
        monkeypatch.setattr("zorl.shared_prefix.FORWARD_TOKENS", forward_tokens)
        words = RowOptions(
            evaluator(model, ParameterSet(select(model)), "rank1"), part.tokenizer, PROMPT, batch_size=batch_size
        )
        words.evaluator.module.register_forward_pre_hook(
            lambda m, args, kwargs: held.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        torch.testing.assert_close(
            words.scores(ROWS, POINTS), expected.scores(ROWS, POINTS), atol=2e-4, rtol=1e-4, equal_nan=True
        )
    assert max(held) <= batch_size
    plus, minus = expected.scores(ROWS, POINTS)
    assert (plus - minus)[0, 0].abs() > 1e-4


def test_the_answer_is_the_text_as_it_is_in_the_data(parts: Callable[[str], Any]) -> None:
    part = parts("gpt2")
    words = policy(part)
    (answers,) = words.answers(ROWS, [CENTRE])
    best = [row["choices"][int(reference(part, row).argmax())] for row in ROWS]
    assert [answer.completion for answer in answers] == best
    assert [[answer.completion for answer in of_row] for of_row in words.every_answer(ROWS)] == [
        row["choices"] for row in ROWS
    ]
    assert words.answers([], [CENTRE]) == [[]]


def test_rewards_and_cross_entropy_go_by_the_options_probabilities(parts: Callable[[str], Any]) -> None:
    words = policy(parts("opt"))
    p = words.scores(ROWS, POINTS).exp().double()
    right = torch.stack([p[:, 0, 0], p[:, 1, 1], p[:, 2, 2]], dim=1)
    rewarded = RewardObjective(words, RewardFunctions(accuracy())).ask(ROWS, POINTS, 0).answers
    assert isinstance(rewarded, Scores)
    torch.testing.assert_close(rewarded.values, right)
    objective = Goal(loss="cross_entropy", metrics=RewardFunctions(accuracy())).objective(words)
    lost = objective.ask(ROWS, POINTS, 0).answers
    assert isinstance(lost, Scores)
    torch.testing.assert_close(lost.values, right.log())
    figures = objective.evaluate(ROWS)
    (answers,) = words.answers(ROWS, [CENTRE])
    hits = [answer.completion == row["label"] for answer, row in zip(answers, ROWS, strict=True)]
    assert figures["accuracy"] == pytest.approx(sum(hits) / 3)
    with pytest.raises(ValueError, match="holds 'a lie', which is not one of the answers"):
        objective.ask([{**ROWS[0], "label": "a lie"}], POINTS, 0)


def test_a_set_level_reward_is_averaged_over_drawn_options(parts: Callable[[str], Any]) -> None:
    seen: set[str] = set()

    def share(completions: list[str], choices: list[list[str]], **_: Any) -> float:
        assert all(completion in options for completion, options in zip(completions, choices, strict=True))
        seen.update(completions)
        return 0.5

    asked = RewardObjective(policy(parts("gpt2")), RewardFunctions(share)).ask(ROWS, POINTS, 0)
    assert asked.answers.values.tolist() == [[0.5], [0.5]]  # type: ignore[union-attr]
    assert len(seen) > 3


def test_a_broken_model_is_no_answer_and_padding_stays_improbable(parts: Callable[[str], Any]) -> None:
    part = parts("gpt2")
    model = copy.deepcopy(part.model)
    words = RowOptions(Scratch(model, ParameterSet(model.named_parameters())), part.tokenizer, PROMPT)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    scores = words.scores(ROWS, [CENTRE])[0]
    assert scores[0, :2].isnan().all()
    assert (scores[0, 2:] == -torch.inf).all()
    with pytest.raises(FloatingPointError, match="scores are NaN"):
        words.answers(ROWS, [CENTRE])


def test_text_behind_the_mask_is_scored_and_punctuation_is_not(parts: Callable[[str], Any]) -> None:
    part = parts("qwen2")
    plain, dotted, longer = (
        policy(part, Prompt("{premise} {mask}" + after, options="choices")).scores(ROWS, [CENTRE])
        for after in ("", " .", " {connective}")
    )
    assert torch.equal(plain, dotted)
    assert not torch.equal(plain, longer)


def test_an_option_opens_the_reply_of_a_chat(parts: Callable[[str], Any]) -> None:
    part = parts("qwen2")
    chat = Prompt("{premise}{mask}", options="choices", chat=True)
    row = {"premise": "who?", "choices": ["me", "you too"]}
    told = [{"role": "user", "content": "who?"}]
    conversation = policy(part, Prompt("{told}{mask}", options="choices"))
    found = policy(part, chat).scores([row], [CENTRE])
    assert torch.equal(found, conversation.scores([{"told": told, "choices": row["choices"]}], [CENTRE]))
    assert (
        conversation.answers([{"told": told, "choices": row["choices"]}], [CENTRE])[0][0].completion in row["choices"]
    )


def test_long_rows_are_cut_and_options_are_not(parts: Callable[[str], Any]) -> None:
    part = parts("gpt2")
    row = {**ROWS[0], "premise": "the film was odd " * 100}
    assert policy(part).scores([row], [CENTRE]).isfinite().all()
    with pytest.raises(ValueError, match="and the row's longest option alone takes"):
        policy(part, max_length=10).scores([{**row, "choices": ["the film was odd " * 10, "b"]}], [CENTRE])


def test_a_masked_model_and_a_prompt_without_options_are_refused(parts: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="BertForMaskedLM fills one mask"):
        policy(parts("bert"))
    with pytest.raises(ValueError, match="names no column of options"):
        policy(parts("gpt2"), Prompt("{text}"))
