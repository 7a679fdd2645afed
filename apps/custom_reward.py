"""A reward of your own in ten lines: any function that takes answers and returns numbers.

    python -m zorl.apps.custom_reward           # offline, with the embedded model; half a minute
    zorl train … --reward apps/custom_reward.py:profit                    # the same function from the command line

A shop reads its reviews and writes to customers who seem unhappy. A letter costs 1 euro; winning back a customer who really
is unhappy is worth 5. So the model should maximise neither accuracy nor F1, but euros.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zorl import MeZOConfig, MeZOTrainer, Prompt
from zorl.apps.embedded import REVIEWER
from zorl.tasks import reviews


def profit(completions: Sequence[str], label: Sequence[str], **columns: Any) -> list[float]:
    """Euros that each answer earns. `label` is the data set's column of that name; the other columns are in `columns`."""
    letter, won_back = -1.0, 5.0
    return [
        0.0 if answer == "positive" else letter + won_back * (truth == "negative")
        for answer, truth in zip(completions, label, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description="Tune a language model to earn as many euros as it can.")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("out/custom_reward"), help="folder for all files (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=75, help="number of steps, of eight forward passes each (default: 75)"
    )
    options = parser.parse_args(argv)

    train, test = reviews.load(n_train=2000, n_test=500)
    trainer = MeZOTrainer(
        model=str(REVIEWER),
        reward_funcs=profit,
        prompt=Prompt(reviews.PROMPT, reviews.LABEL_WORDS),
        train_dataset=train,
        eval_dataset=test,
        args=MeZOConfig(output_dir=str(options.output_dir), max_steps=options.steps),
    )
    before = trainer.evaluate()["eval_profit"]
    trainer.train(resume_from_checkpoint=trainer.folder.trajectory.exists())  # continues an interrupted run
    after = trainer.evaluate()["eval_profit"]
    trainer.save_model()

    best = sum(profit(test["label"], test["label"])) / len(test)
    print(
        f"\nEuros per review, on {len(test)} held-out reviews: {before:.2f} before, {after:.2f} after, {best:.2f} at best"
    )
    print(f"The tuned model is in {options.output_dir}; `zorl eval --help` says how to score it on your own file.")
    return {"before": before, "after": after, "best": best}


if __name__ == "__main__":
    main()
