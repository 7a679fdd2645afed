"""MeZOTrainer end to end on tiny models: every objective, killed and resumed runs, and bad input."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, TrainerCallback

from zorl import MeZOConfig, MeZOTrainer, Prompt
from zorl.label_head import LabelHead
from zorl.parameters import ParameterSet
from zorl.replay import replay
from zorl.reward_functions import RewardError
from zorl.rewards import accuracy, f1
from zorl.run_folder import RunFolder
from zorl.trajectory import TrajectoryError, read

PROMPT = Prompt("{text} It was {mask}.", {"bad": "terrible", "good": "great"})
SUBJECTS = ("film", "story", "plot", "ending", "book", "answer")
WORDS = {"good": ("great", "good", "like"), "bad": ("terrible", "bad", "odd")}


def rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """Reviews whose label is in one of their words."""
    generator = random.Random(seed)
    labels = [("good", "bad")[i % 3 == 2] for i in range(n)]
    return [
        {"text": f"the {generator.choice(SUBJECTS)} was {generator.choice(WORDS[label])}", "label": label}
        for label in labels
    ]


TRAIN, EVAL = rows(24), rows(12, seed=1)


@pytest.fixture
def base(parts: Callable[[str], Any], tmp_path: Path) -> Callable[[str], str]:
    """The path of a saved tiny model with its tokenizer."""

    def save(kind: str) -> str:
        path = tmp_path / f"base-{kind}"
        if not path.exists():
            parts(kind).model.save_pretrained(path)
            parts(kind).tokenizer.save_pretrained(path)
        return str(path)

    return save


@pytest.fixture
def make(base: Callable[[str], str], tmp_path: Path) -> Callable[..., MeZOTrainer]:
    """A trainer with short settings; keywords are MeZOTrainer's, `settings` MeZOConfig's."""

    def trainer(
        folder: str = "out", *, kind: str = "bert", settings: dict[str, Any] | None = None, **options: Any
    ) -> MeZOTrainer:
        config = MeZOConfig(
            output_dir=str(tmp_path / folder),
            **{
                "max_steps": 6,
                "per_device_train_batch_size": 8,
                "logging_steps": 2,
                "save_strategy": "no",
                "disable_tqdm": True,
                "calibration": "none",
                **(settings or {}),
            },
        )
        objective = {} if options.keys() & {"reward_funcs", "loss", "judge"} else {"loss": "cross_entropy"}
        defaults = {"model": base(kind), "args": config, "train_dataset": TRAIN, "prompt": PROMPT}
        return MeZOTrainer(**{**defaults, **objective, **options})

    return trainer


def weights(trainer: MeZOTrainer) -> str:
    return trainer.tuned.sha256()


def tuned(trainer: MeZOTrainer) -> str:
    """The hash of the weights after training."""
    before = weights(trainer)
    trainer.train()
    assert weights(trainer) != before
    return weights(trainer)


def logged(trainer: MeZOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class StopAt(TrainerCallback):
    """Ends a run after a step, as a user's own callback may."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


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
    with pytest.raises(ValueError, match="compares directions with each other, and n_spsa='1' has steps of one alone"):
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


# --- the folder of a run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "loader"), [("gpt2", AutoModelForCausalLM), ("bert", AutoModelForMaskedLM)])
def test_a_saved_model_loads_as_any_other(make: Callable[..., MeZOTrainer], tmp_path: Path, kind: str, loader: type):
    trainer = make(kind=kind)
    tuned(trainer)
    trainer.save_model()
    loaded = loader.from_pretrained(tmp_path / "out")
    assert ParameterSet(loaded.named_parameters()).sha256() == weights(trainer)
    text = AutoTokenizer.from_pretrained(tmp_path / "out")("the film was great", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**text).logits, trainer.model.eval()(**text).logits)
    settings = RunFolder(tmp_path / "out").read_settings()
    assert Prompt.from_dict(settings["prompt"]) == trainer.prompt
    assert settings["weights_sha256"] == weights(trainer)


def test_nothing_but_the_trajectory_and_the_log_is_saved_while_training(
    make: Callable[..., MeZOTrainer], tmp_path: Path
):
    make(settings={"save_strategy": "steps", "save_steps": 2}).train()
    names = {path.name for path in (tmp_path / "out").iterdir() if not path.name.endswith(".lock")}
    assert names == {"trajectory.zorl", "trainer_state.json"}
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 20_000


