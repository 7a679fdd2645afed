"""Bad input to MeZOTrainer: every mistake gets a sentence, and moves nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import EVAL, PROMPT, TRAIN, StopAt, lora, peft_warning, weights

from zorl import MeZOConfig, MeZOTrainer, Prompt
from zorl.reward_functions import RewardError
from zorl.rewards import accuracy
from zorl.run_folder import RunFolder
from zorl.trajectory import TrajectoryError, read


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
        (
            {"train_dataset": "rows.tsv"},
            "train_dataset takes rows, .* and got the text 'rows.tsv': datasets.load_dataset",
        ),
        (
            {"train_dataset": {"train": TRAIN, "test": EVAL}},
            "train_dataset is a dictionary, of 'train', 'test': give the rows",
        ),
        (
            {"train_dataset": [*TRAIN, "odd"]},
            "train_dataset, row 25: expected a dictionary from columns to values, got str",
        ),
        (
            {"train_dataset": [*TRAIN, {"text": "odd"}]},
            "train_dataset, row 25: there is no column 'label', which the first row",
        ),
        ({"eval_dataset": []}, "eval_dataset is empty"),
        ({"eval_dataset": {"a": EVAL, "b": []}}, r"eval_dataset\['b'\] is empty"),
        ({"eval_dataset": {"a": [{"label": "good"}]}}, "uses the column 'text', which the data does not have"),
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
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 belongs to backpropagation"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 belongs to backpropagation"),
        ({"optim": "adafactor"}, "optim='adafactor' has no effect here: give update in its place"),
        ({"update": "adam", "adam_beta1": 0.8}, "adam_beta1=0.8 has no effect here: give beta1 in its place"),
        ({"data_seed": 3}, "data_seed=3 has no effect here: give seed in its place"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau"},
            "'reduce_lr_on_plateau' follows measurements, and a schedule has to",
        ),
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


def test_a_run_is_not_continued_with_scores_of_other_rows(make: Callable[..., MeZOTrainer]):
    settings = {"eval_strategy": "steps", "eval_steps": 2}
    make(eval_dataset=EVAL, settings=settings, callbacks=[StopAt(2)]).train()
    with pytest.raises(TrajectoryError, match="with other settings: the evaluation rows have changed$"):
        make(eval_dataset=EVAL[:8], settings=settings).train(resume_from_checkpoint=True)
    make().train(resume_from_checkpoint=True)  # without evaluations nothing is compared


def test_a_reward_that_was_mended_is_gone_on_with_and_that_is_said(make: Callable[..., MeZOTrainer]):
    def score(completions: list[str], **columns: Any) -> float:
        return 0.0

    make(reward_funcs=score, callbacks=[StopAt(2)]).train()
    make(reward_funcs=score, settings={"max_steps": 3}).train(resume_from_checkpoint=True)

    def score(completions: list[str], **columns: Any) -> float:  # type: ignore[no-redef]
        return 1.0

    with pytest.warns(UserWarning, match="'?score'? or a metric has changed since the run began"):
        make(reward_funcs=score).train(resume_from_checkpoint=True)


def test_the_score_that_decides_between_data_sets_has_to_be_named(make: Callable[..., MeZOTrainer]):
    settings = {"max_steps": 6, "learning_rate": 1e-9, "eval_strategy": "steps", "eval_steps": 1}
    options = {"reward_funcs": accuracy(), "eval_dataset": {"x": EVAL, "y": EVAL[:5]}}
    trainer = make("log", **options, settings=settings)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_y_reward" in entry] == [1, 2, 3, 4, 5, 6]
    stop = {**settings, "early_stopping_patience": 1}
    with pytest.raises(ValueError, match="has the sets x, y: say whose score .* metric_for_best_model='x_reward'$"):
        make(**options, settings=stop)
    stopped = make("stopped", **options, settings={**stop, "metric_for_best_model": "y_reward"})
    stopped.train()
    assert stopped.state.global_step == 2
    with pytest.raises(ValueError, match="the evaluation has no eval_y_f1, but eval_x_reward, "):
        make("other", **options, settings={**stop, "metric_for_best_model": "y_f1"}).train()


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


def test_a_run_is_continued_from_its_own_folder_alone(make: Callable[..., MeZOTrainer], tmp_path: Path):
    make(callbacks=[StopAt(2)]).train()
    before = (tmp_path / "out" / "trajectory.zorl").read_bytes()
    with pytest.raises(
        ValueError, match=r"resume_from_checkpoint='.*/other' is not output_dir, '.*/out': a run continues"
    ):
        make().train(resume_from_checkpoint=str(tmp_path / "other"))
    assert (tmp_path / "out" / "trajectory.zorl").read_bytes() == before
    trainer = make()
    trainer.train(resume_from_checkpoint=str(tmp_path / "elsewhere" / ".." / "out"))
    assert trainer.step == 6


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
        ({"per_device_train_batch_size": 4}, "rows_per_step was 8, is now 4$"),
        ({"max_length": 50, "top_k": 5}, "max_length was None, is now 50; top_k was None, is now 5$"),
        ({"seed": 3}, "seed was 42, is now 3"),
        ({"n_spsa": "2", "learning_rate": 2.4e-2}, "n_spsa was '8', is now '2'"),
        ({"reward_weights": [2.0]}, r"reward_weights was None, is now \[2.0\]"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type was 'linear', is now 'cosine'"),
    ):
        with pytest.raises(TrajectoryError, match=f"recorded with other settings: {message}"):
            make(settings=settings).train(resume_from_checkpoint=True)
    with pytest.raises(TrajectoryError, match="objective was 'cross_entropy', is now 'accuracy'"):
        make(reward_funcs=accuracy()).train(resume_from_checkpoint=True)
    with pytest.raises(TrajectoryError, match="rows was 24, is now 20"):
        make(train_dataset=TRAIN[:20]).train(resume_from_checkpoint=True)
    with pytest.raises(TrajectoryError, match="with other settings: the training rows have changed$"):
        make(train_dataset=TRAIN[::-1]).train(resume_from_checkpoint=True)
    with pytest.raises(TrajectoryError, match=r"the model (lacks|also has) \d+ of the trajectory's parameters"):
        make(kind="gpt2").train(resume_from_checkpoint=True)


def test_a_judge_is_not_asked_about_single_points(make: Callable[..., MeZOTrainer]):
    with pytest.raises(
        ValueError, match="a judge compares two sides of a direction, and estimator='one_point' looks at one"
    ):
        make(judge=lambda **_: [], settings={"estimator": "one_point"})
    with pytest.raises(ValueError, match="and estimator='one_sided' looks at one"):
        make(judge=lambda **_: [], settings={"estimator": "one_sided"})


def test_training_without_rows_and_evaluating_without_rows_are_refused(make: Callable[..., MeZOTrainer]):
    with pytest.raises(ValueError, match="train_dataset is needed to train"):
        make(train_dataset=None).train()
    with pytest.raises(ValueError, match="eval_dataset is needed to evaluate"):
        make().evaluate()
    for empty in ([], iter(()), {"a": []}):
        with pytest.raises(ValueError, match="eval_dataset is empty"):
            make().evaluate(empty)
