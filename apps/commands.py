"""What `--help` says of each command, and which flags it has. Importing this is fast."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from zorl.apps.arguments import (
    CompareArguments,
    DiagnoseArguments,
    EvalArguments,
    JudgeArguments,
    PredictArguments,
    ProfileArguments,
    ReplayArguments,
    TrainArguments,
)


@dataclass(frozen=True)
class Command:
    """One command of `zorl`.

    Attributes:
        name: as in `zorl name`.
        usage: the flags that are nearly always given.
        about: a few lines on what the command does.
        types: returns the dataclasses whose fields are the flags.
        sections: title → names of fields, in the order in which `--help` shows them; `--help_all` shows the others too.
        examples: command lines, shown at the end.
        words: help texts that replace those of the fields, where another text or default holds for this command.
    """

    name: str
    usage: str
    about: str
    types: Callable[[], tuple[Any, ...]]
    sections: Mapping[str, str]
    examples: str
    words: Mapping[str, str] = field(default_factory=dict)

    def fields(self) -> dict[str, Field[Any]]:
        """Every field that is a flag, by name."""
        return {f.name: f for kind in self.types() for f in fields(kind) if f.init}

    def help(self, everything: bool = False) -> str:
        """The text of `--help`, or of `--help_all` if `everything`."""
        known = self.fields()
        shown = {name for names in self.sections.values() for name in names.split()}
        rest = [name for name in known if name not in shown]
        parts = [f"usage: zorl {self.name} {self.usage} [more flags]", self.about]
        parts += [self._section(title, names.split(), known) for title, names in self.sections.items()]
        file = (
            "--config FILE reads flags from a YAML file, under the same names; flags on the command line override it."
        )
        if everything and rest:
            parts.append(self._section("Inherited from transformers' TrainingArguments", rest, known))
        elif rest:
            file += f"\n{len(rest)} more flags are inherited from transformers' TrainingArguments: zorl {self.name} --help_all"
        return "\n\n".join([*parts, file, f"Examples\n{textwrap.indent(self.examples.strip(), '  ')}"])

    def _section(self, title: str, names: Sequence[str], known: Mapping[str, Field[Any]]) -> str:
        width = min(shutil.get_terminal_size((120, 24)).columns, 120)
        indent = min(32, 6 + max(map(len, names)))
        lines = [title]
        for name in names:
            flag = f"  --{name}"
            if len(flag) + 2 > indent:
                lines.append(flag)
                flag = ""
            text = self.words.get(name) or _text(known[name])
            first, *more = textwrap.wrap(text, max(30, width - indent), break_on_hyphens=False) or [""]
            lines += [flag.ljust(indent) + first, *(" " * indent + line for line in more)]
        return "\n".join(lines)


def _text(f: Field[Any]) -> str:
    text = " ".join(str(f.metadata.get("help", "")).replace("%%", "%").split())
    told = "default" in text.lower() or f.default in (None, MISSING, False)
    return text if told else f"{text} Default: {f.default}."


def _train_types() -> tuple[Any, ...]:
    from zorl.config import MeZOConfig  # loads transformers' TrainingArguments: seconds

    return TrainArguments, MeZOConfig


def _diagnose_types() -> tuple[Any, ...]:
    from zorl.config import MeZOConfig

    return DiagnoseArguments, MeZOConfig


_QUESTION = "prompt label_words options chat system"
_DATA = "model task dataset text_column dataset_config dataset_split"
_COMPUTING = "dtype forward_batch_size max_length max_completion_length temperature top_k top_p stop use_cpu"

TRAIN = Command(
    name="train",
    usage="--model M --dataset FILE --prompt TEMPLATE --label_words LABEL=WORD … --reward R --output_dir DIR",
    about="""\