def test_the_trajectory_and_the_base_give_the_weights_of_any_step(make: Callable[..., MeZOTrainer], tmp_path: Path):
    hashes = {}

    class Remember(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            hashes[state.global_step] = weights(trainer)

    trainer = make(callbacks=[Remember()], settings={"n_spsa": "1-3/6"})
    hashes[0] = weights(trainer)
    trainer.train()
    assert len(set(hashes.values())) == 7
    folder = RunFolder(tmp_path / "out")
    for step, digest in hashes.items():
        header, records = read(folder.trajectory, step)
        _, rebuilt = folder.rebuild(header)
        replay(header, records, rebuilt)
        assert rebuilt.sha256() == digest


def test_another_base_is_refused(make: Callable[..., MeZOTrainer], base: Callable[[str], str], tmp_path: Path):
    make().train()
    folder = RunFolder(tmp_path / "out")
    header, _ = read(folder.trajectory)
    with pytest.raises(TrajectoryError, match=r"is not the base of the run: it lacks \d+ of its parameters"):
        folder.rebuild(header, base("gpt2"))
    other = AutoModelForMaskedLM.from_pretrained(base("bert"))
    with torch.no_grad():
        other.bert.embeddings.LayerNorm.bias[0] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(TrajectoryError, match="the base weights differ from the run's: their SHA-256 is"):
        folder.rebuild(header, str(tmp_path / "other"))


def test_the_best_step_is_what_is_kept(make: Callable[..., MeZOTrainer], tmp_path: Path):
    hashes = {}

    class Remember(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
            hashes[state.global_step] = (weights(trainer), metrics["eval_reward"])

    settings = {
        "max_steps": 30,
        "n_spsa": "1",
        "learning_rate": 2e-2,  # far too large, so that the last step is not the best
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "best",
        "load_best_model_at_end": True,
        "lr_scheduler_type": "constant",
    }
    trainer = make(eval_dataset=EVAL, settings=settings, callbacks=[Remember()])
    trainer.train()
    best = max(hashes, key=lambda step: hashes[step][1])
    assert best < 30
    assert trainer.state.best_global_step == best == trainer.step
    assert weights(trainer) == hashes[best][0]
    assert trainer.evaluate()["eval_reward"] == pytest.approx(hashes[best][1])
    trainer.save_model()
    assert RunFolder(tmp_path / "out").read_settings()["step"] == best


def test_a_run_ends_early_where_its_held_out_score_no_longer_grows_and_is_not_taken_up_again(
    make: Callable[..., MeZOTrainer],
):
    settings = {
        "max_steps": 40, "learning_rate": 1e-9, "eval_strategy": "steps", "eval_steps": 2, "early_stopping_patience": 3,
        "load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    options = {"reward_funcs": accuracy(), "eval_dataset": EVAL, "settings": settings}
    trainer = make(**options)
    trainer.train()
    assert trainer.state.global_step == 8, "the first evaluation, and three that were no better"
    again = make(**options)
    again.train(resume_from_checkpoint=True)
    assert again.mezo is not None
    assert again.mezo.steps == 8
    gain = {**settings, "early_stopping_patience": None, "stop_below_gain": 0.01}
    flat = make("flat", **{**options, "settings": gain})
    flat.train()
    assert flat.state.global_step == 8, "four evaluations make a line, and it is level"
    with pytest.raises(ValueError, match="stop_below_gain looks at the held-out score, and there are no evaluations"):
        make(settings={"stop_below_gain": 0.01})


# --- interrupted runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 3, 5, 8])
def test_a_run_that_was_stopped_continues_to_the_same_bits(make: Callable[..., MeZOTrainer], stop: int):
    """24 rows in batches of 8: an epoch is three steps."""
    settings = {"max_steps": 10, "n_spsa": "1-3/8", "calibration": "bias", "eval_strategy": "steps", "eval_steps": 2}
    options = {"settings": settings, "reward_funcs": f1(), "eval_dataset": EVAL}
    straight = make("straight", **options)
    end = tuned(straight)
    first = make("broken", **options, callbacks=[StopAt(stop)])
    first.train()
    assert first.state.global_step == stop
    second = make("broken", **options)
    second.train(resume_from_checkpoint=True)
    assert weights(second) == end
    assert second.forwards == straight.forwards
    assert second.prompt == straight.prompt
    assert second.state.log_history[-1]["step"] == 10


@pytest.mark.parametrize(
    "method",
    [
        {"update": "momentum", "learning_rate": 1e-4},
        {"update": "adam", "distribution": "gaussian", "moments": "stored"},
        {"estimator": "one_point", "learning_rate": 1e-4},
        {"estimator": "variance_spsa", "block_scales": "gradient_norms", "block_scales_every": 4},
        {"estimator": "expectation_spsa", "update": "adam", "block_scales_every": 4},
        {"estimator": "forward_gradient"},
    ],
    ids=lambda method: "-".join(str(value) for value in method.values()),
)
def test_every_method_continues_and_is_replayed_to_the_same_bits(
    make: Callable[..., MeZOTrainer], method: dict[str, Any]
):
    end = tuned(make("straight", settings={"max_steps": 7, **method}))
    make("broken", settings={"max_steps": 7, **method}, callbacks=[StopAt(3)]).train()
    second = make("broken", settings={"max_steps": 7, **method})
    second.train(resume_from_checkpoint=True)
    assert weights(second) == end
    header, records = read(second.folder.trajectory)
    _, parameters = second.folder.rebuild(header)
    replay(header, records, parameters)
    assert parameters.sha256() == end


def test_a_judge_is_not_asked_about_single_points(make: Callable[..., MeZOTrainer]):
    with pytest.raises(
        ValueError, match="a judge compares two sides of a direction, and estimator='one_point' looks at one"
    ):
        make(judge=lambda **_: [], settings={"estimator": "one_point"})
    with pytest.raises(ValueError, match="and estimator='one_sided' looks at one"):
        make(judge=lambda **_: [], settings={"estimator": "one_sided"})


def test_sampled_text_is_the_same_after_an_interruption(make: Callable[..., MeZOTrainer]):
    def long(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    settings = {"max_completion_length": 3, "max_steps": 5}
    options: dict[str, Any] = {"kind": "gpt2", "reward_funcs": long, "prompt": Prompt("{text}"), "settings": settings}
    end = tuned(make("straight", **options))
    make("broken", **options, callbacks=[StopAt(2)]).train()
    second = make("broken", **options)
    second.train(resume_from_checkpoint=True)
    assert weights(second) == end


def test_the_same_trainer_may_go_on_after_an_interrupt(make: Callable[..., MeZOTrainer]):
    """As in a notebook: Ctrl-C, a look at the model, and on with the same object."""
    calls = itertools.count()

    def reward(completions: list[str], **columns: Any) -> list[float]:
        if next(calls) == 3:  # in the fourth step
            raise KeyboardInterrupt
        return accuracy()(completions=completions, **columns)

    reference = make("reference", reward_funcs=accuracy(), eval_dataset=EVAL)
    end = tuned(reference)
    hashes = []

    class Remember(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            hashes.append(weights(trainer))

    def named(**arguments: Any) -> list[float]:
        return reward(**arguments)

    named.__name__ = "accuracy"
    trainer = make(reward_funcs=named, callbacks=[Remember()], eval_dataset=EVAL)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(hashes) == 3
    assert weights(trainer) == hashes[-1], "Ctrl-C in mid-step leaves the weights as before the step"
    trainer.evaluate()
    trainer.train(resume_from_checkpoint=True)
    assert weights(trainer) == end


def test_an_interrupt_between_micro_batches_leaves_nothing_behind(make: Callable[..., MeZOTrainer]):
    class CtrlC(TrainerCallback):
        armed = True

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 and self.armed:
                self.armed = False
                raise KeyboardInterrupt

    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    end = tuned(make("straight", settings=settings))
    trainer = make(settings=settings, callbacks=[CtrlC()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert weights(trainer) == end


def test_a_reward_that_raises_loses_nothing(make: Callable[..., MeZOTrainer]):
    end = tuned(make("reference", reward_funcs=accuracy()))
    calls = itertools.count()

    def broken(completions: list[str], **columns: Any) -> list[float]:
        if next(calls) == 4:
            raise ZeroDivisionError("no good answers")
        return accuracy()(completions=completions, **columns)

    broken.__name__ = "accuracy"
    with pytest.raises(RewardError, match="reward function 'accuracy' raised ZeroDivisionError"):
        make(reward_funcs=broken).train()
    repaired = make(reward_funcs=accuracy())
    repaired.train(resume_from_checkpoint=True)
    assert weights(repaired) == end


PROGRAM = """
import sys
import torch
torch.set_num_threads(1)
from zorl import MeZOConfig, MeZOTrainer, Prompt
from zorl.rewards import f1
import json
base, folder, rows, resume = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3])), sys.argv[4] == "resume"
config = MeZOConfig(output_dir=folder, max_steps=400, per_device_train_batch_size=8, disable_tqdm=True, n_spsa="1-2/200",
                    eval_strategy="steps", eval_steps=50, save_strategy="steps", save_steps=50, load_best_model_at_end=True)
trainer = MeZOTrainer(base, f1(), args=config, train_dataset=rows, eval_dataset=rows[:12],
                      prompt=Prompt("{text} It was {mask}.", {"bad": "terrible", "good": "great"}))
print("ready", flush=True)
trainer.train(resume_from_checkpoint=resume)
trainer.save_model()
print("weights", trainer.tuned.sha256(), trainer.state.best_global_step)
"""


def test_a_run_that_is_killed_at_random_points_continues_to_the_same_bits(base: Callable[[str], str], tmp_path: Path):
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(TRAIN), encoding="utf-8")
    log = (tmp_path / "log").open("w")

    def start(folder: str, *, resume: bool) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, base("gpt2"), str(tmp_path / folder), str(data)]
        return subprocess.Popen(
            [*command, "resume" if resume else "new"], stdout=subprocess.PIPE, stderr=log, text=True
        )

    generator = random.Random()
    straight = start("straight", resume=False)
    trajectory = tmp_path / "broken" / "trajectory.zorl"
    for resume in (False, True):
        size = trajectory.stat().st_size if resume else 0
        process = start("broken", resume=resume)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        while not trajectory.exists() or trajectory.stat().st_size < size + 100:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    last, _ = start("broken", resume=True).communicate()
    expected, _ = straight.communicate()
    log.close()
    assert expected.splitlines()[-1].startswith("weights "), (tmp_path / "log").read_text()
    assert last.splitlines()[-1] == expected.splitlines()[-1], (tmp_path / "log").read_text()
    assert trajectory.read_bytes() == (tmp_path / "straight" / "trajectory.zorl").read_bytes()


def test_a_torn_trajectory_continues_from_its_last_whole_step(
    make: Callable[..., MeZOTrainer], tmp_path: Path, capsys: Any
):
    settings = {"max_steps": 20}
    end = tuned(make("straight", settings=settings))
    make(settings=settings, callbacks=[StopAt(18)]).train()
    path = tmp_path / "out" / "trajectory.zorl"
    path.write_bytes(path.read_bytes()[:-3])
    trainer = make(settings=settings)
    trainer.train(resume_from_checkpoint=True)
    assert weights(trainer) == end
    assert "a write was cut short, or a bit flipped" in capsys.readouterr().out


def test_a_run_without_a_step_is_no_run_and_leaves_nothing_to_the_next(
    make: Callable[..., MeZOTrainer], parts: Callable[[str], Any]
):
    """A model made in memory keeps its first values in the folder; those of a run that never began are not another's."""

    def fail(completions: list[str], **columns: Any) -> list[float]:
        raise RuntimeError("not yet")

    tokenizer = parts("gpt2").tokenizer
    first, second = copy.deepcopy(parts("gpt2").model), copy.deepcopy(parts("gpt2").model)
    with torch.no_grad():
        second.transformer.wte.weight.mul_(1.5)
    with pytest.raises(RewardError):
        make(model=first, processing_class=tokenizer, reward_funcs=fail).train()
    trainer = make(model=second, processing_class=tokenizer, settings={"max_steps": 1, "learning_rate": 1e-6})
    before = second.transformer.wte.weight.detach().clone()
    trainer.train()
    torch.testing.assert_close(second.transformer.wte.weight.detach(), before, rtol=0, atol=1e-4)


def test_a_model_made_in_memory_is_resumed_from_its_kept_first_values(
    make: Callable[..., MeZOTrainer], parts: Callable[[str], Any]
):
    def options() -> dict[str, Any]:
        return {"model": copy.deepcopy(parts("gpt2").model), "processing_class": parts("gpt2").tokenizer}

    end = tuned(make("straight", **options()))
    make(**options(), callbacks=[StopAt(2)]).train()
    trainer = make(**options())
    trainer.train(resume_from_checkpoint=True)
    assert weights(trainer) == end


# --- adapters -------------------------------------------------------------------------------------------------------------

peft_warning = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks transformers


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)


@peft_warning
def test_an_adapter_is_tuned_resumed_replayed_and_saved(make: Callable[..., MeZOTrainer], base: Any, tmp_path: Path):
    base("gpt2")  # made before the seed is set: making it draws numbers
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "kind": "gpt2",
        "peft_config": lora(),
        "settings": {"max_steps": 8, "learning_rate": 1e-2},
    }
    straight = make("straight", **options)
    assert all("lora_" in name for name in straight.tuned)
    frozen = {n: p.detach().clone() for n, p in straight.model.named_parameters() if not p.requires_grad}
    end = tuned(straight)
    assert all(torch.equal(p, frozen[n]) for n, p in straight.model.named_parameters() if n in frozen)

    torch.manual_seed(0)
    make("broken", **options, callbacks=[StopAt(3)]).train()
    torch.manual_seed(7)  # other first values of A, which the run's own replace
    resumed = make("broken", **options)
    resumed.train(resume_from_checkpoint=True)
    assert weights(resumed) == end

    folder = RunFolder(tmp_path / "broken")
    header, records = read(folder.trajectory)
    model, rebuilt = folder.rebuild(header)
    replay(header, records, rebuilt)
    assert rebuilt.sha256() == end

    straight.save_model()
    from peft import PeftModel

    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base("gpt2")), tmp_path / "straight")
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens).logits
        torch.testing.assert_close(saved.eval()(input_ids=tokens).logits, expected)
    assert not (tmp_path / "straight" / "model.safetensors").exists()


