"""Optimise macro-F1 itself, from a script: no gradient, no cross entropy, in the memory of inference.

    python -m zorl.apps.optimize_f1             # offline, with an embedded model and generated reviews
    python -m zorl.apps.optimize_f1 --help

F1 is a step function of the weights: it has no gradient to follow. But it can be computed at θ+εz and at θ−εz, and which of
the two does better is all that zorl needs to know.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path

from zorl import MeZOConfig, MeZOTrainer, Prompt
from zorl.apps.embedded import REVIEWER
from zorl.apps.report import Comparison
from zorl.rewards import accuracy, f1
from zorl.tasks import reviews
from zorl.whole_files import write_json


def main(argv: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description="Tune a language model to maximise macro-F1 on held-out reviews.")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("out/optimize_f1"), help="folder for all files (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=100, help="number of steps, of eight forward passes each (default: 100)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, help="reviews per step, on which F1 is computed (default: 64)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of directions and of the order of the data (default: 0)"
    )
    options = parser.parse_args(argv)

    # 1. Data: sentences and their labels. Three in four are positive, so that accuracy flatters a model and macro-F1 does not.
    train, test = reviews.load(n_train=2000, n_test=1000)

    # 2. A prompt that is answered with one word. The scores of the label words are the model's opinion.
    prompt = Prompt(reviews.PROMPT, reviews.LABEL_WORDS)

    # 3. The trainer: a model, the reward to maximise, and other rewards to record.
    trainer = MeZOTrainer(
        model=str(REVIEWER),
        reward_funcs=f1(average="macro"),
        metrics=[accuracy()],
        prompt=prompt,
        train_dataset=train,
        eval_dataset=test,
        args=MeZOConfig(
            output_dir=str(options.output_dir),
            max_steps=options.steps,
            # Start from a fitted threshold, so that any further gain comes from tuning the model. The default would tune a
            # head on the model's last hidden state first.
            calibration="bias",
            per_device_train_batch_size=options.batch_size,
            seed=options.seed,
            eval_strategy="steps",
            eval_steps=max(1, options.steps // 10),
        ),
    )

    # 4. Train, and compare with the untuned model and with one fitted threshold. An interrupted run is continued.
    comparison = Comparison(trainer, test)
    comparison.measure("zero_shot")
    trainer.calibrate("bias")
    comparison.measure("threshold")
    resuming = trainer.folder.trajectory.exists()
    with comparison.timed():
        trainer.train(resume_from_checkpoint=resuming)
    comparison.measure("tuned")
    trainer.save_model()

    # 5. The results.
    result = comparison.result()
    write_json(options.output_dir / "result.json", result)
    comparison.plot(options.output_dir / "macro_f1.png")
    print(comparison.table())
    half = max(1, options.steps // 2)
    trajectory, rewound = options.output_dir / "trajectory.zorl", f"{options.output_dir}-step{half}"
    rewind = ["--model", REVIEWER, "--trajectory", trajectory, "--until", half, "--output_dir", rewound]
    # Under make the environment's programs are not on the PATH.
    here = "" if shutil.which("zorl") else f"{os.path.relpath(Path(sys.executable).parent)}/"
    print(
        f"""
Written to {options.output_dir}/
  result.json        these figures          macro_f1.png      macro-F1 against forward passes
  model.safetensors  the tuned model        trajectory.zorl   all steps: base model + this file = tuned model

Try next
  {here}zorl replay {shlex.join(map(str, rewind))}
  {here}python -m zorl.apps.custom_reward           any Python callable as the objective
  {here}zorl train --help                           your own model, data and reward"""
    )
    return result


if __name__ == "__main__":
    main()