Tunes a language model on the metric itself, with forward passes alone and in the memory of inference. Each step compares
eight perturbed models on one batch: which of them do better, and by how much? Held-out rows are scored ten times during the
run, and the best step is kept. If a run is interrupted, the same command continues it, with bit-identical results.""",
    types=_train_types,
    sections={
        "Model and data": f"{_DATA} label_column eval_dataset eval_split k_shot sample output_dir",
        "Prompt": f"{_QUESTION} head",
        "Objective: a reward, a judge or a loss": "reward reward_weights judge judgments loss metrics",
        "What to tune": "tune parameters lora_rank lora_alpha lora_targets prefix_tokens quantize dtype",
        "Optimisation": "max_steps per_device_train_batch_size learning_rate lr_scheduler_type estimator update epsilon "
        "informative_target n_spsa distribution evaluation comparison label_reward calibration seed",
        "For some estimators and updates": "block_scales block_scales_every beta1 beta2 moment_window moments",
        "Evaluation and reports": "eval_strategy eval_steps load_best_model_at_end early_stopping_patience "
        "stop_below_gain logging_steps report_to json",
        "Memory and text": "forward_batch_size gradient_accumulation_steps max_length max_completion_length "
        "temperature top_k top_p stop device_map",
    },
    examples="""\
zorl train --model facebook/opt-125m --dataset train.tsv --eval_dataset dev.tsv --text_column text --label_column label \\
  --prompt "{text} It was {mask}." --label_words 0=terrible 1=great --reward f1 --max_steps 150 --output_dir out
zorl train --task sst2 --model roberta-large --k_shot 16 --seed 13 --output_dir out          # a task of the paper
zorl train --task boolq --model facebook/opt-1.3b --sample 1000 500 --output_dir out         # the paper's sizes for OPT
zorl train --config run.yaml --seed 1                      # flags from a file, one of them overridden
zorl train … --text_column 0 --label_column 1              # a TSV file without a header
zorl train … --max_steps 2000 --stop_below_gain 0.005      # stop early once twice the steps would gain < 0.005
zorl train … --reward f1:pos_label=1 --metrics accuracy    # optimise the F1 of one class, record accuracy
zorl train … --tune lora --quantize int8                   # low-rank adapters on 8-bit weights
zorl train … --reward rewards.py:cost                      # def cost(completions, label, **columns): return [ … ]
zorl train --model roberta-base --head classifier --dataset train.tsv --text_column text --reward f1   # probe, then MeZO
zorl train --model M --dataset qa.jsonl --prompt "Q: {question}\\nA:" --reward squad_f1    # generated answers
zorl train --model M --dataset qa.jsonl --prompt "Q: {question}\\nA:" --loss cross_entropy --label_column answers
zorl train --model M --dataset copa.jsonl --prompt "{premise} {connective} {mask}" --options choices --reward accuracy
zorl train --model M --dataset prompts.jsonl --judge reward:rewards.py:kind               # learns from comparisons only""",
    words={
        "output_dir": "Folder for the run: trajectory, tuned model, tokenizer and prompt. Default: zorl_output.",
        "label_column": "Column with the true label, by name or position as for --text_column. Default: label.",
        "max_steps": "Number of steps. Each takes one forward pass of a batch per direction, or two with estimator=spsa. "
        "Default: 250, unless --num_train_epochs is given.",
        "seed": "Random seed of directions, order of the rows and sampling. Default: 42.",
        "eval_strategy": "steps, epoch or no. Default: steps.",
        "eval_steps": "Steps between evaluations; below 1: as a share of all steps. Default: 0.1.",
        "load_best_model_at_end": "Rewind to the best evaluated step before saving. Default: True if there are evaluations.",
        "logging_steps": "Steps between log entries. Default: 10.",
        "report_to": "Where else to log: tensorboard, wandb, trackio, … Default: none.",
        "gradient_accumulation_steps": "Batches that are combined into one step. Default: 1.",
    },
)