@peft_warning
def test_a_missing_or_exchanged_init_is_named(make: Callable[..., MeZOTrainer], tmp_path: Path):
    make(kind="gpt2", peft_config=lora(), callbacks=[StopAt(2)]).train()
    make("other", kind="gpt2", peft_config=lora(), callbacks=[StopAt(2)]).train()
    folder = RunFolder(tmp_path / "out")
    header, _ = read(folder.trajectory)
    shutil.copy(tmp_path / "other" / "init.safetensors", folder.init)
    with pytest.raises(TrajectoryError, match=r"init\.safetensors is not the file that the run was started with"):
        folder.rebuild(header)
    with pytest.raises(TrajectoryError, match=r"init\.safetensors is not the file that the run was started with"):
        make(kind="gpt2", peft_config=lora()).train(resume_from_checkpoint=True)
    folder.init.unlink()
    for attempt in (
        lambda: folder.rebuild(header),
        lambda: make(kind="gpt2", peft_config=lora()).train(resume_from_checkpoint=True),
    ):
        with pytest.raises(
            TrajectoryError, match=r"init\.safetensors is missing: it holds the tuned parameters' first"
        ):
            attempt()


@peft_warning
def test_a_peft_model_and_a_peft_config_are_one_too_many(make: Callable[..., MeZOTrainer], parts: Callable[[str], Any]):
    from peft import get_peft_model

    model = get_peft_model(copy.deepcopy(parts("gpt2").model), lora())
    with pytest.raises(ValueError, match="the model is already a PeftModel"):
        make(model=model, peft_config=lora(), processing_class=parts("gpt2").tokenizer)


