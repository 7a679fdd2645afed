"""RewardFunctions: TRL's calling convention in, checked numbers out."""

from __future__ import annotations

import asyncio
import functools
import gc
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nan
from trl.rewards import (
    accuracy_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    think_format_reward,
)

from zorl.reward_functions import RewardError, RewardFunctions, RewardValues, stack_totals

PROMPTS = ["p0", "p1", "p2"]
COMPLETIONS = ["one", "three", "fifteen"]
IDS = [[1], [2, 3], [4, 5, 6]]
COLUMNS = {"label": ["a", "b", "a"], "text": ["x", "y", "z"]}


def lengths(completions, **columns):
    return [float(len(completion)) for completion in completions]


def score(funcs: Any, **options: Any) -> RewardValues:
    call = {name: options.pop(name) for name in ("columns", "label_names", "trainer_state") if name in options}
    return RewardFunctions(funcs, **options)(PROMPTS, COMPLETIONS, IDS, **({"columns": COLUMNS} | call))


def returning(value: Any) -> Callable[..., Any]:
    def constant(**columns):
        return value

    return constant


def exactly(actual: Tensor, expected: list[Any]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0, equal_nan=True)


# --- what is passed in ---


def test_functions_receive_all_of_trls_keywords_and_every_column():
    seen: dict[str, Any] = {}

    def spy(**keywords):
        seen.update(keywords)
        return [0.0, 0.0, 0.0]

    state = SimpleNamespace(global_step=7)
    score(spy, label_names=["a", "b"], trainer_state=state)
    assert callable(seen.pop("log_extra"))
    assert callable(seen.pop("log_metric"))
    assert seen == {
        "prompts": PROMPTS,
        "completions": COMPLETIONS,
        "completion_ids": IDS,
        "label": ["a", "b", "a"],
        "text": ["x", "y", "z"],
        "trainer_state": state,
        "label_names": ["a", "b"],
    }


def test_label_names_are_not_passed_where_the_task_has_none():
    seen: dict[str, Any] = {}

    def spy(completions, **keywords):
        seen.update(keywords)
        return 0.0

    score(spy)
    assert "label_names" not in seen


def test_a_function_without_var_keywords_gets_only_what_it_names():
    def right(completions, label, missing="default"):
        assert missing == "default"
        return [float(len(c) > 3 and t == "b") for c, t in zip(completions, label, strict=True)]

    exactly(score(right).total, [0.0, 1.0, 0.0])


def test_a_misspelt_column_is_named_with_the_one_that_was_meant():
    def right(completions, labell):
        return 0.0

    message = "reward function 'right' needs a column 'labell', which the data set does not have; did you mean 'label'?"
    with pytest.raises(RewardError, match=re.escape(f"{message} (columns: 'label', 'text')")):
        score(right)


@pytest.mark.parametrize("name", ["prompt", "completion", "completion_ids"])
def test_columns_that_trl_withholds_are_withheld(name):
    seen: dict[str, Any] = {}

    def spy(**keywords):
        seen.update(keywords)
        return 0.0

    score(spy, columns={name: ["r", "s", "t"]})
    assert seen.get(name) in (None, IDS)


@pytest.mark.parametrize("name", ["prompts", "completions", "trainer_state", "log_metric"])
def test_a_column_with_the_name_of_an_argument_is_an_error(name):
    with pytest.raises(ValueError, match=f"column '{name}'.*rename"):
        score(lengths, columns={name: [1, 2, 3]})


def test_scoring_nothing_is_an_error():
    with pytest.raises(ValueError, match="no completions"):
        RewardFunctions(lengths)([], [], [], {})


# --- what comes out ---


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1, 2.5, 3], [1.0, 2.5, 3.0]),
        ((1, 2, 3), [1.0, 2.0, 3.0]),
        ([True, False, np.True_], [1.0, 0.0, 1.0]),
        ([None, 2, None], [nan, 2.0, nan]),
        ([np.float32(0.5), np.int64(2), torch.tensor(3.0)], [0.5, 2.0, 3.0]),
        ([Fraction(1, 2), np.array(4), 0], [0.5, 4.0, 0.0]),
        (np.array([1.0, 2.0, 3.0]), [1.0, 2.0, 3.0]),
        (np.array([True, False, True]), [1.0, 0.0, 1.0]),
        (torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16), [1.0, 2.0, 3.0]),
        (torch.tensor([1.5, 2.0, 3.0], requires_grad=True), [1.5, 2.0, 3.0]),
    ],
)
def test_one_number_a_completion(value, expected):
    result = score(returning(value))
    assert not result.set_level
    assert result.values.dtype == result.total.dtype == torch.float32
    exactly(result.values, [expected])
    exactly(result.total, expected)