EVAL = Command(
    name="eval",
    usage="--model M --dataset FILE",
    about="""\
Scores a model on a file: accuracy, macro-F1 and the F1 of each label (with options: accuracy only), and any reward. A folder
that zorl train wrote remembers its prompt, label words or options, and label column; flags override them.""",
    types=lambda: (EvalArguments,),
    sections={
        "Model and data": f"{_DATA} label_column",
        "Prompt": _QUESTION,
        "What to compute": "reward reward_weights json",
        "Computation": _COMPUTING,
    },
    examples="""\
zorl eval --model out --dataset test.tsv --text_column text --label_column label --json
zorl eval --model facebook/opt-125m --dataset test.tsv --prompt "{text} It was {mask}." --label_words 0=terrible 1=great
zorl eval --model out --dataset qa.jsonl --reward squad_f1 exact_match
zorl eval --model out --task sst2                              # on the split that papers report on""",
)

PREDICT = Command(
    name="predict",
    usage="--model M --dataset FILE --output FILE",
    about="""\
Answers every row of a file: with a label if the prompt has label words, with one of the row's options if it has --options,
else with text. The output has the columns of the data set and a column 'prediction'. A folder that zorl train wrote remembers
its prompt.""",
    types=lambda: (PredictArguments,),
    sections={
        "Model and data": f"{_DATA} output overwrite json",
        "Prompt": _QUESTION,
        "Computation": _COMPUTING,
    },
    examples="""\
zorl predict --model out --dataset new.tsv --output predictions.jsonl
zorl predict --model out --dataset new.tsv --text_column 0 --output predictions.csv""",
)

REPLAY = Command(
    name="replay",
    usage="--trajectory DIR/trajectory.zorl --output_dir DIR",
    about="""\
Rebuilds a tuned model from its base and the few kilobytes of a trajectory. The base is checked against the hash in the
trajectory, and the result against the weights that the run saved. --until rewinds the run to any step.""",
    types=lambda: (ReplayArguments,),
    sections={"Flags": "trajectory model until output_dir overwrite json"},
    examples="""\
zorl replay --model facebook/opt-125m --trajectory out/trajectory.zorl --output_dir rebuilt
zorl replay --model facebook/opt-125m --trajectory out/trajectory.zorl --until 75 --output_dir step75""",
)

PROFILE = Command(
    name="profile",
    usage="--model M",
    about="""\
Measures what tuning a model costs on this machine: time and memory of inference, of a MeZO step, of a MeZO step on a LoRA
adapter, and of a fine-tuning step with backpropagation and AdamW, each on a random batch; and estimates the largest model that
each could tune here.""",
    types=lambda: (ProfileArguments,),
    sections={"Flags": "model batch_size length dtype lora_rank rounds plot use_cpu json"},
    examples="""\
zorl profile                                                            # try it: a small model ships with zorl
zorl profile --model facebook/opt-125m --batch_size 16 --length 128
zorl profile --model Qwen/Qwen2.5-0.5B --dtype bfloat16 --json""",
)

DIAGNOSE = Command(
    name="diagnose",
    usage="--model M (--task TASK | --dataset FILE --prompt TEMPLATE --label_words LABEL=WORD … --reward R)",
    about="""\
Suggests a learning rate and an epsilon for zorl train from a bounded number of forward passes, without a grid search. Measures
the slope, the curvature and the effective rank of the objective where tuning would start, how much of a step another batch
confirms, and how far a few real steps get. Takes the flags of zorl train, changes nothing, and prints the command to train
with.""",
    types=_diagnose_types,
    sections={
        "Model and data": f"{_DATA} label_column k_shot sample",
        "Prompt": _QUESTION,
        "Objective": "reward reward_weights loss",
        "Budget and output": "budget plot json",
        "Training settings": "per_device_train_batch_size gradient_accumulation_steps estimator update n_spsa distribution "
        "evaluation informative_target label_reward calibration tune parameters dtype seed",
        "Memory and text": "forward_batch_size max_length max_completion_length temperature top_k top_p stop",
    },
    examples="""\
zorl diagnose --model facebook/opt-125m --dataset train.tsv --text_column text --label_column label \\
  --prompt "{text} It was {mask}." --label_words 0=terrible 1=great --reward f1
zorl diagnose --model facebook/opt-125m --task sst2 --k_shot 16
zorl diagnose … --loss cross_entropy --update sgd --distribution gaussian      # the paper's own recipe
zorl diagnose … --budget 300 --json""",
    words={
        "label_column": "Column with the true label, by name or position as for --text_column. Default: label.",
        "seed": "Random seed of directions, order of the rows and sampling. Default: 42.",
        "gradient_accumulation_steps": "Batches that are combined into one step. Default: 1.",
    },
)