# --- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, "none"),
        ({"reward_funcs": accuracy(), "loss": "cross_entropy"}, "reward_funcs and loss"),
        ({"reward_funcs": accuracy(), "judge": lambda **_: [], "loss": len}, "reward_funcs and judge and loss"),
    ],
)
def test_exactly_one_objective_is_given(base: Callable[[str], str], options: dict[str, Any], found: str):
    with pytest.raises(ValueError, match=f"give exactly one of reward_funcs, judge and loss: got {found}$"):
        MeZOTrainer(base("gpt2"), train_dataset=TRAIN, prompt=PROMPT, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prompt": Prompt("{txt} It was {mask}.", {"bad": "terrible", "good": "great"})},
            r"uses the column 'txt', which the data does not have; did you mean 'text'\? \(columns: 'text', 'label'\)",
        ),
        (
            {"prompt": Prompt("{text} It was {mask}.", {"bad": "terrible", "fine": "great"})},
            r"the column 'label' holds 'good' \(16 rows\) without a label word; label_words has 'bad', 'fine'",
        ),
        ({"train_dataset": []}, "train_dataset is empty"),
        ({"eval_dataset": []}, "eval_dataset is empty"),
        (
            {"train_dataset": [row for row in TRAIN if row["label"] == "good"]},
            "train_dataset has one class only: all 16 rows have label='good'",
        ),
        ({"loss": "accuracy"}, r"loss must be 'cross_entropy' or a function of \(model, rows\), got 'accuracy'"),
        ({"reward_funcs": []}, "reward_funcs is empty; give at least one reward function"),
        ({"settings": {"parameters": ["*.nothing"]}}, r"the pattern '\*\.nothing' matches none of the \d+ parameters"),
    ],
)
def test_bad_arguments_get_a_sentence(make: Callable[..., MeZOTrainer], options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"learning_rate": -1e-4}, "learning_rate must be positive, got -0.0001"),
        ({"learning_rate": math.nan}, "learning_rate must be positive, got nan"),
        ({"epsilon": "0"}, "epsilon must be a positive number or 'auto', got '0'"),
        ({"epsilon": "-0.1"}, "epsilon must be a positive number or 'auto', got '-0.1'"),
        ({"epsilon": "nan"}, "epsilon must be a positive number or 'auto', got 'nan'"),
        ({"epsilon": "inf"}, "epsilon must be a positive number or 'auto', got 'inf'"),
        ({"epsilon": "large"}, "epsilon must be a positive number or 'auto', got 'large'"),
        ({"n_spsa": "0"}, "n_spsa needs at least one direction"),
        ({"comparison": "loud"}, "comparison must be one of share, logit, sign, got 'loud'"),
        ({"distribution": "uniform"}, "distribution must be one of rademacher, gaussian, rank1, rank4, got 'uniform'"),
        ({"forward_batch_size": 0}, "forward_batch_size must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be finite and not negative, got -1.0"),
        (
            {"bf16": True},
            "bf16=True belongs to backpropagation: load the model in half precision with dtype='bfloat16'",
        ),
        ({"bf16_full_eval": True}, "bf16_full_eval=True belongs to backpropagation"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing=True belongs to backpropagation"),
        ({"activation_checkpointing": True}, "activation_checkpointing=True belongs to backpropagation"),
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0 belongs to backpropagation"),
        ({"weight_decay": 0.1}, "weight_decay=0.1 belongs to backpropagation: .* cannot be replayed"),
    ],
)
def test_settings_out_of_range_or_of_backpropagation_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        MeZOConfig(output_dir=str(tmp_path), **settings)


