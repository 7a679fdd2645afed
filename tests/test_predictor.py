"""A saved model answers as the trainer that saved it does: prompt, label head and settings included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from tiny_runs import EVAL, TRAIN

from zorl import MeZOTrainer, Predictor, Prompt
from zorl.probe import CENTRE
from zorl.rewards import accuracy


def short(completions: list[str], **columns: Any) -> list[float]:
    return [-float(len(completion)) for completion in completions]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_loaded_model_answers_as_the_trainer_does(make: Callable[..., MeZOTrainer], tmp_path: Path, kind: str):
    settings = {"calibration": "head", "max_steps": 3}
    trainer = make(kind=kind, reward_funcs=accuracy(), settings=settings)
    trainer.train()
    trainer.save_model()
    predictor = Predictor.load(tmp_path / "out")
    assert predictor.policy.prompt == trainer.prompt
    assert predictor.policy.prompt.label_head is not None
    assert predictor(EVAL) == trainer.predict(EVAL).predictions
    (scores,) = trainer.policy.scores(EVAL, [CENTRE])
    found = torch.tensor([list(row.values()) for row in predictor.probabilities(EVAL)])
    torch.testing.assert_close(found, scores.exp())
    assert list(predictor.probabilities(EVAL)[0]) == list(trainer.prompt.labels)


def test_the_label_head_stays_where_only_a_column_has_another_name(make: Callable[..., MeZOTrainer], tmp_path: Path):
    trainer = make(reward_funcs=accuracy(), settings={"calibration": "head", "max_steps": 1})
    trainer.train()
    trainer.save_model()
    words = dict(trainer.prompt.label_words or {})
    renamed = Predictor.load(tmp_path / "out", prompt=Prompt("{review} It was {mask}.", words))
    rows = [{"review": row["text"]} for row in EVAL]
    expected = Predictor.load(tmp_path / "out")
    assert renamed.probabilities(rows) == expected.probabilities(EVAL)
    assert renamed(pandas.DataFrame(rows)) == renamed(iter(rows)) == expected(EVAL)
    for other in (Prompt("{text} is {mask}.", words), Prompt("{text} It was {mask}.", {**words, "bad": "odd"})):
        with pytest.warns(UserWarning, match="the label head of .*out, which may be .* is left out with"):
            assert Predictor.load(tmp_path / "out", prompt=other).policy.prompt.label_head is None
    with pytest.raises(
        ValueError, match="rows takes rows, as a list of dictionaries or a data set, and got one row: put it"
    ):
        expected({"text": "odd"})  # type: ignore[arg-type]


def test_text_is_generated_with_the_settings_of_the_run(make: Callable[..., MeZOTrainer], tmp_path: Path):
    options: dict[str, Any] = {
        "prompt": Prompt("{text}"),
        "reward_funcs": lambda completions, **_: [-len(c) for c in completions],
    }
    trainer = make(**options, kind="gpt2", settings={"max_steps": 1, "max_completion_length": 3, "temperature": 0.0})
    trainer.train()
    trainer.save_model()
    predictor = Predictor.load(tmp_path / "out")
    assert predictor(TRAIN[:4]) == trainer.predict(TRAIN[:4]).predictions
    assert max(len(answer.completion_ids) for answer in predictor.answers(TRAIN[:4])) <= 3
    assert (
        max(len(a.completion_ids) for a in Predictor.load(tmp_path / "out", max_completion_length=1).answers(TRAIN[:4]))
        == 1
    )
    with pytest.raises(ValueError, match="is answered with generated text, not with a choice"):
        predictor.probabilities(TRAIN[:4])


def test_another_model_needs_a_prompt(make: Callable[..., MeZOTrainer], tmp_path: Path):
    trainer = make(kind="bert", reward_funcs=accuracy())
    folder = tmp_path / "plain"
    trainer.model.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    with pytest.raises(ValueError, match="was not saved by zorl, so it has no prompt: give one"):
        Predictor.load(folder)
    assert Predictor.load(folder, prompt=trainer.prompt)(EVAL) == trainer.predict(EVAL).predictions