@pytest.mark.parametrize("value", [0.5, np.float64(0.5), np.float32(0.5), torch.tensor(0.5), np.array(0.5)])
def test_one_number_for_the_whole_batch(value):
    result = score(returning(value))
    assert result.set_level
    exactly(result.values, [[0.5]])
    exactly(result.total, [0.5])


@pytest.mark.parametrize("value", [1, True, np.True_])
def test_whole_numbers_and_booleans_score_a_batch(value):
    exactly(score(returning(value)).total, [1.0])


def test_a_list_of_one_number_for_a_batch_of_one_is_per_sample():
    result = RewardFunctions(returning([2.0]))(["p"], ["c"], [[1]], {})
    assert not result.set_level
    exactly(result.values, [[2.0]])


def test_abstaining_from_a_whole_batch_is_allowed():
    result = score(returning([None, None, None]))
    assert not result.set_level
    exactly(result.total, [nan, nan, nan])


def test_generators_are_read():
    exactly(score(lambda completions, **columns: (len(c) for c in completions)).total, [3.0, 5.0, 7.0])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, 2.0], "returned 2 rewards for 3 completions"),
        ([], "returned 0 rewards for 3 completions"),
        (torch.ones(4), "returned 4 rewards for 3 completions"),
        ("good", "returned str 'good'"),
        (b"123", "returned bytes b'123'"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, "returned dict"),
        ({1.0, 2.0, 3.0}, "returned set"),
        (object, "returned type"),
        (1j, "returned complex"),
        (None, "returned None .*return statement"),
        (torch.ones(3, 1), r"returned an array of shape \(3, 1\)"),
        (np.ones((1, 3)), r"returned an array of shape \(1, 3\)"),
        ([1.0, "2", 3.0], "returned str '2' for sample 1"),
        ([1.0, [2.0], 3.0], r"returned list \[2.0\] for sample 1"),
        ([1.0, 2.0, 3j], "returned complex 3j for sample 2"),
        ([1.0, float("nan"), 3.0], "returned NaN for sample 1; return None where it is not applicable"),
        (np.array([1.0, 2.0, np.nan]), "returned NaN for sample 2; return None"),
        (float("nan"), "returned NaN for the batch; return None"),
        ([float("inf"), 2.0, 3.0], "returned inf for sample 0"),
        (-float("inf"), "returned -inf for the batch"),
        ([1.0, 2.0, 1e39], "returned 1e.39 for sample 2; a reward must be finite in float32"),
    ],
)
def test_what_is_no_reward_is_refused_with_the_functions_name(value, message):
    with pytest.raises(RewardError, match=f"reward function 'constant' {message}"):
        score(returning(value))


def test_an_integer_beyond_any_float_is_refused():
    with pytest.raises(RewardError, match="for sample 0"):
        score(returning([10**400, 0, 0]))


