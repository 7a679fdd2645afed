"""MeZOTrainer end to end on tiny models: every objective, and what is told of it."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import EVAL, PROMPT, SUBJECTS, TRAIN, StopAt, logged, tuned, weights

from zorl import MeZOTrainer, Prompt
from zorl.label_head import LabelHead
from zorl.probe import CENTRE
from zorl.replay import replay
from zorl.rewards import accuracy, f1
from zorl.run_folder import RunFolder
from zorl.trajectory import read

# --- every objective ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "bert", "opt", "qwen2"])
def test_cross_entropy_falls(make: Callable[..., MeZOTrainer], kind: str):
    settings = {"max_steps": 120, "learning_rate": 3e-3, "n_spsa": "2"}
    trainer = make(kind=kind, eval_dataset=EVAL, settings=settings)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.1


def test_macro_f1_itself_rises(make: Callable[..., MeZOTrainer]):
    settings = {"max_steps": 200, "learning_rate": 3e-3, "n_spsa": "2", "per_device_train_batch_size": 24}
    trainer = make(reward_funcs=f1(), metrics=accuracy(), eval_dataset=TRAIN, settings=settings)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_macro_f1"] == after["eval_reward"] > before["eval_reward"] + 0.1
    assert after["eval_accuracy"] > before["eval_accuracy"]


@pytest.mark.parametrize("goal", [{"reward_funcs": f1()}, {"reward_funcs": accuracy()}, {"loss": "cross_entropy"}])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_tuning_starts_where_a_fitted_head_ends(make: Callable[..., MeZOTrainer], kind: str, goal: dict[str, Any]):
    trainer = make(kind=kind, **goal, settings={"calibration": "head", "max_steps": 1}, eval_dataset=TRAIN)
    before = weights(trainer), trainer.evaluate()["eval_reward"]
    trainer.calibrate("bias")
    assert trainer.prompt.label_head is not None
    assert trainer.prompt.label_head.weight is None
    biased = trainer.evaluate()["eval_reward"]
    trainer.calibrate()
    assert weights(trainer) == before[0]
    assert trainer.evaluate()["eval_reward"] >= biased >= before[1]
    assert trainer.forwards == math.ceil(len(TRAIN) / 8), "the rows are evaluated once for both"
    fitted = trainer.prompt.label_head
    trainer.train()
    assert trainer.folder.read_settings() == {} or trainer.prompt.label_head == fitted


def test_a_run_goes_on_with_the_head_that_it_was_started_with(make: Callable[..., MeZOTrainer]):
    settings = {"calibration": "head", "max_steps": 4}
    whole = make(reward_funcs=accuracy(), settings=settings)
    whole.train()
    half = make("half", reward_funcs=accuracy(), settings=settings, callbacks=[StopAt(2)])
    half.train()
    rest = make("half", reward_funcs=accuracy(), settings=settings)
    rest.train(resume_from_checkpoint=True)
    assert weights(rest) == weights(whole)
    assert rest.prompt.label_head == whole.prompt.label_head


def test_a_resumed_run_keeps_the_order_of_its_labels(make: Callable[..., MeZOTrainer]):
    """The head's rows are in the order of the label words, which need not be the alphabet's."""
    prompt = Prompt(PROMPT.template, {"good": "great", "bad": "terrible"})
    settings = {"calibration": "head", "max_steps": 4}
    whole = make(reward_funcs=accuracy(), prompt=prompt, settings=settings)
    whole.train()
    make("half", reward_funcs=accuracy(), prompt=prompt, settings=settings, callbacks=[StopAt(2)]).train()
    rest = make("half", reward_funcs=accuracy(), prompt=prompt, settings=settings)
    rest.train(resume_from_checkpoint=True)
    assert rest.prompt.labels == ("good", "bad")
    assert weights(rest) == weights(whole)


def test_rewards_see_the_trainer_s_state_from_the_first_call(make: Callable[..., MeZOTrainer]):
    seen: list[int] = []

    def right(completions: list[str], label: list[str], trainer_state: Any, **columns: Any) -> list[float]:
        seen.append(trainer_state.global_step)
        return [float(c == t) for c, t in zip(completions, label, strict=True)]

    trainer = make(reward_funcs=right, settings={"calibration": "bias", "max_steps": 2}, eval_dataset=EVAL)
    trainer.evaluate()
    trainer.train()
    assert seen[0] == 0


def test_a_head_that_the_prompt_came_with_stays(make: Callable[..., MeZOTrainer]):
    prompt = replace(PROMPT, label_head=LabelHead((0.25, -0.25)))
    trainer = make(reward_funcs=accuracy(), prompt=prompt, settings={"calibration": "head", "max_steps": 1})
    trainer.train()
    assert trainer.prompt.label_head == prompt.label_head
    assert trainer.calibration_forwards == 0


def test_a_loss_and_the_metrics_beside_it_take_one_look_at_each_row(
    make: Callable[..., MeZOTrainer], monkeypatch: pytest.MonkeyPatch
):
    trainer = make(loss="cross_entropy", metrics=[accuracy()], eval_dataset=EVAL, settings={"max_steps": 1})
    trainer.train()
    seen: list[int] = []
    scores = type(trainer.policy).scores

    def counted(self: Any, rows: Any, points: Any) -> Any:
        seen.append(len(rows))
        return scores(self, rows, points)

    monkeypatch.setattr(type(trainer.policy), "scores", counted)
    found = trainer.evaluate()
    assert seen == [len(EVAL)]
    answers = trainer.policy.answers(EVAL, [CENTRE])[0]
    right = [answer.completion == row["label"] for answer, row in zip(answers, EVAL, strict=True)]
    assert found["eval_accuracy"] == pytest.approx(sum(right) / len(right))
    assert found["eval_loss"] == -found["eval_reward"] > 0.0


def test_a_run_that_learns_nothing_because_its_loss_is_nan_says_so(make: Callable[..., MeZOTrainer]):
    trainer = make(loss=lambda model, rows: math.nan, settings={"max_steps": 12})
    with pytest.warns(UserWarning, match="in the last 10 steps there was no answer to learn from") as told:
        trainer.train()
    assert len([warning for warning in told if "no answer to learn from" in str(warning.message)]) == 1


def test_metrics_are_recorded_beside_a_loss_of_ones_own(make: Callable[..., MeZOTrainer]):
    trainer = make(loss=lambda model, rows: 0.25, metrics=[accuracy()], eval_dataset=EVAL, settings={"max_steps": 1})
    right = [answer == row["label"] for answer, row in zip(trainer.predict(EVAL).predictions, EVAL, strict=True)]
    found = trainer.evaluate()
    assert (found["eval_loss"], found["eval_reward"]) == (0.25, -0.25)
    assert found["eval_accuracy"] == pytest.approx(sum(right) / len(right))


def test_a_callable_loss_is_minimised(make: Callable[..., MeZOTrainer]):
    seen: list[int] = []

    def size(model: Any, batch: Sequence[dict[str, Any]]) -> torch.Tensor:
        seen.append(len(batch))
        return model.get_input_embeddings().weight.float().square().mean()

    settings = {"max_steps": 60, "learning_rate": 5e-3, "parameters": ["*word_embeddings*"]}
    trainer = make(loss=size, settings=settings, eval_dataset=EVAL)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert set(seen) == {8, 12}
    assert trainer.evaluate()["eval_loss"] < before
    assert list(trainer.tuned) == ["bert.embeddings.word_embeddings.weight"]


def test_generation_is_taught_and_answers_greedily(make: Callable[..., MeZOTrainer]):
    taught = [{"text": f"the {subject}", "label": "was great"} for subject in SUBJECTS]
    settings = {"max_steps": 30, "max_completion_length": 8, "n_spsa": "4", "learning_rate": 3e-3}
    trainer = make(
        kind="gpt2",
        loss="cross_entropy",
        prompt=Prompt("{text}"),
        settings=settings,
        train_dataset=taught,
        eval_dataset=taught,
        metrics=[accuracy()],
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.1
    assert after["eval_reward"] == -after["eval_loss"]
    assert "eval_accuracy" in after
    assert trainer.args.temperature == 0


def test_a_batch_that_does_not_fit_is_halved_for_the_rest_of_the_run(make: Callable[..., MeZOTrainer]):
    trainer = make(settings={"calibration": "bias", "forward_batch_size": 32}, reward_funcs=accuracy())
    held: list[int] = []

    def refuse(module: Any, args: Any, kwargs: Any) -> None:
        held.append(len(kwargs["input_ids"]))
        if held[-1] > 5:
            raise torch.OutOfMemoryError("no room")

    trainer.evaluator.module.register_forward_pre_hook(refuse, with_kwargs=True)
    with pytest.warns(UserWarning, match="forward_batch_size has been lowered to 3 for the rest of the run") as warned:
        trainer.train()
    assert len(warned) == 1
    assert trainer.args.forward_batch_size == 3, "calibration, which came first, has told the policy that trains"
    too_large = [size for size in held if size > 5]
    assert held[: len(too_large)] == too_large == [24, 12, 6]


def test_a_reward_of_generated_text_rises(make: Callable[..., MeZOTrainer]):
    def long(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        assert all(len(ids) <= 4 for ids in completion_ids)
        return [float(len(text)) for text in completions]

    settings = {"max_steps": 60, "learning_rate": 1e-2, "n_spsa": "4", "max_completion_length": 4, "temperature": 0.0}
    trainer = make(kind="gpt2", reward_funcs=long, prompt=Prompt("{text}"), settings=settings, eval_dataset=EVAL)
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > before + 2
    assert all(isinstance(text, str) for text in trainer.predict(EVAL).predictions)


def test_rewards_are_handed_the_state_of_training(make: Callable[..., MeZOTrainer]):
    steps = []

    def reward(completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
        steps.append(trainer_state.global_step)
        return [float(len(text)) for text in completions]

    make(reward_funcs=reward, settings={"max_steps": 3, "label_reward": "best", "n_spsa": "2"}).train()
    assert steps == [0, 0, 1, 1, 2, 2]  # both directions of three probes
    steps.clear()
    make("expected", reward_funcs=reward, settings={"max_steps": 3}).train()
    assert steps == [0, 1, 2], "each label's reward is asked once for all points"


def test_the_limit_on_a_prompt_leaves_the_answer_its_room(make: Callable[..., MeZOTrainer]):
    rows = [{"text": "the film was great . it was terrible . a great story " * 3}] * 8
    given = []

    def reward(completion_ids: list[list[int]], completions: list[str], **columns: Any) -> list[float]:
        given.extend(map(len, completion_ids))
        return [float(len(text)) for text in completions]

    settings = {"max_steps": 1, "max_length": 12, "max_completion_length": 5, "temperature": 0.0}
    trainer = make(kind="gpt2", reward_funcs=reward, prompt=Prompt("{text}"), settings=settings, train_dataset=rows)
    widths = []
    trainer.evaluator.module.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: widths.append(args[0].shape[1])
    )
    trainer.train()
    assert 6 < max(widths) <= 12
    assert max(given) <= 5


def test_what_is_left_open_suits_the_objective(make: Callable[..., MeZOTrainer]):
    judge = lambda prompts, **columns: ["tie"] * len(prompts)  # noqa: E731
    for goal, settings, estimator, n_spsa, rate in (
        ({"reward_funcs": accuracy()}, {}, "one_sided", "8", 8 * 3e-3),
        ({"reward_funcs": accuracy()}, {"n_spsa": "1"}, "spsa", "1", 3e-3),
        ({"reward_funcs": accuracy()}, {"n_spsa": "1-8/100"}, "spsa", "1-8/100", 3e-3),
        ({"reward_funcs": accuracy()}, {"estimator": "spsa"}, "spsa", "1", 3e-3),
        ({"reward_funcs": accuracy()}, {"estimator": "one_point"}, "one_point", "1", 3e-3),
        ({"loss": "cross_entropy"}, {"update": "adam"}, "one_sided", "8", 3e-3),
        ({"judge": judge}, {}, "spsa", "1", 3e-3),
        ({"judge": judge}, {"n_spsa": "4", "learning_rate": 1e-3}, "spsa", "4", 1e-3),
    ):
        args = make(**goal, settings=settings).args
        assert (args.estimator, args.n_spsa, args.learning_rate) == (estimator, n_spsa, pytest.approx(rate)), settings
    with pytest.raises(ValueError, match="compares directions with each other, and n_spsa='1' has steps with only one"):
        make(settings={"estimator": "one_sided", "n_spsa": "1"})


def test_a_judge_that_prefers_right_answers_is_followed(make: Callable[..., MeZOTrainer]):
    """The judge sees two answers in an order of their own, and the row's columns."""
    shown = []

    def judge(
        prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any], label: Sequence[str], **columns: Any
    ) -> list[str]:
        shown.append((set(first), set(columns)))
        return [
            "first" if a == truth else "second" if b == truth else "both bad"
            for a, b, truth in zip(first, second, label, strict=True)
        ]

    settings = {"max_steps": 250, "learning_rate": 3e-3, "n_spsa": "2", "per_device_train_batch_size": 24}
    trainer = make(judge=judge, metrics=accuracy(), eval_dataset=TRAIN, settings=settings)
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > before + 0.1
    assert {"good", "bad"} == set().union(*(answers for answers, _ in shown))
    assert all(columns == {"text", "request_id"} for _, columns in shown)
    assert 0 < sum(logged(trainer, "decided_share")) / len(logged(trainer, "decided_share")) < 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_tuned_and_replayed(make: Callable[..., MeZOTrainer], tmp_path: Path, dtype: str):
    trainer = make(settings={"dtype": dtype, "max_steps": 20, "learning_rate": 1e-3})
    end = tuned(trainer)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {getattr(torch, dtype)}
    header, records = read(tmp_path / "out" / "trajectory.zorl")
    _, rebuilt = RunFolder(tmp_path / "out").rebuild(header)
    replay(header, records, rebuilt)
    assert rebuilt.sha256() == end


