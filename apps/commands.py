"""The commands in words: what `--help` says, and which flags there are. Nothing here takes time to import."""

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
        usage: the flags that are always given.
        about: a few lines on what it does.
        types: gives the dataclasses whose fields are the flags.
        sections: title → names of fields, in the order in which `--help` shows them; `--help_all` shows the rest.
        examples: shown at the end.
        words: help for fields whose own text or default is not this command's.
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
        """The text of `--help`, or of `--help_all`."""
        known = self.fields()
        shown = {name for names in self.sections.values() for name in names.split()}
        rest = [name for name in known if name not in shown]
        parts = [f"usage: zorl {self.name} {self.usage} [more flags]", self.about]
        parts += [self._section(title, names.split(), known) for title, names in self.sections.items()]
        file = "--config FILE reads flags from a YAML file, under the same names; flags on the command line win."
        if everything and rest:
            parts.append(self._section("Inherited from transformers' TrainingArguments", rest, known))
        elif rest:
            file += f"\n{len(rest)} more flags, those of transformers' TrainingArguments: zorl {self.name} --help_all"
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
_COMPUTING = "dtype forward_batch_size max_length max_completion_length temperature top_k top_p use_cpu"

TRAIN = Command(
    name="train",
    usage="--model M --dataset FILE --prompt TEMPLATE --label_words LABEL=WORD … --reward R --output_dir DIR",
    about="""\
Tunes a language model on the metric itself, with forward passes alone and in the memory of inference. Each step asks of one
batch: which of eight models near this one do better, and by how much? Held-out rows are scored ten times over the run, and the
best step is kept. The same command continues a run that was cut short, to the same bits.""",
    types=_train_types,
    sections={
        "Model and data": f"{_DATA} label_column eval_dataset eval_split k_shot sample output_dir",
        "The question that a row becomes": f"{_QUESTION} head",
        "What to maximise: a reward, a judge or a loss": "reward reward_weights judge judgments loss metrics",
        "What is tuned": "tune parameters lora_rank lora_alpha lora_targets prefix_tokens quantize dtype",
        "How": "max_steps per_device_train_batch_size learning_rate lr_scheduler_type estimator update epsilon "
        "informative_target n_spsa distribution evaluation comparison label_reward calibration seed",
        "Of some estimators and updates": "block_scales block_scales_every beta1 beta2 moment_window moments",
        "Evaluation and reports": "eval_strategy eval_steps load_best_model_at_end early_stopping_patience "
        "stop_below_gain logging_steps report_to json",
        "Memory and text": "forward_batch_size gradient_accumulation_steps max_length max_completion_length "
        "temperature top_k top_p device_map",
    },
    examples="""\
zorl train --model facebook/opt-125m --dataset train.tsv --eval_dataset dev.tsv --text_column text --label_column label \\
  --prompt "{text} It was {mask}." --label_words 0=terrible 1=great --reward f1 --max_steps 150 --output_dir out
zorl train --task sst2 --model roberta-large --k_shot 16 --seed 13 --output_dir out          # a task of the paper
zorl train --task boolq --model facebook/opt-1.3b --sample 1000 500 --output_dir out         # the paper's sizes for OPT
zorl train --config run.yaml --seed 1                      # the same flags in a file, one of them changed
zorl train … --text_column 0 --label_column 1              # a TSV file without a header
zorl train … --max_steps 2000 --stop_below_gain 0.005      # or less, where twice as much would not buy half a point
zorl train … --reward f1:pos_label=1 --metrics accuracy    # optimise one class's F1, record accuracy
zorl train … --tune lora --quantize int8                   # low-rank adapters on weights of eight bits
zorl train … --reward rewards.py:cost                      # def cost(completions, label, **columns): return [ … ]
zorl train --model roberta-base --head classifier --dataset train.tsv --text_column text --reward f1   # probe, then MeZO
zorl train --model M --dataset qa.jsonl --prompt "Q: {question}\\nA:" --reward squad_f1    # generated answers
zorl train --model M --dataset qa.jsonl --prompt "Q: {question}\\nA:" --loss cross_entropy --label_column answers
zorl train --model M --dataset copa.jsonl --prompt "{premise} {connective} {mask}" --options choices --reward accuracy
zorl train --model M --dataset prompts.jsonl --judge reward:rewards.py:kind               # only which answer is better counts""",
    words={
        "output_dir": "Folder for the run: trajectory, tuned model, tokenizer and prompt. Default: zorl_output.",
        "label_column": "Column with the true label, by name or position as for --text_column. Default: label.",
        "max_steps": "Steps, of a forward of a batch for each direction, or two with estimator=spsa. Default: 250, unless "
        "--num_train_epochs is given.",
        "seed": "Of directions, order of the rows and sampling. Default: 42.",
        "eval_strategy": "steps, epoch or no. Default: steps.",
        "eval_steps": "Steps between two evaluations; below 1 a share of all steps. Default: 0.1.",
        "load_best_model_at_end": "Rewind to the best evaluation before saving. Default: True, if there are evaluations.",
        "logging_steps": "Steps between two lines of the log. Default: 10.",
        "report_to": "Where else to log: tensorboard, wandb, trackio, … Default: none.",
        "gradient_accumulation_steps": "Batches that are put together for one probe. Default: 1.",
    },
)