@pytest.mark.parametrize("update", ["sgd", "momentum"])
def test_an_update_in_units_of_the_slope_needs_a_learning_rate(make: Callable[..., MeZOTrainer], update: str):
    trainer = make(settings={"update": update})
    with pytest.raises(ValueError, match=f"no default suits: give learning_rate .*zorl diagnose … --update {update}"):
        trainer.train()
    assert not trainer.folder.trajectory.exists()
    make("given", settings={"update": update, "learning_rate": 1e-4, "max_steps": 1}).train()


def test_a_tracker_that_is_not_installed_is_named(make: Callable[..., MeZOTrainer]):
    with pytest.raises(ImportError, match="requires wandb to be installed"):
        make(settings={"report_to": "wandb"})


def test_an_unknown_update_rule_is_refused(make: Callable[..., MeZOTrainer]):
    with pytest.raises(ValueError, match="update='adamw' is not an update rule; choose one of .*'adam'"):
        make(settings={"update": "adamw"}).train()


def test_a_model_whose_weights_are_nan_is_refused(make: Callable[..., MeZOTrainer], parts: Callable[[str], Any]):
    model = copy.deepcopy(parts("gpt2").model)
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = math.nan
    with pytest.raises(ValueError, match=r"parameter 'transformer\.ln_f\.weight' holds 1 NaN or infinite values of 32"):
        make(model=model, processing_class=parts("gpt2").tokenizer)


