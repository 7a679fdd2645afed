"""Models whose weights accelerate stores elsewhere and loads module by module: tuned to the same bits, and never held twice."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForCausalLM

from zorl import MeZOConfig, MeZOTrainer, Prompt
from zorl.models import load_model
from zorl.offload import computing_device, is_offloaded, named_stored
from zorl.parameters import ParameterSet, base_sha256, select
from zorl.perturbation import Scratch
from zorl.probe import Point
from zorl.rewards import accuracy
from zorl.stacked_points import StackingError
from zorl.twin import Twin

CPU = torch.device("cpu")
ROWS = [
    {"text": f"the film {'was great' if i % 2 else 'had a terrible plot'} {i}", "label": str(i % 2)} for i in range(24)
]
WORDS = {"0": "terrible", "1": "great"}


@pytest.fixture
def make(parts: Callable[[str], Any], tmp_path: Path) -> Callable[..., MeZOTrainer]:
    """A trainer on a model of its own, offloaded by a function or not."""
    number = itertools.count()

    def trainer(kind: str, offload: Callable[[Any], None] | None = None, **settings: Any) -> MeZOTrainer:
        model = copy.deepcopy(parts(kind).model)
        if offload is not None:
            offload(model)
        prompt = Prompt("{text} it was {mask}" if kind != "bert" else "{text} it was {mask} .", WORDS)
        config = {"max_steps": 3, "per_device_train_batch_size": 8, "calibration": "none", "save_strategy": "no"}
        return MeZOTrainer(
            model, reward_funcs=accuracy(), prompt=settings.pop("prompt", prompt),
            processing_class=parts(kind).tokenizer, train_dataset=ROWS, eval_dataset=settings.pop("eval_dataset", None),
            metrics=settings.pop("metrics", None),
            args=MeZOConfig(
                output_dir=str(tmp_path / f"out{next(number)}"), disable_tqdm=True, use_cpu=True, **{**config, **settings}
            ),
        )  # fmt: skip

    return trainer


def to_cpu(model: Any) -> None:
    cpu_offload(model, execution_device=CPU)
    assert all(map(is_offloaded, model.parameters()))


@pytest.fixture
def to_disk(tmp_path: Path) -> Callable[[Any], None]:
    return lambda model: disk_offload(model, str(tmp_path / "offloaded"), execution_device=CPU)


@pytest.mark.parametrize("evaluation", ["twin", "scratch"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "opt", "llama"])
def test_what_is_offloaded_is_tuned_to_the_same_bits(
    make: Callable[..., MeZOTrainer], kind: str, evaluation: str
) -> None:
    here, offloaded = make(kind, evaluation=evaluation), make(kind, to_cpu, evaluation=evaluation)
    before = offloaded.tuned.sha256()
    assert before == here.tuned.sha256()
    for trainer in (here, offloaded):
        trainer.train()
    assert here.tuned.sha256() == offloaded.tuned.sha256() != before
    assert all(map(is_offloaded, offloaded.model.parameters()))
    assert here.predict(ROWS).predictions == offloaded.predict(ROWS).predictions


def test_the_best_step_is_gone_back_to_where_weights_are_offloaded(make: Callable[..., MeZOTrainer]) -> None:
    def run(offload: Callable[[Any], None] | None) -> MeZOTrainer:
        looks = itertools.count()

        def rise_and_fall(completions: list[str], **columns: Any) -> list[float]:
            return [-abs(next(looks) - 1.0)] * len(completions)

        trainer = make(
            "llama", offload, max_steps=4, eval_dataset=ROWS, metrics=rise_and_fall, metric_for_best_model="rise_and_fall",
            eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        )  # fmt: skip
        trainer.train()
        assert trainer.step == 2
        return trainer

    here, offloaded = run(None), run(to_cpu)
    assert here.tuned.sha256() == offloaded.tuned.sha256()
    again = offloaded.tuned.sha256()
    offloaded.train(resume_from_checkpoint=True)  # from its own base weights, once more
    assert offloaded.tuned.sha256() == again


@pytest.mark.parametrize("evaluation", ["twin", "scratch"])
@pytest.mark.parametrize(
    "where", ["auto", {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}]
)
def test_a_model_that_a_device_map_places_is_tuned(
    parts: Callable[[str], Any], tmp_path: Path, where: Any, evaluation: str
) -> None:
    """Without a GPU "auto" puts all of it on the CPU."""
    folder = tmp_path / "saved"
    parts("llama").model.save_pretrained(folder)
    parts("llama").tokenizer.save_pretrained(folder)
    tuned = []
    for placed in (None, where):
        options = {} if placed is None else {"device_map": placed, "offload_folder": str(tmp_path / "disk")}
        trainer = MeZOTrainer(
            load_model(str(folder), **options), accuracy(), prompt=Prompt("{text} it was {mask}", WORDS),
            processing_class=parts("llama").tokenizer, train_dataset=ROWS, args=MeZOConfig(
                output_dir=str(tmp_path / f"run{len(tuned)}"), max_steps=3, per_device_train_batch_size=8, use_cpu=True,
                calibration="none", evaluation=evaluation, tune="full" if where == "auto" else "lora", disable_tqdm=True,
            ),
        )  # fmt: skip
        start = trainer.tuned.sha256()
        trainer.train()
        tuned.append(trainer.tuned.sha256())
        assert tuned[-1] != start
        assert any(map(is_offloaded, trainer.model.parameters())) == isinstance(placed, dict)
    assert where != "auto" or tuned[0] == tuned[1]


@pytest.mark.parametrize("evaluator", [Twin, Scratch])
def test_weights_are_loaded_once_for_all_points_and_none_stay(parts: Callable[[str], Any], evaluator: Any) -> None:
    model = copy.deepcopy(parts("llama").model)
    to_cpu(model)
    loads: list[str] = []
    hook = model.model.layers[0].mlp.up_proj._hf_hook
    read = type(hook.weights_map).__getitem__

    class Counted(type(hook.weights_map)):  # type: ignore[misc]
        def __getitem__(self, name: str) -> Any:
            loads.append(name)
            return read(self, name)

    hook.weights_map.__class__ = Counted
    at = evaluator(model, ParameterSet(select(model)), "rank1")
    loads.clear()
    tokens = torch.zeros(2, 5, dtype=torch.long)
    points = [Point(seed, 0.1) for seed in range(4)]

    def forward(copies: int) -> list[Any]:
        return list(at.module(input_ids=tokens.repeat(copies, 1)).logits.chunk(copies))

    logits = at.evaluate_all(points, forward)
    assert len(loads) == (1 if evaluator is Twin else len(points))
    assert not torch.allclose(logits[0], logits[1])
    assert all(map(is_offloaded, at.module.parameters()))


def test_a_forward_that_fails_leaves_no_moved_weight_behind(parts: Callable[[str], Any]) -> None:
    for evaluator in (Twin, Scratch):
        model = copy.deepcopy(parts("llama").model)
        to_cpu(model)
        at: Any = evaluator(model, ParameterSet(select(model)), "rank1")

        def fail(*_: Any) -> None:
            raise RuntimeError("halfway")

        at.module.model.layers[1].mlp.up_proj._old_forward = fail
        with pytest.raises(RuntimeError, match="halfway"):
            at.evaluate(Point(1, 0.1), lambda at=at: at.module(input_ids=torch.zeros(2, 3, dtype=torch.long)))
        assert all(type(p) is torch.nn.Parameter for p in at.module.parameters())


def test_an_offloaded_recurrent_layer_is_refused() -> None:
    """It computes with a list of its weights that a replacement would not reach."""
    for evaluator, error in ((Twin, StackingError), (Scratch, TypeError)):
        model = torch.nn.Sequential(torch.nn.LSTM(2, 2))
        to_cpu(model)
        with pytest.raises(error, match=r"LSTM .*; use zorl\.MeZO with a closure"):
            evaluator(model, ParameterSet(select(model)), "rank1")


def test_a_forward_that_fails_keeps_no_loaded_weight(parts: Callable[[str], Any]) -> None:
    """It may have failed because memory ran out."""
    model = copy.deepcopy(parts("llama").model)
    to_cpu(model)
    twin = Twin(model, ParameterSet(select(model)))
    module = twin.module.model.layers[1].mlp.up_proj
    forward, kept = module._old_forward, []

    def fail(x: torch.Tensor) -> None:
        kept.append(weakref.ref(module.weight.zorl_weight.tensor))
        forward(x)
        raise RuntimeError("halfway")

    module._old_forward = fail
    with pytest.raises(RuntimeError, match="halfway"):
        twin.evaluate(Point(1, 0.1), lambda: twin.module(input_ids=torch.zeros(2, 3, dtype=torch.long)))
    gc.collect()
    assert [reference() for reference in kept] == [None]


@pytest.mark.parametrize("evaluation", ["twin", "scratch"])
def test_an_adapter_is_tuned_on_weights_that_lie_on_disk(
    make: Callable[..., MeZOTrainer], to_disk: Callable[[Any], None], evaluation: str
) -> None:
    with pytest.raises(ValueError, match=r"'.*' is offloaded to disk, where it is only read: tune an adapter"):
        make("llama", to_disk)
    trainer = make("llama", to_disk, tune="lora", evaluation=evaluation, max_steps=8)
    before = trainer.tuned.sha256()
    base = {name: values.clone() for name, p, values in named_stored(trainer.model) if is_offloaded(p)}
    trainer.train()
    assert trainer.tuned.sha256() != before
    assert base
    assert all(torch.equal(values, base[name]) for name, p, values in named_stored(trainer.model) if is_offloaded(p))
    again = make("llama", to_disk, tune="lora", evaluation=evaluation, max_steps=8)
    again.train()
    assert again.tuned.sha256() == trainer.tuned.sha256(), "an adapter beside a shell starts from the seed as well"


def test_answers_are_generated_at_points_around_what_is_offloaded(make: Callable[..., MeZOTrainer]) -> None:
    settings = {"prompt": Prompt("{text}"), "max_completion_length": 4, "temperature": 0.0}
    here, offloaded = make("llama", **settings), make("llama", to_cpu, **settings)
    points = [Point(1, 0.3), Point(2, 0.3)]
    texts = [
        [[a.completion for a in of] for of in trainer.policy.answers(ROWS, points)] for trainer in (here, offloaded)
    ]
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_what_was_tuned_offloaded_is_saved_and_resumed(
    make: Callable[..., MeZOTrainer], parts: Callable[[str], Any], tmp_path: Path
) -> None:
    trainer = make("llama", to_cpu, max_steps=4)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert ParameterSet(select(loaded)).sha256() == trainer.tuned.sha256()
    assert base_sha256(parts("llama").model) == base_sha256(make("llama", to_cpu).model)


def test_shells_without_values_are_refused(parts: Callable[[str], Any]) -> None:
    empty = copy.deepcopy(parts("llama").model).to("meta")
    with pytest.raises(TypeError, match="is on the meta device, and accelerate has no values for it"):
        select(empty)
    assert computing_device(parts("llama").model) == CPU