EVAL = Command(
    name="eval",
    usage="--model M --dataset FILE",
    about="""\
Scores a model on a file: accuracy, macro-F1 and the F1 of each label (of options accuracy alone), and any reward. A folder
that zorl train wrote remembers its prompt, label words or options, and label column; flags override them.""",
    types=lambda: (EvalArguments,),
    sections={
        "Model and data": f"{_DATA} label_column",
        "The question that a row becomes": _QUESTION,
        "What to compute": "reward reward_weights json",
        "How": _COMPUTING,
    },
    examples="""\
zorl eval --model out --dataset test.tsv --text_column text --label_column label --json
zorl eval --model facebook/opt-125m --dataset test.tsv --prompt "{text} It was {mask}." --label_words 0=terrible 1=great
zorl eval --model out --dataset qa.jsonl --reward squad_f1 exact_match
zorl eval --model out --task sst2                              # on the split that papers report""",
)

PREDICT = Command(
    name="predict",
    usage="--model M --dataset FILE --output FILE",
    about="""\
Answers every row of a file: with a label's name where the prompt has label words, with one of the row's options where it
names such, else with text. The output holds the columns of the data set, and 'prediction'. A folder that zorl train wrote
remembers its prompt.""",
    types=lambda: (PredictArguments,),
    sections={
        "Model and data": f"{_DATA} output overwrite json",
        "The question that a row becomes": _QUESTION,
        "How": _COMPUTING,
    },
    examples="""\
zorl predict --model out --dataset new.tsv --output predictions.jsonl
zorl predict --model out --dataset new.tsv --text_column 0 --output predictions.csv""",
)