def test_a_model_made_in_memory_needs_its_tokenizer(make: Callable[..., MeZOTrainer], parts: Callable[[str], Any]):
    with pytest.raises(ValueError, match="processing_class is needed: the model has no name or path"):
        make(model=copy.deepcopy(parts("gpt2").model))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: [math.nan] * n, "returned NaN for sample 0; return None where it is not applicable"),
        (lambda n: [math.inf] * n, "returned inf for sample 0; a reward must be finite"),
        (lambda n: [0.5] * (n - 1), "returned 15 rewards for 16 completions"),  # 8 rows with each of 2 labels
        (lambda n: "good", "returned str 'good'"),
        (lambda n: None, r"returned None \(.*\); does it lack a return statement"),
    ],
)
def test_a_bad_reward_is_named_and_moves_nothing(make: Callable[..., MeZOTrainer], returned: Any, message: str):
    def odd(completions: list[str], **columns: Any) -> Any:
        return returned(len(completions))

    trainer = make(reward_funcs=odd)
    before = weights(trainer)
    with pytest.raises(RewardError, match=f"reward function 'odd' {message}"):
        trainer.train()
    assert weights(trainer) == before


def test_a_reward_that_never_applies_is_an_error_in_the_end(make: Callable[..., MeZOTrainer]):
    def never(completions: list[str], **columns: Any) -> list[None]:
        return [None] * len(completions)

    trainer = make(reward_funcs=never, settings={"max_steps": 50})
    before = weights(trainer)
    with pytest.raises(
        RewardError, match="after 10 batches there is no reward to follow: 'never' returned None for every"
    ):
        trainer.train()
    assert weights(trainer) == before


