"""The runs of MeZOTrainer: what their folders hold, and how they go on after any interruption."""

from __future__ import annotations

import copy
import itertools
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import EVAL, TRAIN, StopAt, tuned, weights
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, TrainerCallback

from zorl import MeZOTrainer, Prompt
from zorl.parameters import ParameterSet
from zorl.replay import replay
from zorl.reward_functions import RewardError
from zorl.rewards import accuracy, f1
from zorl.run_folder import RunFolder
from zorl.trajectory import Trajectory, TrajectoryError, read

# --- the folder of a run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "loader"), [("gpt2", AutoModelForCausalLM), ("bert", AutoModelForMaskedLM)])
def test_a_saved_model_loads_as_any_other(make: Callable[..., MeZOTrainer], tmp_path: Path, kind: str, loader: type):
    trainer = make(kind=kind)
    tuned(trainer)
    trainer.save_model()
    loaded = loader.from_pretrained(tmp_path / "out").to(trainer.model.device)
    assert ParameterSet(loaded.named_parameters()).sha256() == weights(trainer)
    text = AutoTokenizer.from_pretrained(tmp_path / "out")("the film was great", return_tensors="pt").to(loaded.device)
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


def test_a_start_that_no_step_beats_is_what_a_run_goes_back_to(make: Callable[..., MeZOTrainer], tmp_path: Path):
    def never_better(completions: list[str], trainer_state: Any = None, **columns: Any) -> float:
        return -float(trainer_state.global_step)

    settings = {
        "max_steps": 6, "learning_rate": 1e-2, "calibration": "none", "eval_strategy": "steps", "eval_steps": 2,
        "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True, "eval_on_start": True,
    }  # fmt: skip
    options = {"reward_funcs": never_better, "eval_dataset": EVAL, "settings": settings}
    trainer = make(**options)
    before = weights(trainer)
    trainer.train()
    assert trainer.mezo is not None
    assert (trainer.mezo.steps, trainer.step, trainer.state.best_global_step) == (6, 0, 0)
    assert weights(trainer) == before
    trainer.save_model()
    assert RunFolder(tmp_path / "out").read_settings()["step"] == 0
    make("broken", **options, callbacks=[StopAt(1)]).train()
    again = make("broken", **options)
    again.train(resume_from_checkpoint=True)
    assert (again.step, weights(again)) == (0, before)
    looks = [entry["step"] for entry in again.state.log_history if "eval_runtime" in entry]
    assert looks == [0, 2, 4, 6], "the start is looked at once"


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
    assert flat.state.global_step == 10, "four evaluations make a line, and it is level; with the fifth it still is"
    with pytest.raises(ValueError, match="stop_below_gain needs held-out scores, and there are no evaluations"):
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
    with pytest.warns(UserWarning, match="accuracy or a metric has changed since the run began"):
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
config = MeZOConfig(output_dir=folder, max_steps=100, per_device_train_batch_size=8, disable_tqdm=True, n_spsa="1-2/50",
                    eval_strategy="steps", eval_steps=20, save_strategy="steps", save_steps=20, load_best_model_at_end=True)
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