REPLAY = Command(
    name="replay",
    usage="--trajectory DIR/trajectory.zorl --output_dir DIR",
    about="""\
Rebuilds a tuned model from its base and the few kilobytes of a trajectory. The base is checked against the hash that the
trajectory holds, and the result against the weights that the run saved. With --until the run is rewound to any step.""",
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
What tuning a model costs on this machine: time and memory of inference, of a MeZO step, of a MeZO step on a LoRA adapter, and
of fine-tuning with backpropagation and AdamW, each on a random batch; and how large a model each could tune here.""",
    types=lambda: (ProfileArguments,),
    sections={"Flags": "model batch_size length dtype lora_rank rounds plot use_cpu json"},
    examples="""\
zorl profile                                                            # try it: a small model is built in
zorl profile --model facebook/opt-125m --batch_size 16 --length 128
zorl profile --model Qwen/Qwen2.5-0.5B --dtype bfloat16 --json""",
)

DIAGNOSE = Command(
    name="diagnose",
    usage="--model M (--task TASK | --dataset FILE --prompt TEMPLATE --label_words LABEL=WORD … --reward R)",
    about="""\
Suggests a learning rate and an epsilon for zorl train, without a grid search, from a bounded number of forwards: how steep and
how curved the objective is where tuning would start, its effective rank, how much of a step another batch confirms, and how
far a few real steps get. Takes the flags of zorl train and changes nothing; prints the command to train with.""",
    types=_diagnose_types,
    sections={
        "Model and data": f"{_DATA} label_column",
        "The question that a row becomes": _QUESTION,
        "What is to be maximised": "reward reward_weights loss",
        "What it may cost, and what comes out": "budget plot json",
        "As in training": "per_device_train_batch_size gradient_accumulation_steps estimator update n_spsa distribution "
        "evaluation informative_target label_reward calibration tune parameters dtype seed",
        "Memory and text": "forward_batch_size max_length max_completion_length temperature top_k top_p",
    },
    examples="""\
zorl diagnose --model facebook/opt-125m --dataset train.tsv --text_column text --label_column label \\
  --prompt "{text} It was {mask}." --label_words 0=terrible 1=great --reward f1
zorl diagnose --model facebook/opt-125m --task sst2
zorl diagnose … --loss cross_entropy --update sgd --distribution gaussian      # the paper's own recipe
zorl diagnose … --budget 250 --json""",
    words={
        "label_column": "Column with the true label, by name or position as for --text_column. Default: label.",
        "seed": "Of directions, order of the rows and sampling. Default: 42.",
        "gradient_accumulation_steps": "Batches that are put together for one probe. Default: 1.",
    },
)

COMPARE = Command(
    name="compare",
    usage="--model M --task TASK [--methods METHOD …]",
    about="""\
Runs methods side by side on the same rows, each run within the same budget of forward passes, over several seeds: one table
with means and standard deviations, forwards, seconds and memory, and a plot. Where a method tries several learning rates, the
forwards of all of them are counted. A cell that is done is kept, so the same command goes on where it was stopped, and another
with more --methods or --seeds adds to the table.

Without a gradient: zero_shot, threshold (one fitted bias a label), in_context (32 demonstrations), label_head (what mezo
starts from), linear_probing, bbt (CMA-ES on a soft prompt). MeZO: mezo (on the metric), mezo_f1, mezo_cross_entropy, mezo_lora,
mezo_prefix, mezo_head, mezo_momentum, mezo_adam, mezo_one_point, mezo_two_sided (SPSA), lp_mezo (a linear probe first), and the
paper's own recipe with a grid of learning rates: mezo_published, mezo_published_metric. With backpropagation: fine_tuning (Adam),
fine_tuning_sgd, grpo (TRL's).""",
    types=lambda: (CompareArguments,),
    sections={
        "Model and data": f"{_DATA} label_column k_shot sample eval_dataset test_dataset test_split test_rows",
        "The question that a row becomes": _QUESTION,
        "What to compare": "methods metrics seeds budget batch_size",
        "Output": "output_dir json",
        "Memory and text": "max_length max_completion_length",
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
Opens a page on which people say which of two answers is better, with one key. Their verdicts, and nothing else, tune the
model while they read, by forward passes alone. With no flags at all it works at once, offline, with a small model that
ships with zorl. The same command goes on with the run.""",
    types=lambda: (JudgeArguments,),
    sections={
        "The run": "run model prompts held_out database",
        "Judging": "prompts_per_step comparisons_per_step votes_per_pair lease_seconds repeat_share comparison_share guidelines",
        "Tuning": "method learning_rate epsilon directions parameters brake max_drift max_completion_length temperature seed",
        "The page": "host port password users no_browser page_only",
    },
    examples="""\
zorl judge                                                              # try it: a model and prompts are built in
zorl judge --model Qwen/Qwen2.5-0.5B --prompts prompts.txt --run my_run
zorl judge --run my_run                                                 # goes on with it
zorl judge --run my_run --host 0.0.0.0 --users users.txt                # raters on other machines, who sign in
zorl judge --page_only --database postgresql://zorl@server/judgments    # the page of a zorl train that runs elsewhere""",
)

COMMANDS = {command.name: command for command in (TRAIN, EVAL, PREDICT, REPLAY, JUDGE, COMPARE, PROFILE, DIAGNOSE)}