COMPARE = Command(
    name="compare",
    usage="--model M --task TASK [--methods METHOD …]",
    about="""\
Runs methods on the same rows, over several seeds. Writes one table with means and standard deviations, forward passes, seconds
and memory, and a plot. Each run has the same budget of forward passes. Methods that try several learning rates make several
runs: fine-tuning and GRPO spend the budget on each rate, published MeZO a quarter of it on each and all of it on the best. The
table counts the forward passes of all these runs. Finished cells are kept: the same command continues where it was stopped, and
a command with more --methods or --seeds adds to the table.

Without a gradient: majority (always the commonest label), zero_shot, threshold (one fitted bias per label), in_context (up to 32
demonstrations), label_head (where mezo starts), linear_probing, bbt (CMA-ES on a soft prompt). MeZO: mezo (on the metric),
mezo_f1, mezo_cross_entropy, mezo_lora, mezo_prefix, mezo_head, mezo_momentum, mezo_adam, mezo_one_point, mezo_two_sided (SPSA),
mezo_n_spsa (SPSA with 1 to 8 directions per step), mezo_variance and mezo_expectation (SPSA with blocks scaled by the norms of
parameters, or of gradients that cost two forward passes per parameter tensor to estimate), mezo_forward_gradient (on cross
entropy; a slope counts as three forward passes), lp_mezo (a linear probe first), and the paper's own recipe with the best of the
learning rates 1e-5, 1e-4 and 1e-3 (--published_rates): mezo_published, mezo_published_metric. With backpropagation: fine_tuning
(Adam), fine_tuning_sgd, grpo (TRL's).""",
    types=lambda: (CompareArguments,),
    sections={
        "Model and data": f"{_DATA} label_column k_shot sample eval_dataset test_dataset test_split test_rows",
        "Prompt": _QUESTION,
        "What to compare": "methods metrics seeds budget batch_size published_rates jobs",
        "Output": "output_dir json",
        "Memory and text": "max_length max_completion_length stop",
    },
    examples="""\
zorl compare --model roberta-base --task sst2 --k_shot 16 --output_dir sst2
zorl compare --model roberta-base --task sst2 --k_shot 16 --output_dir sst2 --methods fine_tuning bbt   # adds two rows
zorl compare --model facebook/opt-125m --dataset train.tsv --test_dataset test.tsv --prompt "{text} It was {mask}" \\
  --label_words 0=terrible 1=great --budget 1000""",
)

JUDGE = Command(
    name="judge",
    usage="[--model M --prompts FILE] [--run DIR]",
    about="""\
Opens a page on which people choose the better of two answers with one key. Their verdicts, and nothing else, tune the model
while they read, by forward passes alone. Without any flags it works at once, offline, with a small model that ships with zorl.
The same command continues the run.""",
    types=lambda: (JudgeArguments,),
    sections={
        "The run": "run model prompts held_out database",
        "Judging": "prompts_per_step comparisons_per_step votes_per_pair lease_seconds repeat_share comparison_share guidelines",
        "Tuning": "method learning_rate epsilon directions parameters brake max_drift max_completion_length temperature seed",
        "The page": "host port password users no_browser page_only",
    },
    examples="""\
zorl judge                                                              # try it: a model and prompts ship with zorl
zorl judge --model Qwen/Qwen2.5-0.5B --prompts prompts.txt --run my_run
zorl judge --run my_run                                                 # continues it
zorl judge --run my_run --host 0.0.0.0 --users users.txt                # raters on other machines sign in
zorl judge --page_only --database postgresql://zorl@server/judgments    # the page for a zorl train that runs elsewhere""",
)

COMMANDS = {command.name: command for command in (TRAIN, EVAL, PREDICT, REPLAY, JUDGE, COMPARE, PROFILE, DIAGNOSE)}
