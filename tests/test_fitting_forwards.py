"""Forwards that do not fit are halved until they do, with the same results, by every policy and on both paths."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from zorl.fitting_forwards import FittingForwards
from zorl.generation import Generation
from zorl.parameters import ParameterSet, select
from zorl.perturbation import Scratch
from zorl.probe import Point
from zorl.prompts import Prompt
from zorl.row_options import RowOptions
from zorl.scoring import LabelWords
from zorl.teacher_forcing import TeacherForcing
from zorl.twin import Twin

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["the film was great", "odd", "who wrote the book ?", "it was good", "the plot"]
ROWS = [
    {"text": text, "label": "the film", "choices": ["it was odd", "the plot was bad", "the book", "who knows"]}
    for text in TEXTS
]
POINTS = [Point(3, 0.05), Point(3, -0.05), Point(4, 0.05), Point(4, -0.05)]
ON_AN_ACCELERATOR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
ON_THE_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.fixture(autouse=True, scope="module")
def few_objects() -> Iterator[None]:
    """Garbage collection, which goes with every halving, need not walk through what the imports have made."""
    gc.freeze()
    yield
    gc.unfreeze()


def limited(part: Any, rows: int, kind: type[Scratch] | type[Twin], error: Exception = ON_AN_ACCELERATOR) -> Any:
    """An evaluator of a model that has memory for so many rows."""
    model = copy.deepcopy(part.model)

    def refuse(module: Any, args: Any, kwargs: Any) -> None:
        if len(kwargs["input_ids"]) > rows:
            raise error

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    return kind(model, ParameterSet(select(model)), "rank1")


def words(evaluator: Any, tokenizer: Any, size: int) -> Any:
    policy = LabelWords(evaluator, tokenizer, Prompt("{text} was {mask}", {0: "bad", 1: "good"}), batch_size=size)
    return policy, lambda: policy.scores(ROWS, POINTS)


def options(evaluator: Any, tokenizer: Any, size: int) -> Any:
    policy = RowOptions(evaluator, tokenizer, Prompt("{text} so {mask}", options="choices"), batch_size=size)
    return policy, lambda: policy.scores(ROWS, POINTS)


def texts(evaluator: Any, tokenizer: Any, size: int) -> Any:
    policy = Generation(evaluator, tokenizer, Prompt("{text}"), max_new_tokens=4, batch_size=size)

    def said() -> torch.Tensor:
        answers = policy.answers(ROWS, POINTS)
        return torch.tensor([[[*a.completion_ids, 0, 0, 0][:4] for a in of_point] for of_point in answers]).float()

    return policy, said


def taught(evaluator: Any, tokenizer: Any, size: int) -> Any:
    policy = Generation(evaluator, tokenizer, Prompt("{text}"), max_new_tokens=8, batch_size=size)
    return policy, lambda: TeacherForcing(policy, "label")(ROWS, POINTS)


@pytest.mark.parametrize("make", [words, options, texts, taught])
@pytest.mark.parametrize("kind", [Scratch, Twin])
@pytest.mark.parametrize("room", [1, 3])
def test_results_do_not_depend_on_what_fits(
    parts: Callable[[str], Any], make: Any, kind: type[Scratch] | type[Twin], room: int
) -> None:
    part = parts("gpt2")
    _, expected = make(limited(part, 1 << 30, kind), part.tokenizer, 64)
    policy, found = make(limited(part, room, kind), part.tokenizer, 64)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.testing.assert_close(found(), expected(), atol=2e-4, rtol=1e-4)
        first = policy.forwards.batch_size
        found()
    assert first > room // 2, "no fewer than need be"
    assert policy.forwards.batch_size == first, "it is kept"
    lowered = [str(warning.message) for warning in said]
    assert lowered == (
        []
        if first == 64
        else [
            "there is not enough memory for forwards of 64 inputs: forward_batch_size has been lowered to "
            f"{first} for the rest of the run"
        ]
    )


def test_the_cpus_own_error_counts_and_others_do_not(parts: Callable[[str], Any]) -> None:
    part = parts("gpt2")
    _, found = words(limited(part, 2, Scratch, ON_THE_CPU), part.tokenizer, 8)
    with pytest.warns(UserWarning, match="lowered to 2 for the rest"):
        found()
    _, found = words(limited(part, 2, Scratch, RuntimeError("a shape is wrong")), part.tokenizer, 8)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        found()


@pytest.mark.parametrize("kind", [Scratch, Twin])
def test_where_not_one_input_fits_it_says_what_was_tried(
    parts: Callable[[str], Any], kind: type[Scratch] | type[Twin]
) -> None:
    part = parts("gpt2")
    evaluator = limited(part, 0, kind)
    before = evaluator.parameters.sha256()
    policy, found = options(evaluator, part.tokenizer, 8)
    with pytest.raises(torch.OutOfMemoryError, match=r"of one input at one point \(forward_batch_size was 8, and"):
        found()
    assert evaluator.parameters.sha256() == before
    assert policy.forwards.batch_size == 1


def test_as_many_points_go_together_as_fit(parts: Callable[[str], Any]) -> None:
    part = parts("gpt2")
    groups: list[int] = []

    def prepare(inputs: int) -> Callable[[int], list[int]]:
        def forward(copies: int) -> list[int]:
            groups.append(copies)
            assert inputs * copies <= size
            return [inputs] * copies

        return forward

    for size, inputs_per_row, expected in ((64, 1, [4]), (4, 1, [4]), (3, 1, [2, 2]), (1, 1, [1] * 4), (6, 3, [2, 2])):
        groups.clear()
        forwards = FittingForwards(limited(part, 99, Twin), size)
        assert len(forwards(POINTS, prepare, inputs=9, inputs_per_row=inputs_per_row)) == 4
        assert groups == expected
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        FittingForwards(part.evaluator, 0)
