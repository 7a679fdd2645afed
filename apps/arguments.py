"""What the commands take. Every field is a flag (`--text_column`) and a key of the YAML file given with --config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from zorl.apps.judge_settings import JudgeSettings


def _flag(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


def _several(help: str) -> dict[str, Any]:
    """Several values behind one flag, or the flag several times."""
    return {"help": help, "action": "extend"}


@dataclass
class InputArguments:
    """A model, a data set, and the question that a row becomes."""

    model: str | None = _flag("Name of a model on the hub, or a folder: the base to tune, or what zorl saved.")
    task: str | None = _flag(
        "A task of the MeZO paper by name, such as sst2, rte or squad, or path/file.py of your own: it gives the prompt, the "
        "label words, the data set, the label column and the reward. Other flags override it."
    )
    dataset: str | None = _flag(
        "A .csv, .tsv, .jsonl, .json or .parquet file (also .gz), or a data set of the hub. With --task its file, or the "
        "folder with a file for each split; default: the task's data set on the hub."
    )
    dataset_config: str | None = _flag("Of a hub data set that has several, such as sst2 of nyu-mll/glue.")
    dataset_split: str | None = _flag("Of a hub data set or task. Default: train, or the only one.")
    text_column: str | None = _flag(
        "Column with the text, by name. By position, counted from 0, where a CSV or TSV file has no header; the column is "
        "then called 'text'."
    )
    prompt: str | None = _flag(
        "Template: {column} is a value of the row, {mask} where the label word goes. \\n is a new line. Without {mask} the "
        "model answers with text, or, if it is a classifier, with a label; {sep} begins the second text of a pair. "
        "Default: the text column, or the column 'prompt' (text, or a conversation)."
    )
    label_words: list[str] | None = field(
        default=None,
        metadata=_several(
            "A word for each label, as label=word: 0=terrible 1=great. In YAML a mapping. (A label that begins with a dash: "
            "--label_words=-1=bad.)"
        ),
    )
    options: str | None = _flag(
        "Column that holds a list of texts in each row: the model answers with the likeliest of them, at {mask}. The label "
        "column holds the text of the right one. For causal models; .jsonl, .json and .parquet files have such columns."
    )
    chat: bool = _flag("Put the prompt through the tokenizer's chat template.", False)
    system: str | None = _flag("A system message; implies --chat.")
    json: bool = _flag("Print one JSON object on stdout. Progress and messages go to stderr in any case.", False)


@dataclass
class TrainArguments(InputArguments):
    """What `zorl train` takes besides `MeZOConfig`."""

    head: str | None = _flag(
        "classifier: labels come from a sequence-classification head, a new one where the model has none, not from label words. "
        "Default: as the model is."
    )
    eval_dataset: str | None = _flag(
        "Held-out rows. Default: what --k_shot or --sample draws, else a stratified fifth of --dataset, 1000 rows at most."
    )
    eval_split: str | None = _flag(
        "Split of --eval_dataset, or of --dataset where that is a hub data set, or of --task."
    )
    k_shot: int | None = _flag(
        "Train on this many rows of each label, drawn by --seed, and evaluate on as many others (paper: 16 and 512, with "
        "the seeds 13 21 42 87 100). Without label words, rows in all."
    )
    sample: list[int] | None = field(
        default=None,
        metadata={
            "help": "Train on so many rows, drawn by --seed with the labels in proportion, and evaluate on so many others: "
            "two numbers (paper: 1000 500)."
        },
    )
    reward: list[str] | None = field(
        default=None,
        metadata=_several(
            "What to maximise: f1, accuracy, balanced_accuracy, matthews, exact_match, squad_f1, classifier:model=…, with "
            "options as in f1:average=weighted; or your own function, as package.module:name or path/file.py:name."
        ),
    )
    judge: str | None = _flag(
        "Instead of a reward, who says which of two answers is better: human (with --judgments), reward:NAME (any that "
        "--reward takes), classifier:MODEL or classifier:MODEL,label=good, model:MODEL (a language model that reads both), "
        "or your own function, as package.module:name or path/file.py:name."
    )
    judgments: str | None = _flag(
        "With --judge human: the SQLite file in which the run and its raters meet, or a PostgreSQL database, "
        "postgresql://user@host/name."
    )
    loss: str | None = _flag(
        "Instead of a reward: cross_entropy, of the true label among the label words or options; without them, of the text "
        "in --label_column given the prompt, token by token."
    )
    metrics: list[str] | None = field(
        default=None,
        metadata=_several(
            "Rewards to record at evaluations and not to optimise. Default with label words: accuracy f1; with options: accuracy."
        ),
    )


@dataclass
class AnswerArguments(InputArguments):
    """How answers are computed where nothing is trained."""

    dtype: str | None = _flag("float32, bfloat16, float16 or auto. Default: as saved by zorl, else float32.")
    forward_batch_size: int = _flag(
        "Inputs a forward, at most. It is halved where memory runs out; results do not change.", 64
    )
    max_length: int | None = _flag(
        "Tokens of a prompt; longer texts are cut. Default: as trained, or what the model takes."
    )
    max_completion_length: int | None = _flag("Tokens to generate. Default: as trained, or 64.")
    temperature: float | None = _flag("Of sampling; 0 decodes greedily. Default: as trained, or 1.")
    top_k: int | None = _flag("Sample among the k likeliest tokens. Default: as trained, or all.")
    top_p: float | None = _flag("Sample among tokens of this total probability. Default: as trained, or all.")
    use_cpu: bool = _flag("Leave an accelerator alone.", False)


@dataclass
class EvalArguments(AnswerArguments):
    """What `zorl eval` takes."""

    label_column: str | None = _flag("Column with the true label, by name or position. Default: as trained, or label.")
    reward: list[str] | None = field(
        default=None,
        metadata=_several("Rewards to compute, named as for zorl train. Needed without label words and options."),
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "A weight for each reward in their sum. Default: 1 each."}
    )


@dataclass
class PredictArguments(AnswerArguments):
    """What `zorl predict` takes."""

    output: str | None = _flag("File to write, .jsonl or .csv: the columns of the data set, and 'prediction'.")
    overwrite: bool = _flag("Replace the file if it exists.", False)


@dataclass
class ReplayArguments:
    """What `zorl replay` takes."""

    trajectory: str | None = _flag("The trajectory.zorl of a run.")
    model: str | None = _flag("The base model that the run started from. Default: the name the trajectory gives.")
    until: int | None = _flag("Step to stop at. Default: the step that the run saved, or its last.")
    output_dir: str | None = _flag("Folder for the rebuilt model, its tokenizer and its prompt.")
    overwrite: bool = _flag("Write into a folder that is not empty.", False)
    json: bool = _flag("Print one JSON object on stdout.", False)


@dataclass
class CompareArguments(InputArguments):
    """What `zorl compare` takes."""

    label_column: str | None = _flag("Column with the true label, by name or position. Default: label.")
    eval_dataset: str | None = _flag(
        "Held-out rows on which methods choose their settings. Default: what --k_shot or --sample draws, else a fifth of "
        "--dataset."
    )
    test_dataset: str | None = _flag("Rows to report on. Default: the task's test split, else a fifth of --dataset.")
    test_split: str | None = _flag("Split of --test_dataset, or of --dataset where that is a hub data set.")
    test_rows: int = _flag("Rows to report on, at most; drawn once for all seeds.", 1000)
    k_shot: int | None = _flag("Learn from this many rows of each label, drawn by each seed. Default: from all.")
    sample: list[int] | None = field(
        default=None,
        metadata={
            "help": "Learn from so many rows and choose settings by so many others, drawn by each seed with the labels in "
            "proportion: two numbers (paper: 1000 500)."
        },
    )
    methods: list[str] | None = field(
        default=None,
        metadata=_several(
            "What to compare; see above. Default: zero_shot threshold in_context linear_probing mezo_cross_entropy mezo."
        ),
    )
    metrics: list[str] | None = field(
        default=None,
        metadata=_several(
            "Rewards to report, named as for zorl train; the first is also what methods maximise and choose by. Default: the "
            "task's, else accuracy and f1, or without label words squad_f1 and exact_match."
        ),
    )
    seeds: list[int] = field(
        default_factory=lambda: [13, 21, 42], metadata=_several("Of draws and methods. Default: 13 21 42.")
    )
    budget: int = _flag("Forwards of a batch that a run may spend in learning.", 500)
    batch_size: int = _flag("Rows of a batch.", 32)
    max_length: int | None = _flag("Tokens of a prompt; longer texts are cut. Default: what the model takes.")
    max_completion_length: int = _flag("Tokens to generate.", 64)
    output_dir: str = _flag(
        "Folder for the tables, the plot and a file a cell; the same command goes on there.", "comparison"
    )


@dataclass
class ProfileArguments:
    """What `zorl profile` takes."""

    model: str | None = _flag("A model on the hub, or its folder. Default: the small one that ships with zorl.")
    batch_size: int = _flag("Rows of the batch.", 8)
    length: int = _flag("Tokens of a row.", 64)
    dtype: str = _flag("Of the weights: float32, bfloat16, float16, or auto (as saved).", "float32")
    lora_rank: int = _flag("r of the LoRA adapter, on all linear layers.", 8)
    rounds: int = _flag("Steps that are timed; the median counts.", 3)
    plot: str = _flag("File for the plot.", "zorl_profile.png")
    use_cpu: bool = _flag("Measure on the CPU though there is a GPU.", False)
    json: bool = _flag("Print one JSON object on stdout.", False)


@dataclass
class DiagnoseArguments(InputArguments):
    """What `zorl diagnose` takes besides `MeZOConfig`."""

    reward: list[str] | None = field(
        default=None,
        metadata=_several("What is to be maximised, named as for zorl train: f1, accuracy, your own function, …"),
    )
    loss: str | None = _flag("Instead of a reward: cross_entropy, over the label words.")
    budget: int = _flag("Forwards of a batch to spend, at most; fitting the label head is among them.", 500)
    plot: str = _flag("File for the plot.", "zorl_diagnosis.png")


@dataclass
class JudgeArguments:
    """What `zorl judge` takes."""

    run: str = _flag("Folder for the run, made if need be; a run that is there goes on.", "judge_run")
    database: str | None = _flag(
        "Keep the judgments in a PostgreSQL database, postgresql://user@host/name, so that page and trainer may be on "
        "different machines. Default: the file judgments.sqlite in the run's folder. A password in it is not saved."
    )
    model: str | None = _flag(
        "A causal language model on the hub, or its folder. Default: a small one that ships with zorl."
    )
    prompts: str | None = _flag(
        "What the model answers: a .txt file with a prompt a line, or a .jsonl, .csv, .tsv, .json or .parquet file with the "
        "column prompt. Default: beginnings of film reviews, for the model that ships with zorl."
    )
    held_out: str | None = _flag(
        "Prompts, likewise, for blind comparisons with the starting model. Default: those of --prompts."
    )
    method: str = _flag(
        "How verdicts become steps: replay learns from all of them at each; direct makes one MeZO step of the latest.",
        JudgeSettings.method,
    )
    prompts_per_step: int | None = _flag("Pairs that people judge for one step. Default: the method's own.")
    comparisons_per_step: int = _flag(
        "Pairs of the current and the starting model that are offered after a step.", JudgeSettings.comparisons_per_step
    )
    votes_per_pair: int | None = _flag("Raters who judge each pair. Default: 1.")
    lease_seconds: float | None = _flag("Time a rater has a pair to themselves. Default: 120.")
    repeat_share: float | None = _flag(
        "Of what a rater sees, the share of repeats with the sides swapped, which tell how consistent they are. Default: 0.05."
    )
    comparison_share: float | None = _flag(
        "Of what a rater sees, the share that compares with the starting model. Default: 0.1."
    )
    max_completion_length: int = _flag("Tokens of an answer.", JudgeSettings.max_completion_length)
    temperature: float = _flag("Of sampling.", JudgeSettings.temperature)
    learning_rate: float | None = _flag("A parameter's typical change in one update. Default: the method's own.")
    epsilon: str | None = _flag(
        "How far apart the two models of a pair are: a number, or auto. Default: the method's own."
    )
    directions: int | None = _flag("Of one update. Default: the method's own.")
    parameters: list[str] | None = field(
        default=None,
        metadata=_several(
            "Shell patterns of the parameters to tune, such as '*' for all. Default: a bias for each token on the output."
        ),
    )
    brake: float = _flag("What a nat of divergence from the starting model costs, with replay.", JudgeSettings.brake)
    max_drift: float = _flag(
        "Nats a token between the current and the starting model at which tuning pauses; 0 never pauses.",
        JudgeSettings.max_drift,
    )
    seed: int = _flag("Of directions and sampling.", JudgeSettings.seed)
    host: str = _flag("Address to serve on. Another than this machine's own needs passwords.", "127.0.0.1")
    port: int | None = _flag("Port to serve on. Default: the first free one from 7860.")
    password: str | None = _flag("One password for all; the name that a rater signs in with is theirs to choose.")
    users: str | None = _flag("A file of lines name:password: who may judge.")
    guidelines: str | None = _flag("A text file for the raters; its first line is the question that stays in view.")
    no_browser: bool = _flag("Do not open the page in a browser.", False)
    page_only: bool = _flag(
        "Tune nothing here: the questions are those of zorl train --judge human --judgments RUN/judgments.sqlite, or of a "
        "--database.",
        False,
    )