class KilledAt(TrainerCallback):
    """Ends a run before a step, without the chance to save that an orderly end has."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            raise KeyboardInterrupt


def at_its_best_at_the_second_step(completions: list[str], trainer_state: Any = None, **columns: Any) -> float:
    return -abs(float(trainer_state.global_step) - 2.0)


BEST = {"max_steps": 6, "calibration": "none", "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps",
        "save_steps": 500, "load_best_model_at_end": True}  # fmt: skip


def looks(trainer: MeZOTrainer) -> list[int]:
    return [entry["step"] for entry in trainer.state.log_history if "eval_runtime" in entry]


def test_a_killed_run_remembers_the_evaluations_that_it_has_made(make: Callable[..., MeZOTrainer]):
    options = {"reward_funcs": at_its_best_at_the_second_step, "eval_dataset": EVAL, "settings": BEST}
    with pytest.raises(KeyboardInterrupt):
        make(**options, callbacks=[KilledAt(5)]).train()
    trainer = make(**options)
    trainer.train(resume_from_checkpoint=True)
    assert looks(trainer) == [2, 4, 6]
    assert trainer.step == trainer.state.best_global_step == 2


def test_a_run_that_was_moved_keeps_its_best_step(make: Callable[..., MeZOTrainer], tmp_path: Path):
    options = {"reward_funcs": at_its_best_at_the_second_step, "eval_dataset": EVAL, "settings": BEST}
    make("here", **options).train()
    (tmp_path / "here").rename(tmp_path / "there")
    trainer = make("there", **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.step == 2


def test_the_best_step_is_by_the_metric_that_is_asked_for_now(make: Callable[..., MeZOTrainer]):
    def early(completions: list[str], trainer_state: Any = None, **columns: Any) -> float:
        return -float(trainer_state.global_step)

    options = {"reward_funcs": at_its_best_at_the_second_step, "metrics": early, "eval_dataset": EVAL}
    make(**options, settings={**BEST, "eval_on_start": True}, callbacks=[StopAt(4)]).train()
    again = make(**options, settings={**BEST, "eval_on_start": True, "metric_for_best_model": "early"})
    again.train(resume_from_checkpoint=True)
    assert (again.step, again.state.best_metric) == (0, 0.0)


def test_without_a_metric_for_the_best_step_a_reward_that_rises_does_not_end_a_run(make: Callable[..., MeZOTrainer]):
    def rising(completions: list[str], trainer_state: Any = None, **columns: Any) -> float:
        return float(trainer_state.global_step)

    settings = {"eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 1, "metric_for_best_model": None}
    trainer = make(reward_funcs=rising, eval_dataset=EVAL, settings=settings)
    trainer.train()
    assert trainer.state.global_step == 6


def test_the_log_of_a_run_whose_trajectory_was_removed_is_no_part_of_the_next(
    make: Callable[..., MeZOTrainer], tmp_path: Path
):
    options = {"reward_funcs": at_its_best_at_the_second_step, "eval_dataset": EVAL}
    make(**options, settings=BEST).train()
    (tmp_path / "out" / "trajectory.zorl").unlink()
    with pytest.raises(KeyboardInterrupt):
        make(**options, settings={**BEST, "seed": 7}, callbacks=[KilledAt(1)]).train()
    again = make(**options, settings={**BEST, "seed": 7, "max_steps": 1})
    again.train(resume_from_checkpoint=True)
    assert looks(again) == [1]
    assert again.state.best_metric == -1.0


def test_a_torn_trajectory_continues_from_its_last_whole_step(make: Callable[..., MeZOTrainer], tmp_path: Path):
    settings = {"max_steps": 20}
    end = tuned(make("straight", settings=settings))
    make(settings=settings, callbacks=[StopAt(18)]).train()
    path = tmp_path / "out" / "trajectory.zorl"
    path.write_bytes(path.read_bytes()[:-3])
    trainer = make(settings=settings)
    with pytest.warns(UserWarning, match="a write was cut short, or a bit flipped.*; the run continues from there"):
        trainer.train(resume_from_checkpoint=True)
    assert weights(trainer) == end


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


def changed_model(path: str, change: str) -> Any:
    """A saved model that was changed after it was loaded: fine-tuned, with more tokens, or with one more parameter."""
    model = AutoModelForCausalLM.from_pretrained(path)
    if change == "values":
        with torch.no_grad():
            model.transformer.ln_f.weight.mul_(1.5)
    elif change == "vocabulary":
        torch.manual_seed(0)  # new embeddings are drawn
        model.resize_token_embeddings(model.config.vocab_size + 3)
    elif change == "bias":
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    return model


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ("none", set()),
        ("values", {"transformer.ln_f.weight"}),
        ("vocabulary", {"transformer.wte.weight"}),
        ("bias", {"lm_head.bias"}),
    ],
)
def test_a_model_that_was_changed_in_memory_keeps_what_its_checkpoint_does_not_hold(
    make: Callable[..., MeZOTrainer], base: Callable[[str], str], tmp_path: Path, change: str, kept: set[str]
):
    path = base("gpt2")
    settings = {
        "max_steps": 4, "n_spsa": "1", "learning_rate": 5e-2, "eval_strategy": "steps", "eval_steps": 1,
        "save_strategy": "best", "load_best_model_at_end": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    options: dict[str, Any] = {
        "processing_class": AutoTokenizer.from_pretrained(path), "eval_dataset": EVAL, "settings": settings,
    }  # fmt: skip
    trainer = make(model=changed_model(path, change), **options)
    trainer.train()
    folder = RunFolder(tmp_path / "out")
    assert folder.init.exists() == bool(kept)
    assert not kept or load_file(folder.init).keys() == kept
    header, records = read(folder.trajectory, trainer.step)
    where = None
    if change == "vocabulary":
        with pytest.raises(TrajectoryError, match="began with a model that was changed in memory. Give the folder"):
            folder.rebuild(header)
        where = str(tmp_path / "changed")
        changed_model(path, change).save_pretrained(where)
    if change == "bias":
        with pytest.raises(TrajectoryError, match="lacks 1 of its parameters, such as 'lm_head.bias'"):
            folder.rebuild(header)
    else:
        _, rebuilt = folder.rebuild(header, where)
        replay(header, records, rebuilt)
        assert rebuilt.sha256() == weights(trainer)

    again = make(model=changed_model(path, change), **options)
    again.train(resume_from_checkpoint=True)
    assert weights(again) == weights(trainer)


def test_a_run_continues_with_the_rows_of_a_step_divided_otherwise(make: Callable[..., MeZOTrainer]):
    end = tuned(make("straight"))
    make(callbacks=[StopAt(2)]).train()
    trainer = make(settings={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})
    trainer.train(resume_from_checkpoint=True)
    assert weights(trainer) == end


def test_a_trajectory_whose_header_has_lists_of_settings_is_replayed_and_continued(make: Callable[..., MeZOTrainer]):
    """As earlier versions wrote it."""
    end = tuned(make("straight"))
    first = make(callbacks=[StopAt(2)])
    first.train()
    header, records = read(first.folder.trajectory)
    answers = [header.pop(name) for name in ("max_length", "max_completion_length", "temperature", "top_k", "top_p")]
    assert header.pop("rows_per_step") == 8
    first.folder.trajectory.unlink()
    earlier = Trajectory.create(first.folder.trajectory, {**header, "answers": answers, "batch": [8, 1]})
    for record in records:
        earlier.append(record)
    earlier.close()
    header, records = read(first.folder.trajectory)
    _, rebuilt = first.folder.rebuild(header)
    replay(header, records, rebuilt)
    assert rebuilt.sha256() == weights(first)
    with pytest.raises(TrajectoryError, match="settings: temperature was 1.0, is now 0.5$"):
        make(settings={"temperature": 0.5}).train(resume_from_checkpoint=True)
    trainer = make()
    trainer.train(resume_from_checkpoint=True)
    assert weights(trainer) == end