def test_an_exception_inside_is_chained_and_names_function_step_and_batch():
    def divide(**columns):
        return 1 / 0

    with pytest.raises(RewardError) as caught:
        score([lengths, divide], trainer_state=SimpleNamespace(global_step=41))
    assert str(caught.value) == (
        "reward function 'divide' raised ZeroDivisionError at step 41, on a batch of 3 that begins with prompt 'p0': "
        "division by zero"
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_exception_inside_a_generator_names_the_function():
    def lazily(completions, **columns):
        yield 1.0
        raise OSError("gone")

    with pytest.raises(RewardError, match="'lazily' raised OSError.*gone"):
        score(lazily)


def test_ctrl_c_inside_a_function_is_not_swallowed():
    def interrupted(**columns):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score([lengths, interrupted])


# --- several functions ---


def test_weights_multiply_and_abstentions_are_left_out_of_the_sum():
    result = score([lengths, returning([1.0, None, None]), returning([None, -1.0, None])], weights=[0.5, 10.0, 100.0])
    exactly(result.values, [[3.0, 5.0, 7.0], [1.0, nan, nan], [nan, -1.0, nan]])
    exactly(result.total, [11.5, -97.5, 3.5])


def test_a_sample_on_which_all_functions_abstain_has_no_total():
    result = score([returning([1.0, None, 3.0]), returning([1.0, None, None])])
    exactly(result.total, [2.0, nan, 3.0])


def test_beside_a_set_level_function_the_others_are_averaged_over_the_samples_they_apply_to():
    result = score([returning(0.25), returning([1.0, None, 2.0]), returning([None] * 3)], weights=[4.0, 2.0, 1.0])
    assert result.set_level
    exactly(result.values, [[0.25], [1.5], [nan]])
    exactly(result.total, [4.0])


def test_means_are_over_the_samples_a_function_applies_to():
    assert score([lengths, returning([1.0, None, 2.0])]).means() == {"lengths": 5.0, "constant": 1.5}


def test_a_single_function_needs_no_list_and_the_callers_list_is_left_alone():
    funcs = [lengths]
    assert RewardFunctions(lengths).names == RewardFunctions(funcs).names == ("lengths",)
    assert funcs == [lengths]


def test_names_come_from_functions_partials_and_classes_and_are_unique():
    class Polite:
        def __call__(self, completions, **columns):
            return 0.0

    names = RewardFunctions([lengths, functools.partial(lengths), Polite(), lengths]).names
    assert names == ("lengths", "lengths_2", "Polite", "lengths_3")


@pytest.mark.parametrize(
    ("funcs", "options", "error", "message"),
    [
        ([], {}, ValueError, "reward_funcs is empty"),
        ([lengths, 3], {}, TypeError, r"reward_funcs\[1\] must be a function or a reward model, got 3"),
        (dict, {}, TypeError, r"reward_funcs\[0\] must be a function"),
        (lengths, {"weights": [1.0, 2.0]}, ValueError, "2 reward weights for 1 reward functions"),
        (lengths, {"weights": [float("nan")]}, ValueError, "reward weights must be finite"),
        (lengths, {"processing_classes": [None, None]}, ValueError, "2 reward processing classes for 1"),
    ],
)
def test_bad_arguments_are_refused(funcs, options, error, message):
    with pytest.raises(error, match=message):
        RewardFunctions(funcs, **options)


def test_totals_of_several_points_are_stacked():
    stacked = stack_totals([score(lengths), score(returning([1.0, None, 2.0]))])
    exactly(stacked, [[3.0, 5.0, 7.0], [1.0, nan, 2.0]])


def test_a_point_at_which_a_set_level_function_abstained_stacks_with_one_at_which_it_did_not():
    stacked = stack_totals([score(returning(0.5)), score(returning([None] * 3)), score(returning([1, None, 2]))])
    exactly(stacked, [[0.5], [nan], [1.5]])


# --- logging ---


def test_extra_columns_and_metrics_are_returned_with_the_values():
    def first(completions, log_extra, log_metric, **columns):
        log_extra("length", [len(c) for c in completions])
        log_metric("longest", np.int64(7))
        return 0.0

    def second(log_metric, **columns):
        log_metric("longest", 8)
        return 0.0

    result = score([first, second])
    assert result.extras == {"length": [3, 5, 7]}
    assert result.metrics == {"longest": [7.0, 8.0]}
    assert score([first, second]).metrics == {"longest": [7.0, 8.0]}  # nothing is left over from the call before


# --- async ---


async def slow_lengths(completions, **columns):
    await asyncio.sleep(0)
    return [float(len(completion)) for completion in completions]


def test_async_functions_partials_and_objects_are_awaited():
    class Client:
        async def __call__(self, completions, **columns):
            return await slow_lengths(completions)

    result = score([slow_lengths, functools.partial(slow_lengths), Client(), lengths])
    exactly(result.values, [[3.0, 5.0, 7.0]] * 4)


def test_async_functions_run_together():
    async def meet(completions, **columns):
        nonlocal waiting, everyone
        if everyone is None:
            everyone = asyncio.Event()
        waiting += 1
        if waiting == 2:
            everyone.set()
        await asyncio.wait_for(everyone.wait(), 5)
        return 1.0

    waiting, everyone = 0, None
    exactly(score([meet, meet]).total, [2.0])


def test_async_functions_run_where_the_thread_has_a_running_loop():
    async def notebook():
        return score(slow_lengths)

    exactly(asyncio.run(notebook()).total, [3.0, 5.0, 7.0])


def test_all_calls_share_one_loop():
    loops = set()

    async def where(**columns):
        loops.add(asyncio.get_running_loop())
        return 0.0

    rewards = RewardFunctions(where)
    for _ in range(3):
        rewards(PROMPTS, COMPLETIONS, IDS, COLUMNS)
    assert len(loops) == 1


def test_the_loop_ends_with_its_owner():
    rewards = RewardFunctions(slow_lengths)
    before = set(threading.enumerate())
    rewards(PROMPTS, COMPLETIONS, IDS, COLUMNS)
    (thread,) = set(threading.enumerate()) - before
    del rewards
    gc.collect()
    assert not thread.is_alive()


def test_synchronous_functions_start_no_thread():
    before = threading.active_count()
    rewards = RewardFunctions(lengths)
    rewards(PROMPTS, COMPLETIONS, IDS, COLUMNS)
    assert threading.active_count() == before


def test_a_failing_async_function_is_named_and_the_others_end_first():
    ended = []

    async def fails(**columns):
        raise OSError("no route to host")

    async def ends(**columns):
        await asyncio.sleep(0.01)
        ended.append(True)
        return 0.0

    with pytest.raises(RewardError, match=r"'fails' raised OSError, on a batch of 3.*: no route to host") as caught:
        score([fails, ends])
    assert isinstance(caught.value.__cause__, OSError)
    assert ended == [True]


def test_a_failing_function_leaves_no_coroutine_unawaited():
    def fails(**columns):
        raise OSError("disk")

    with pytest.raises(RewardError):
        score([slow_lengths, fails])
    gc.collect()  # an unawaited coroutine warns here, and warnings are errors


def test_what_an_async_function_returns_is_checked_as_well():
    async def short(**columns):
        return [1.0]

    with pytest.raises(RewardError, match="'short' returned 1 reward for 3"):
        score(short)


# --- TRL's own ---


def test_rewards_of_trl_run_unchanged():
    thinks = [{"role": "assistant", "content": "<think>\nwell\n</think>\nyes"}]
    blurts = [{"role": "assistant", "content": "yes"}]
    rewards = RewardFunctions(
        [
            think_format_reward,
            get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=4),
            get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0),
        ],
        weights=[1.0, 2.0, 1.0],
    )
    question = [{"role": "user", "content": "?"}]
    ids = [[1, 2, 3, 4, 5], [5] * 8]
    result = rewards([question, question], [thinks, blurts], ids, {"solution": ["1", "2"]}, ["yes", "no"])
    assert result.names == ("think_format_reward", "soft_overlong_punishment_reward", "repetition_penalty_reward")
    torch.testing.assert_close(result.values, torch.tensor([[1.0, 0.0], [0.0, -0.5], [0.0, -6 / 7]]))
    torch.testing.assert_close(result.total, torch.tensor([1.0, -1.0 - 6 / 7]))


def test_rewards_of_trl_that_need_a_column_say_so():
    with pytest.raises(RewardError, match="'accuracy_reward' needs a column 'solution'"):
        score(accuracy_reward)


def test_the_engines_part_loads_no_reward_library():
    code = "import sys, zorl.reward_functions; print({'sklearn', 'trl', 'transformers', 'gradio'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_reward_functions_are_picklable():
    rewards = RewardFunctions([slow_lengths, lengths], weights=[1.0, 2.0])
    before = rewards(PROMPTS, COMPLETIONS, IDS, COLUMNS)
    after = pickle.loads(pickle.dumps(rewards))(PROMPTS, COMPLETIONS, IDS, COLUMNS)
    assert torch.equal(before.total, after.total)
