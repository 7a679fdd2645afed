"""Teacher forcing: the loss that generation is taught with, against the model's own loss on one row at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from zorl.generation import Generation
from zorl.goal import Goal
from zorl.parameters import ParameterSet, select
from zorl.perturbation import Scratch
from zorl.probe import CENTRE, Point, Scores
from zorl.prompts import Prompt
from zorl.reward_functions import RewardFunctions
from zorl.rewards import squad_f1
from zorl.teacher_forcing import TeacherForcing
from zorl.twin import Twin

pytestmark = pytest.mark.usefixtures("one_thread")

CAUSAL = ("gpt2", "opt", "llama", "qwen2")
PROMPT = Prompt("Q: {question}\nA:")
ROWS = [
    {"question": "who wrote the book?", "answers": ["nobody", "nobody knows"]},
    {"question": "what was it like?", "answers": ["it was odd, the answer was good, and I liked the film"]},
    {"question": "", "answers": ["the book"]},
]
POINTS = [Point(3, 0.05), Point(3, -0.05)]


def generation(part: Any, prompt: Prompt = PROMPT, **options: Any) -> Generation:
    return Generation(part.evaluator, part.tokenizer, prompt, **{"max_new_tokens": 40, "greedy": True, **options})


def loss_of(part: Any, prompt: str, text: str) -> float:
    """Of the model itself, on the joined text: only the tokens behind the prompt count."""
    context = part.tokenizer(prompt)["input_ids"]
    ids = [*part.tokenizer(prompt + text)["input_ids"], part.tokenizer.eos_token_id]
    assert ids[: len(context)] == context
    with torch.no_grad():
        logits = part.model(input_ids=torch.tensor([ids])).logits[0]
    return F.cross_entropy(logits[len(context) - 1 : -1], torch.tensor(ids[len(context) :])).item()


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("batch_size", [1, 32])
def test_the_loss_is_the_models_own_on_the_first_of_the_right_texts(
    parts: Callable[[str], Any], kind: str, batch_size: int
) -> None:
    part = parts(kind)
    losses = TeacherForcing(generation(part, batch_size=batch_size), "answers")(ROWS, [CENTRE])
    expected = [loss_of(part, f"Q: {row['question']}\nA:", " " + row["answers"][0]) for row in ROWS]
    assert losses.shape == (1, 3)
    assert losses[0].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", CAUSAL)
def test_the_paths_agree_and_the_sides_differ(parts: Callable[[str], Any], kind: str) -> None:
    part = parts(kind)
    model = copy.deepcopy(part.model)
    found = []
    for evaluator in (Scratch, Twin):
        one = evaluator(model, ParameterSet(select(model)), "rank1")
        policy = Generation(one, part.tokenizer, PROMPT, greedy=True)
        found.append(TeacherForcing(policy, "answers")(ROWS, POINTS))
    torch.testing.assert_close(*found, atol=2e-4, rtol=1e-4)
    assert (found[0][0] - found[0][1]).abs().min() > 1e-5


def test_only_the_positions_that_predict_the_text_go_through_the_head(parts: Callable[[str], Any]) -> None:
    part = parts("gpt2")
    shapes: list[tuple[int, ...]] = []
    head = part.evaluator.module.get_output_embeddings()
    handle = head.register_forward_hook(lambda m, i, out: shapes.append(tuple(out.shape)))
    try:
        TeacherForcing(generation(part), "text")([{"question": "who? " * 8, "text": "odd"}], [CENTRE])
    finally:
        handle.remove()
    tokens = part.tokenizer(" odd")["input_ids"]
    assert shapes == [(1, len(tokens) + 1, len(part.tokenizer))]


@pytest.mark.parametrize(
    ("prompt", "text", "joined"),
    [("Q:", "odd", "Q: odd"), ("Q:\n", "odd", "Q:\nodd"), ("Q:", "\nodd", "Q:\nodd"), ("Q:", " odd", "Q: odd")],
)
def test_a_space_goes_between_where_there_is_no_white_space(
    parts: Callable[[str], Any], prompt: str, text: str, joined: str
) -> None:
    part = parts("gpt2")
    loss = TeacherForcing(generation(part, Prompt("{prompt}")), "text")([{"prompt": prompt, "text": text}], [CENTRE])
    assert loss.item() == pytest.approx(loss_of(part, prompt, joined[len(prompt) :]), abs=1e-4)


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("text", ["odd", "odd\nbad"])
def test_the_stop_string_is_taught_in_place_of_the_end(parts: Callable[[str], Any], kind: str, text: str) -> None:
    part = parts(kind)
    loss = TeacherForcing(generation(part, Prompt("{prompt}"), stop="\n"), "text")(
        [{"prompt": "Q:", "text": text}], [CENTRE]
    )
    context, ids = part.tokenizer("Q:")["input_ids"], part.tokenizer("Q: odd\n")["input_ids"]
    with torch.no_grad():
        logits = part.model(input_ids=torch.tensor([ids])).logits[0]
    expected = F.cross_entropy(logits[len(context) - 1 : -1], torch.tensor(ids[len(context) :])).item()
    assert loss.item() == pytest.approx(expected, abs=1e-4)


def test_a_whole_text_is_taught_behind_an_empty_prompt(parts: Callable[[str], Any]) -> None:
    part = parts("llama")
    story = "the film was great"
    loss = TeacherForcing(generation(part, Prompt("{prompt}")), "text")([{"prompt": "", "text": story}], [CENTRE])
    ids = [*part.tokenizer(story)["input_ids"], part.tokenizer.eos_token_id]
    with torch.no_grad():
        expected = part.model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)


def test_right_texts_come_in_the_forms_of_data_sets(parts: Callable[[str], Any]) -> None:
    forcing = TeacherForcing(generation(parts("gpt2")), "gold")
    forms: list[Any] = [
        "odd",
        ["odd", "bad"],
        {"text": ["odd"], "answer_start": [3]},
        [{"role": "x", "content": "odd"}],
    ]
    losses = forcing([{"question": "who?", "gold": form} for form in forms], [CENTRE])[0]
    assert losses.tolist() == pytest.approx([losses[0].item()] * 4, abs=1e-5)
    silence = forcing([{"question": "who?", "gold": []}], [CENTRE])
    assert silence.isfinite().all(), "an end-of-sequence token alone"
    with pytest.raises(ValueError, match="the column 'gold' holds 3; expected the text to teach"):
        forcing([{"question": "who?", "gold": 3}], [CENTRE])
    with pytest.raises(ValueError, match=r"the column 'gold', which the data does not have \(columns: 'question'\)"):
        forcing([{"question": "who?"}], [CENTRE])


def test_a_text_is_cut_to_what_generation_may_say_and_a_prompt_as_for_generation(parts: Callable[[str], Any]) -> None:
    part = parts("gpt2")
    text = "the film was great and the plot was odd"
    ids = part.tokenizer(" " + text)["input_ids"]
    with pytest.warns(UserWarning, match="of which the first 4 are taught"):
        cut = TeacherForcing(generation(part, max_new_tokens=4), "text")([{"question": "x", "text": text}], [CENTRE])
    context = part.tokenizer("Q: x\nA:")["input_ids"]
    with torch.no_grad():
        logits = part.model(input_ids=torch.tensor([[*context, *ids[:4]]])).logits[0, len(context) - 1 : -1]
    assert cut.item() == pytest.approx(F.cross_entropy(logits, torch.tensor(ids[:4])).item(), abs=1e-4)
    long = TeacherForcing(generation(part, max_length=60), "text")
    assert long([{"question": "who wrote it? " * 40, "text": "odd"}], [CENTRE]).isfinite().all()


def test_the_objective_is_the_loss_and_evaluation_decodes_greedily(parts: Callable[[str], Any]) -> None:
    policy = generation(parts("qwen2"), max_new_tokens=25)
    metric = RewardFunctions(squad_f1())
    objective = Goal(loss="cross_entropy", metrics=metric).objective(policy, label_column="answers")
    losses = TeacherForcing(policy, "answers")(ROWS, POINTS)
    asked = objective.ask(ROWS, POINTS, 0).answers
    assert isinstance(asked, Scores)
    assert torch.equal(asked.values, -losses)
    figures = objective.evaluate(ROWS)
    assert figures["loss"] == pytest.approx(TeacherForcing(policy, "answers")(ROWS, [CENTRE]).mean().item())
    assert figures["reward"] == -figures["loss"]
    said = [answer.completion for answer in policy.answers(ROWS, [CENTRE])[0]]
    expected = squad_f1()(completions=said, answers=[row["answers"] for row in ROWS])
    assert figures["squad_f1"] == pytest.approx(sum(expected) / 3)