def test_a_folder_that_holds_a_run_is_not_trained_into(make: Callable[..., MeZOTrainer], tmp_path: Path):
    make().train()
    before = (tmp_path / "out" / "trajectory.zorl").read_bytes()
    with pytest.raises(FileExistsError, match="holds a run: continue it with resume_from_checkpoint=True, or choose"):
        make().train()
    assert (tmp_path / "out" / "trajectory.zorl").read_bytes() == before
    with pytest.raises(ValueError, match="there is no run to continue: .* does not exist"):
        make("new").train(resume_from_checkpoint=True)


@peft_warning
def test_two_runs_cannot_write_one_folder(make: Callable[..., MeZOTrainer], tmp_path: Path):
    """Even where the second starts before the first has made a step: its first values would replace the first's."""
    failures: list[BaseException] = []

    def reward(completions: list[str], **columns: Any) -> list[float]:
        if not failures:
            for resume in (False, True) if (tmp_path / "out" / "trajectory.zorl").exists() else (False,):
                with pytest.raises((TrajectoryError, FileExistsError)) as caught:
                    make(kind="gpt2", peft_config=lora()).train(resume_from_checkpoint=resume)
                failures.append(caught.value)
        return [float(len(text)) for text in completions]

    make(reward_funcs=reward, kind="gpt2", peft_config=lora(), settings={"max_steps": 2}).train()
    assert failures
    assert any("another run is writing" in str(failure) for failure in failures)
    folder = RunFolder(tmp_path / "out")
    header, records = read(folder.trajectory)
    folder.rebuild(header)
    assert len(records) == 2


def test_resuming_with_other_settings_is_refused(make: Callable[..., MeZOTrainer]):
    make(callbacks=[StopAt(2)]).train()
    for settings, message in (
        ({"per_device_train_batch_size": 4}, r"batch was \[8, 1\], is now \[4, 1\]"),
        ({"seed": 3}, "seed was 42, is now 3"),
        ({"n_spsa": "2", "learning_rate": 2.4e-2}, "n_spsa was '8', is now '2'"),
    ):
        with pytest.raises(TrajectoryError, match=f"recorded with other settings: {message}"):
            make(settings=settings).train(resume_from_checkpoint=True)
    with pytest.raises(TrajectoryError, match="objective was 'cross_entropy', is now 'accuracy'"):
        make(reward_funcs=accuracy()).train(resume_from_checkpoint=True)
    with pytest.raises(TrajectoryError, match="rows was 24, is now 20"):
        make(train_dataset=TRAIN[:20]).train(resume_from_checkpoint=True)
    with pytest.raises(TrajectoryError, match=r"the model (lacks|also has) \d+ of the trajectory's parameters"):
        make(kind="gpt2").train(resume_from_checkpoint=True)


def test_training_without_rows_and_evaluating_without_rows_are_refused(make: Callable[..., MeZOTrainer]):
    with pytest.raises(ValueError, match="train_dataset is needed to train"):
        make(train_dataset=None).train()
    with pytest.raises(ValueError, match="eval_dataset is needed to evaluate"):
        make().evaluate()