# --- the same run, otherwise ----------------------------------------------------------------------------------------------


def test_a_run_is_a_function_of_its_seed_alone(make: Callable[..., MeZOTrainer]):
    ends = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)
        random.seed(i)
        ends.append(tuned(make(f"out{i}", settings={"seed": seed})))
    assert ends[0] == ends[1] != ends[2]


@pytest.mark.parametrize("size", [24, 20], ids=["whole", "with a smaller last batch"])
def test_gradient_accumulation_is_a_larger_batch(make: Callable[..., MeZOTrainer], size: int):
    ends = []
    for i, (batch, steps) in enumerate(((8, 1), (4, 2), (2, 4), (1, 8))):
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 7}
        trainer = make(f"out{i}", reward_funcs=f1(), train_dataset=TRAIN[:size], settings=settings)
        ends.append(tuned(trainer))
        assert trainer.forwards == 7 * 8, "eight directions a step, of a forward each"
    assert len(set(ends)) == 1


@pytest.mark.parametrize("generate", [False, True], ids=["label words", "generation"])
def test_micro_batches_give_the_same_run(make: Callable[..., MeZOTrainer], generate: bool):
    def length(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    options = (
        {"kind": "gpt2", "reward_funcs": length, "prompt": Prompt("{text}")} if generate else {"reward_funcs": f1()}
    )
    ends = [
        tuned(make(f"out{size}", settings={"forward_batch_size": size, "max_completion_length": 3}, **options))
        for size in (64, 3, 1)
    ]
    assert len(set(ends)) == 1


def test_dropout_is_off(make: Callable[..., MeZOTrainer], parts: Callable[[str], Any]):
    ends = []
    for i, dropout in enumerate((0.0, 0.5)):
        model = copy.deepcopy(parts("gpt2").model).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        trainer = make(f"out{i}", model=model, processing_class=parts("gpt2").tokenizer)
        ends.append(tuned(trainer))
    assert ends[0] == ends[1]


# --- what is told ---------------------------------------------------------------------------------------------------------


def test_the_log_tells_what_a_user_needs_to_see(make: Callable[..., MeZOTrainer]):
    def short(completions: list[str], log_metric: Callable[[str, float], None], **columns: Any) -> list[float]:
        log_metric("letters", sum(map(len, completions)))
        return [-len(text) for text in completions]

    settings = {"n_spsa": "2", "max_steps": 6, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make(reward_funcs=[f1(), short], eval_dataset=EVAL, metrics=accuracy(), settings=settings)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [entry["step"] for entry in entries] == [3, 6]
    assert [entry["forwards"] for entry in entries] == [6, 12]
    for entry in entries:
        assert {"reward", "rewards/macro_f1/mean", "rewards/short/mean", "letters", "epsilon", "loss"} <= entry.keys()
        assert entry["reward"] == pytest.approx(entry["rewards/macro_f1/mean"] + entry["rewards/short/mean"], rel=1e-5)
        assert entry["loss"] == pytest.approx(-entry["reward"], rel=1e-5)
        assert 0 <= entry["informative_share"] <= 1
        if entry["projected_gradient"]:
            assert entry["loss_difference"] > 0
    evaluations = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4, 6]
    assert {"eval_macro_f1", "eval_short", "eval_accuracy", "eval_runtime"} <= evaluations[0].keys()
    assert [entry["learning_rate"] for entry in entries] == pytest.approx([2 * 3e-3 * 4 / 6, 2 * 3e-3 * 1 / 6])


def test_several_evaluation_sets_are_told_apart(make: Callable[..., MeZOTrainer]):
    trainer = make(eval_dataset={"a": EVAL, "b": TRAIN})
    figures = trainer.evaluate()
    assert figures["eval_a_loss"] != figures["eval_b_loss"]


def test_predictions_are_label_names(make: Callable[..., MeZOTrainer]):
    trainer = make(eval_dataset=EVAL, reward_funcs=accuracy())
    predictions = trainer.predict(EVAL).predictions
    right = sum(answer == row["label"] for answer, row in zip(predictions, EVAL, strict=True)) / len(EVAL)
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(right)


def test_a_reward_that_abstains_now_and_then_does_no_harm(make: Callable[..., MeZOTrainer]):
    calls = itertools.count()

    def moody(completions: list[str], **columns: Any) -> list[float | None]:
        return [None if next(calls) % 3 else float(text == "good") for text in completions]

    trainer = make(reward_funcs=moody, settings={"max_steps": 4})
    trainer.train()
    assert all(math.isfinite(value) for value in logged(trainer, "reward"))
