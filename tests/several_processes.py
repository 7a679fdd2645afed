"""What each process of tests/test_processes.py runs: one scenario after the other, and its findings as JSON.

Started by torchrun; also run in a single process, for what to compare with.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from conftest import make_parts

from zorl import MeZOConfig, MeZOTrainer, Prompt, processes
from zorl.replay import replay
from zorl.rewards import accuracy, f1
from zorl.trajectory import read

ROWS = [
    {
        "choices": ["great", "terrible plot"],
        "text": f"the film {'was great' if i % 2 else 'had a terrible plot'} {i}",
        "label": str(i % 2),
    }
    for i in range(48)
]
WORDS = Prompt("{text} it was {mask} .", {"0": "terrible", "1": "great"})
GLOBAL_BATCH = 12
asked = 0


def counted(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that counts how often it is asked, and answers otherwise each time."""
    global asked
    asked += 1
    return [float(len(str(c)) % 7) + 0.01 * asked for c in completions]


def judge(prompts: list[Any], first: list[Any], second: list[Any], **columns: Any) -> list[str]:
    return ["first" if len(a) < len(b) else "second" for a, b in zip(first, second, strict=True)]


def loss(model: Any, rows: Any) -> float:
    return sum(p.double().square().mean().item() for p in model.parameters())


SCENARIOS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "label words, macro-F1": ("bert", {"prompt": WORDS, "reward_funcs": f1(column="label")}, {}),
    "label words, accuracy, no head": ("bert", {"prompt": WORDS, "reward_funcs": accuracy()}, {"calibration": "none"}),
    "cross entropy, scratch": ("gpt2", {"prompt": Prompt("{text} it was {mask}", WORDS.label_words), "loss": "cross_entropy"},
                               {"distribution": "rademacher", "calibration": "none"}),
    "generation, a reward that differs each time": ("gpt2", {"prompt": Prompt("{text}"), "reward_funcs": counted}, {}),
    "options": ("gpt2", {"prompt": Prompt("{text} {mask}", options="choices"), "reward_funcs": counted}, {}),
    "a judge": ("gpt2", {"prompt": Prompt("{text}"), "judge": judge}, {}),
    "teacher forcing": ("llama", {"prompt": Prompt("{text}"), "loss": "cross_entropy"}, {}),
    "a loss": ("gpt2", {"prompt": Prompt("{text}"), "loss": loss}, {}),
    "adapter": ("llama", {"prompt": Prompt("{text}"), "reward_funcs": counted}, {"tune": "lora", "n_spsa": "2"}),
}  # fmt: skip


def run(
    name: str, folder: Path, *, steps: int = 4, resume: bool = False, wider: int = 1, check: int = 1
) -> dict[str, Any]:
    """Trains; the figures of this process.

    Args:
        wider: so many times the usual width of the model.
        check: steps between two looks at whether all processes hold the same weights.
    """
    global asked
    asked = 0
    kind, goal, settings = SCENARIOS[name]
    make_parts.cache_clear()
    parts = make_parts(kind)
    if wider > 1:
        config = parts.model.config
        config.hidden_size, config.intermediate_size = wider * config.hidden_size, wider * config.intermediate_size
        parts = replace(parts, model=type(parts.model)(config))
    rows = [{**row, "label": row["choices"][int(row["label"])]} for row in ROWS] if name == "options" else ROWS
    trainer = MeZOTrainer(
        parts.model, **goal, processing_class=parts.tokenizer, train_dataset=rows, eval_dataset=rows[:10],
        metrics=[counted],
        args=MeZOConfig(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=GLOBAL_BATCH // processes.count(),
            use_cpu=True, logging_steps=2, eval_strategy="steps", eval_steps=2, save_steps=2, report_to="none", seed=3,
            check_weights_steps=check, max_completion_length=4, disable_tqdm=True, **settings,
        ),
    )  # fmt: skip
    before = processes.exchanged_bytes
    trainer.train(resume_from_checkpoint=resume)
    _, records = read(folder / "trajectory.zorl")
    return {
        "weights": trainer.tuned.sha256(),
        "projected": [g for record in records for g in record.projected],
        "asked": asked,
        "bytes": processes.exchanged_bytes - before,
        "evaluations": [e["eval_reward"] for e in trainer.state.log_history if "eval_reward" in e],
        "logged": [e["exchanged_bytes"] for e in trainer.state.log_history if "exchanged_bytes" in e],
        "processes": processes.count(),
        "parameters": trainer.tuned.numel,
    }


def main() -> None:
    torch.set_num_threads(1)
    what, folder = sys.argv[1], Path(sys.argv[2])
    MeZOConfig(output_dir=str(folder / "unused"), use_cpu=True)  # joins the other processes
    mine = processes.index()
    found: dict[str, Any] = {}
    if what == "all":
        for i, name in enumerate(SCENARIOS):
            found[name] = run(name, folder / str(i))
    elif what == "die":
        name = "label words, accuracy, no head"
        step = MeZOTrainer.training_step

        def until_killed(self: MeZOTrainer, *args: Any) -> Any:
            if self.mezo is not None and self.mezo.steps == 3 and mine == processes.count() - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, *args)

        MeZOTrainer.training_step = until_killed  # type: ignore[method-assign]
        try:
            run(name, folder / "run", steps=8)
        except processes.ProcessError as error:
            found["error"] = str(error)
    elif what == "widths":
        for wider in (1, 4):
            found[str(wider)] = run("label words, accuracy, no head", folder / f"wide{wider}", wider=wider)
    elif what == "diverge":
        step = MeZOTrainer.training_step

        def until_hit(self: MeZOTrainer, *args: Any) -> Any:
            if self.mezo is not None and self.mezo.steps == 2 and mine == 1:
                with torch.no_grad():  # as a failing memory would
                    next(iter(self.tuned.values())).view(-1)[0] += 1e-6
            return step(self, *args)

        MeZOTrainer.training_step = until_hit  # type: ignore[method-assign]
        for check in (1, 1000):
            try:
                run("label words, accuracy, no head", folder / f"check{check}", check=check)
            except processes.ProcessError as error:
                found[str(check)] = str(error)
    elif what == "resume":
        found = run("label words, accuracy, no head", folder / "run", steps=8, resume=True)
        parts = make_parts.__wrapped__("bert")
        header, records = read(folder / "run" / "trajectory.zorl")
        from zorl.parameters import ParameterSet

        fresh = ParameterSet(parts.model.named_parameters())
        replay(header, records, fresh)
        found["replayed"] = fresh.sha256()
    (folder / f"{what}-{mine}-of-{processes.count()}.json").write_text(json.dumps(found))
    if processes.count() > 1 and what != "die":
        torch.distributed.destroy_process_group()  # gloo's threads may abort the interpreter as it ends


if __name__ == "__main__":
    main()
