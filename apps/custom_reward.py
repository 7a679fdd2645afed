"""A reward of your own in ten lines: any function that looks at answers and returns numbers.

    python -m zorl.apps.custom_reward           # offline, with the embedded model; half a minute
    zorl train … --reward apps/custom_reward.py:profit                    # the same function from the command line

A shop reads its reviews. It writes to customers who seem unhappy: a letter costs 1 euro, and winning back somebody who
really is unhappy is worth 5. What the model should maximise is not accuracy, nor F1, but euros.
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
    """Euros that each answer brings in. `label` is the data set's column of that name; the others are in `columns`."""
    letter, won_back = -1.0, 5.0
    return [
        0.0 if answer == "positive" else letter + won_back * (truth == "negative")
        for answer, truth in zip(completions, label, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description="Tune a language model to earn as many euros as it can.")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("out/custom_reward"), help="where everything is written"
    )
    parser.add_argument("--steps", type=int, default=75, help="updates; each costs eight forwards (default: 75)")
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
    trainer.train(resume_from_checkpoint=trainer.folder.trajectory.exists())  # a run that was cut short goes on
    after = trainer.evaluate()["eval_profit"]
    trainer.save_model()

    best = sum(profit(test["label"], test["label"])) / len(test)
    print(f"\nEuros a review, on {len(test)} held-out ones: {before:.2f} before, {after:.2f} after, {best:.2f} at best")
    print(f"The tuned model is in {options.output_dir}; `zorl eval --help` says how to score it on a file of yours.")
    return {"before": before, "after": after, "best": best}


if __name__ == "__main__":
    main()
