"""The arguments of the commands. Every field is a flag (`--text_column`) and a key of the YAML file given with --config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from zorl.apps.judge_settings import DEFAULTS, JudgeSettings


def _flag(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


def _several(help: str) -> dict[str, Any]:
    """Metadata of a flag that takes several values, or is given several times."""
    return {"help": help, "action": "extend"}


def _by_method(setting: str) -> str:
    """The defaults of a setting that differ between the methods of `zorl judge`, in words."""
    return f"Default: {', '.join(f'{values[setting]} with {method}' for method, values in DEFAULTS.items())}."


@dataclass
class InputArguments:
    """A model, a data set, and the prompt that each row becomes."""

    model: str | None = _flag(
        "Name of a model on the hub, or a folder: the base model to tune, or a model that zorl saved."
    )
    task: str | None = _flag(
        "Name of a task of the MeZO paper, such as sst2, rte or squad, or path/file.py of your own. It sets the prompt, the "
        "label words, the data set, the label column and the reward; other flags override it."
    )
    dataset: str | None = _flag(
        "A .csv, .tsv, .jsonl, .json or .parquet file (also .gz), or a data set on the hub. With --task: the task's file, or "
        "a folder with one file per split; default: the task's data set on the hub."
    )
    dataset_config: str | None = _flag(
        "Configuration of a hub data set that has several, such as sst2 of nyu-mll/glue."
    )
    dataset_split: str | None = _flag(
        "Split of the hub data set or the task. Default: train, or the only split; of a task, zorl eval and predict read test."
    )
    text_column: str | None = _flag(
        "Name of the column with the text. If a CSV or TSV file has no header: its position, counted from 0; the column is "
        "then called 'text'."
    )
    prompt: str | None = _flag(
        "Template: {column} stands for the row's value, {mask} for the label word, \\n for a line break. Without {mask} the "
        "model answers with text or, if it is a classifier, with a label; {sep} begins the second text of a pair. "
        "Default: the text column, or the column 'prompt' (text or a conversation)."
    )
    label_words: list[str] | None = field(
        default=None,
        metadata=_several(
            "One word per label, as label=word: 0=terrible 1=great. In YAML: a mapping. (For a label that begins with a dash: "
            "--label_words=-1=bad.)"
        ),
    )
    options: str | None = _flag(
        "Column with a list of texts in each row: the model answers with the text that is likeliest at {mask}. The label "
        "column holds the text of the right option. For causal models; .jsonl, .json and .parquet files can have such columns."
    )
    chat: bool = _flag("Apply the tokenizer's chat template to the prompt.", False)
    system: str | None = _flag("System message; implies --chat.")
    json: bool = _flag("Print one JSON object to stdout. Progress and messages always go to stderr.", False)


@dataclass
class TrainArguments(InputArguments):
    """The arguments of `zorl train` besides those of `MeZOConfig`."""

    head: str | None = _flag(
        "classifier: take labels from a sequence-classification head (a new one if the model has none) instead of label "
        "words. Default: use the model as it is."
    )
    eval_dataset: str | None = _flag(
        "Held-out rows. Default: those that --k_shot or --sample draws, else a stratified fifth of --dataset, at most 1000 rows."
    )
    eval_split: str | None = _flag("Split of --eval_dataset, of --dataset if that is a hub data set, or of --task.")
    k_shot: int | None = _flag(
        "Train on this many rows per label, drawn with --seed, and evaluate on as many others (paper: 16 and 512, with "
        "seeds 13 21 42 87 100). Without label words: this many rows in total."
    )
    sample: list[int] | None = field(
        default=None,
        metadata={
            "help": "Two numbers: rows to train on and rows to evaluate on, drawn with --seed, with labels in proportion "
            "(paper: 1000 500)."
        },
    )
    reward: list[str] | None = field(
        default=None,
        metadata=_several(
            "What to maximise: f1, accuracy, balanced_accuracy, matthews, exact_match, squad_f1 or classifier:model=…, with "
            "options as in f1:average=weighted; or your own function, as package.module:name or path/file.py:name."
        ),
    )
    judge: str | None = _flag(
        "Instead of a reward, a judge that says which of two answers is better: human (with --judgments), reward:NAME "
        "(anything that --reward takes), classifier:MODEL or classifier:MODEL,label=good, model:MODEL (a language model that "
        "reads both), or your own function, as package.module:name or path/file.py:name."
    )
    judgments: str | None = _flag(
        "With --judge human: the SQLite file that the run and its raters share, or a PostgreSQL database, "
        "postgresql://user@host/name."
    )
    loss: str | None = _flag(
        "Instead of a reward: cross_entropy of the true label among the label words or options; without them, of the text "
        "in --label_column given the prompt, token by token."
    )
    metrics: list[str] | None = field(
        default=None,
        metadata=_several(
            "Rewards to record at evaluations but not to optimise. Default: accuracy f1 with label words, accuracy with options."
        ),
    )


@dataclass
class AnswerArguments(InputArguments):
    """How answers are computed when nothing is trained."""

    dtype: str | None = _flag(
        "float32, bfloat16, float16 or auto (as saved). Default: auto for a model that zorl saved, else float32."
    )
    forward_batch_size: int = _flag(
        "Maximum inputs per forward pass; halved when memory runs out. Results do not change.", 64
    )
    max_length: int | None = _flag(
        "Maximum tokens per prompt; longer texts are cut. Default: as in training, or the model's limit."
    )
    max_completion_length: int | None = _flag("Maximum tokens to generate. Default: as in training, or 64.")
    temperature: float | None = _flag("Sampling temperature; 0 decodes greedily. Default: as in training, or 1.")
    top_k: int | None = _flag("Sample from the k likeliest tokens. Default: as in training, or all tokens.")
    top_p: float | None = _flag(
        "Sample from the likeliest tokens with this total probability. Default: as in training, or all tokens."
    )
    stop: str | None = _flag(
        "Generated answers end before this text, such as \\n for a line break; '': no such text. Default: as in training, or "
        "the task's, or none."
    )
    use_cpu: bool = _flag("Run on the CPU even if an accelerator is available.", False)


@dataclass
class EvalArguments(AnswerArguments):
    """The arguments of `zorl eval`."""

    label_column: str | None = _flag(
        "Column with the true label, by name or position. Default: as in training, or label."
    )
    reward: list[str] | None = field(
        default=None,
        metadata=_several("Rewards to compute, named as for zorl train. Required without label words or options."),
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward in their sum. Default: 1 each."}
    )


@dataclass
class PredictArguments(AnswerArguments):
    """The arguments of `zorl predict`."""

    output: str | None = _flag("File to write, .jsonl or .csv: the columns of the data set and 'prediction'.")
    overwrite: bool = _flag("Replace the file if it exists.", False)


@dataclass
class ReplayArguments:
    """The arguments of `zorl replay`."""

    trajectory: str | None = _flag("The trajectory.zorl of a run.")
    model: str | None = _flag("The base model that the run started from. Default: the one named in the trajectory.")
    until: int | None = _flag("Step to stop at. Default: the step that the run saved, or the last one.")
    output_dir: str | None = _flag("Folder for the rebuilt model, its tokenizer and its prompt.")
    overwrite: bool = _flag("Write into a folder that is not empty.", False)
    json: bool = _flag("Print one JSON object to stdout.", False)


@dataclass
class CompareArguments(InputArguments):
    """The arguments of `zorl compare`."""

    label_column: str | None = _flag("Column with the true label, by name or position. Default: label.")
    eval_dataset: str | None = _flag(
        "Held-out rows on which methods choose their settings. Default: those that --k_shot or --sample draws, else a fifth "
        "of --dataset."
    )
    test_dataset: str | None = _flag("Rows to report on. Default: the task's test split, else a fifth of --dataset.")
    test_split: str | None = _flag("Split of --test_dataset, or of --dataset if that is a hub data set.")
    test_rows: int = _flag("Maximum number of rows to report on; drawn once for all seeds.", 1000)
    k_shot: int | None = _flag("Learn from this many rows per label, drawn anew for each seed. Default: all rows.")
    sample: list[int] | None = field(
        default=None,
        metadata={
            "help": "Two numbers: rows to learn from and rows to choose settings on, drawn anew for each seed, with labels "
            "in proportion (paper: 1000 500)."
        },
    )
    methods: list[str] | None = field(
        default=None,
        metadata=_several(
            "Methods to compare; see above. Default: majority zero_shot threshold in_context linear_probing mezo_cross_entropy "
            "mezo."
        ),
    )
    metrics: list[str] | None = field(
        default=None,
        metadata=_several(
            "Rewards to report, named as for zorl train; methods maximise the first one and choose settings by it. Default: "
            "the task's, else accuracy and f1, or squad_f1 and exact_match without label words."
        ),
    )
    seeds: list[int] = field(
        default_factory=lambda: [13, 21, 42],
        metadata=_several("Random seeds: each method runs once per seed. Default: 13 21 42."),
    )
    budget: int = _flag(
        "Forward passes (of one batch each) that a run may spend on learning. Methods that try several learning rates spend "
        "it on each of them (fine-tuning, GRPO), or a quarter of it (published MeZO).",
        500,
    )
    published_rates: list[float] | None = field(
        default=None,
        metadata=_several(
            "Learning rates that mezo_published and mezo_published_metric try. Default: 1e-5 1e-4 1e-3, for small models; the "
            "paper's grids are 1e-7 1e-6 1e-5 for RoBERTa-large and 1e-7 1e-6 for OPT."
        ),
    )
    batch_size: int = _flag("Rows per batch.", 32)
    jobs: int = _flag(
        "Cells that run at once, in processes of their own, which share the cores and are spread over the GPUs. Each holds a "
        "model, and their seconds are no longer those of a machine that does nothing else.",
        1,
    )
    max_length: int | None = _flag("Maximum tokens per prompt; longer texts are cut. Default: the model's limit.")
    max_completion_length: int = _flag("Maximum tokens to generate.", 64)
    stop: str | None = _flag(
        "Generated answers end before this text, such as \\n for a line break; '': no such text. Default: the task's, or none."
    )
    output_dir: str = _flag(
        "Folder for the tables, the plot and one file per cell; rerun the same command to continue.", "comparison"
    )


@dataclass
class ProfileArguments:
    """The arguments of `zorl profile`."""

    model: str | None = _flag("Name of a model on the hub, or a folder. Default: the small model that ships with zorl.")
    batch_size: int = _flag("Rows per batch.", 8)
    length: int = _flag("Tokens per row.", 64)
    dtype: str = _flag("Data type of the weights: float32, bfloat16, float16, or auto (as saved).", "float32")
    lora_rank: int = _flag("Rank r of the LoRA adapter, which is on all linear layers.", 8)
    rounds: int = _flag("Steps to time; the median is reported.", 3)
    plot: str = _flag("File for the plot.", "zorl_profile.png")
    use_cpu: bool = _flag("Measure on the CPU even if a GPU is available.", False)
    json: bool = _flag("Print one JSON object to stdout.", False)


@dataclass
class DiagnoseArguments(InputArguments):
    """The arguments of `zorl diagnose` besides those of `MeZOConfig`."""

    k_shot: int | None = _flag("Measure on this many rows per label, those that zorl train --k_shot trains on.")
    sample: list[int] | None = field(
        default=None,
        metadata={
            "help": "Two numbers: rows to measure on and rows to hold out, those that zorl train --sample draws."
        },
    )
    reward: list[str] | None = field(
        default=None,
        metadata=_several("What to maximise, named as for zorl train: f1, accuracy, your own function, …"),
    )
    loss: str | None = _flag("Instead of a reward: cross_entropy, over the label words.")
    budget: int = _flag(
        "Maximum forward passes (of one batch each) to spend, including those that fit the label head.", 500
    )
    plot: str = _flag("File for the plot.", "zorl_diagnosis.png")


@dataclass
class JudgeArguments:
    """The arguments of `zorl judge`."""

    run: str = _flag("Folder for the run; created if missing; an existing run is continued.", "judge_run")
    database: str | None = _flag(
        "PostgreSQL database for the judgments, postgresql://user@host/name, so that page and trainer can be on different "
        "machines. A password in the URL is not saved. Default: the file judgments.sqlite in the run's folder."
    )
    model: str | None = _flag(
        "Name of a causal language model on the hub, or a folder. Default: a small model that ships with zorl."
    )
    prompts: str | None = _flag(
        "What the model answers: a .txt file with one prompt per line, or a .jsonl, .csv, .tsv, .json or .parquet file with "
        "a column 'prompt'. Default: beginnings of film reviews, for the model that ships with zorl."
    )
    held_out: str | None = _flag(
        "File of prompts for the blind comparisons with the starting model. Default: those of --prompts."
    )
    method: str = _flag(
        "How verdicts become steps: replay draws from all decided verdicts so far at every step; direct makes one MeZO step from "
        "the latest ones.",
        JudgeSettings.method,
    )
    prompts_per_step: int | None = _flag(f"Pairs that raters judge per step. {_by_method('prompts_per_step')}")
    comparisons_per_step: int = _flag(
        "Blind comparisons of the current and the starting model to offer after each step.",
        JudgeSettings.comparisons_per_step,
    )
    votes_per_pair: int | None = _flag("Raters per pair. Default: 1.")
    lease_seconds: float | None = _flag("Seconds for which a pair is reserved for one rater. Default: 120.")
    repeat_share: float | None = _flag(
        "Share of the pairs shown to a rater that repeat an earlier one with the sides swapped, to measure consistency. "
        "Default: 0.05."
    )
    comparison_share: float | None = _flag(
        "Share of the pairs shown to a rater that compare the current with the starting model. Default: 0.1."
    )
    max_completion_length: int = _flag("Maximum tokens per answer.", JudgeSettings.max_completion_length)
    temperature: float = _flag("Sampling temperature.", JudgeSettings.temperature)
    learning_rate: float | None = _flag(f"Typical change of a parameter per update. {_by_method('learning_rate')}")
    epsilon: str | None = _flag(f"Size of the perturbation: a number, or auto. {_by_method('epsilon')}")
    directions: int | None = _flag(f"Directions per update. {_by_method('directions')}")
    parameters: list[str] | None = field(
        default=None,
        metadata=_several(
            "Parameters to tune, as shell patterns on their names, such as '*' for all. Default: one output bias per token."
        ),
    )
    brake: float = _flag("KL penalty per nat of divergence from the starting model (replay only).", JudgeSettings.brake)
    max_drift: float = _flag(
        "Divergence from the starting model, in nats per token, at which tuning pauses; 0 never pauses.",
        JudgeSettings.max_drift,
    )
    seed: int = _flag("Random seed of directions and sampling.", JudgeSettings.seed)
    host: str = _flag("Address to serve on. Any address other than this machine's own requires passwords.", "127.0.0.1")
    port: int | None = _flag("Port to serve on. Default: the first free port from 7860.")
    password: str | None = _flag(
        "One password for everybody; raters choose the name that they sign in with. Not with --users."
    )
    users: str | None = _flag("A text file of lines name:password, one per person who may judge.")
    guidelines: str | None = _flag("A text file for the raters. Its first line is the question, which stays in view.")
    no_browser: bool = _flag("Do not open the page in a browser.", False)
    page_only: bool = _flag(
        "Serve the page only: a zorl train --judge human --judgments RUN/judgments.sqlite, or one on the same --database, "
        "asks the questions and tunes.",
        False,
    )
