"""Settings of `MeZOTrainer`: transformers' `TrainingArguments` and what forward-only tuning adds."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from transformers import SchedulerType, TrainingArguments

from zorl.adapters import SCALES, default_learning_rate
from zorl.block_scales import check_block_scales
from zorl.comparisons import COMPARISONS
from zorl.directions import DISTRIBUTIONS, rank
from zorl.estimators import EstimatorName
from zorl.expected_reward import LabelReward
from zorl.head_tuning import Calibration
from zorl.moments import Averaging
from zorl.quantization import PACKAGES
from zorl.schedules import Directions
from zorl.updates import measured_in_weights

_MEASURED_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
DIRECTIONS = 8  # per step of estimator="one_sided", of which seven are worth something
ANSWERING = ("max_length", "max_completion_length", "temperature", "top_k", "top_p", "stop")
_INFINITE = float("inf")
# The settings that are numbers: whole numbers with their minimum, the others with their interval.
_WHOLE = {
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "seed": 0, "max_steps": -1, "lora_rank": 1,
    "lora_alpha": 1, "prefix_tokens": 1, "moment_window": 1, "block_scales_every": 2, "calibration_rows": 1,
    "forward_batch_size": 1, "check_weights_steps": 0, "max_length": 1, "max_completion_length": 1, "top_k": 1,
    "early_stopping_patience": 1,
}  # fmt: skip
_REAL: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "learning_rate": ("positive", lambda x: 0 < x < _INFINITE),
    "num_train_epochs": ("positive", lambda x: 0 < x < _INFINITE),
    "logging_steps": ("finite and not negative", lambda x: 0 <= x < _INFINITE),
    "eval_steps": ("finite and not negative", lambda x: 0 <= x < _INFINITE),
    "save_steps": ("finite and not negative", lambda x: 0 <= x < _INFINITE),
    "beta1": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "beta2": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "informative_target": ("between 0 and 1", lambda x: 0 < x < 1),
    "temperature": ("finite and not negative", lambda x: 0 <= x < _INFINITE),
    "top_p": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "stop_below_gain": ("positive", lambda x: 0 < x < _INFINITE),
}
_OPTIONAL = (
    "learning_rate",
    "max_length",
    "top_k",
    "top_p",
    "eval_steps",
    "early_stopping_patience",
    "stop_below_gain",
)


@dataclass
class MeZOConfig(TrainingArguments):
    """`TrainingArguments` with the settings of zeroth-order optimisation. Rewards are maximised.

    Each probe is scored on one batch of `per_device_train_batch_size` · `gradient_accumulation_steps` rows. `seed` is the
    master seed of directions, sampling and the order of the data.

    Raises:
        ValueError: a setting is out of range, or belongs to backpropagation and has no meaning here.
    """

    # Defaults of TrainingArguments that differ here.
    learning_rate: float = field(  # type: ignore[assignment]  # None until the trainer has seen what is tuned
        default=None,
        metadata={
            "help": "Typical change of a weight in one step of one direction; with sgd and momentum the factor of the slope, "
            "which has no default. Default: 3e-4·√(23M/tuned parameters), half of that for LoRA, at most "
            + ", ".join(f"{scale.learning_rate:g} ({kind})" for kind, scale in SCALES.items())
            + "; with normalized, multiplied by the directions that a step averages over."
        },
    )
    lr_scheduler_type: str = field(
        default="linear", metadata={"help": "Any of transformers' schedules that is a function of the step."}
    )
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Rows that each probe is scored on. Metrics such as F1 need large batches."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "There is no gradient to clip: must stay 0."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "NaN and infinite losses are logged as they are."}
    )
    dataloader_pin_memory: bool = field(
        default=False, metadata={"help": "Batches are texts: there are no tensors to pin."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rewards receive every column."})
    logging_steps: float = field(default=10, metadata={"help": "Log every this many steps."})
    metric_for_best_model: str | None = field(
        default="reward", metadata={"help": "Evaluation metric that decides which step was best."}
    )

    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without a better held-out score. Default: never."},
    )
    stop_below_gain: float | None = field(
        default=None,
        metadata={
            "help": "Stop once doubling the forward passes would raise the held-out score by less than this, judged by the upper "
            "end of a 95% confidence interval after two evaluations in a row. Default: never."
        },
    )

    tune: str = field(
        default="full",
        metadata={
            "help": "What is tuned. full: all parameters. lora: low-rank adapters. prefix: keys and values in front of the text, "
            "which start as those of random tokens. head: the output embedding, untied from the input embedding."
        },
    )
    lora_rank: int = field(default=8, metadata={"help": "r of LoRA."})
    lora_alpha: int = field(default=16, metadata={"help": "α of LoRA: adapters are scaled by α/r."})
    lora_targets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Linear layers that get an adapter, by the end of their names, such as q_proj v_proj, or all-linear. "
            "Default: the queries and values of the attention."
        },
    )
    prefix_tokens: int = field(default=5, metadata={"help": "Number of tokens in a prefix."})
    quantize: str | None = field(
        default=None,
        metadata={
            "help": "Load the model with int8 weights (needs torchao) or int4 weights (bitsandbytes); with tune=lora or prefix. "
            "A model that was saved quantised needs no flag. Default: none."
        },
    )
    epsilon: str = field(  # type: ignore[assignment]  # likewise
        default=None,
        metadata={
            "help": "Size of the perturbation: a number, or 'auto' to keep probes informative. Default: "
            + ", ".join(f"{scale.epsilon} ({kind})" for kind, scale in SCALES.items())
            + ", depending on what is tuned."
        },
    )
    n_spsa: str = field(
        default="auto",
        metadata={
            "help": "Directions per step: a number, or a schedule such as '2-8/1000'. Default: "
            f"{DIRECTIONS} with estimator=one_sided, otherwise 1."
        },
    )
    distribution: str = field(
        default="rank1",
        metadata={
            "help": "Distribution of the direction z: rank1 or rank4 (sums of products of signs), rademacher (±1) or gaussian "
            "(the paper's)."
        },
    )
    evaluation: str = field(
        default="auto",
        metadata={
            "help": "How points around the model are evaluated. twin: all points of a step in one forward pass, along rank1 and "
            "rank4 directions; scratch: one after another, along any direction. auto: twin where the direction allows it."
        },
    )
    update: str = field(
        default="normalized",
        metadata={
            "help": "normalized: steps of size learning_rate whatever the reward's scale. sgd: MeZO's own. momentum, adam: "
            "with moving averages of past gradients."
        },
    )
    estimator: str = field(
        default="auto",
        metadata={
            "help": "one_sided: one forward pass per direction, compared with the step's other directions. spsa: two forward "
            "passes, on either side of the model. Default: one_sided; with a judge, or one direction per step, spsa. one_point: "
            "one forward pass per direction, compared with the step before. variance_spsa, expectation_spsa: blocks of "
            "parameters are perturbed by scales of their own, and the estimate is unbiased or preconditioned by them. "
            "forward_gradient: the slope itself, for losses that can be differentiated."
        },
    )
    block_scales: str = field(
        default="parameter_norms",
        metadata={
            "help": "Scales of variance_spsa and expectation_spsa: parameter_norms, or gradient_norms, which are measured with "
            "two forward passes per parameter tensor."
        },
    )
    block_scales_every: int = field(
        default=1000,
        metadata={"help": "Steps between updates of these scales; gradient_norms uses a whole step for each."},
    )
    beta1: float = field(
        default=0.9, metadata={"help": "update=momentum and adam: decay of the moving average of gradients, per step."}
    )
    beta2: float = field(
        default=0.95, metadata={"help": "update=adam: decay of the moving average of squared gradients, per step."}
    )
    moment_window: int = field(
        default=64,
        metadata={
            "help": "Past steps in a recomputed average: each step draws this many times its directions, and leaves out beta to "
            "this power."
        },
    )
    moments: str = field(
        default="recomputed",
        metadata={
            "help": "How the moving averages are obtained: recomputed from the log, which takes no memory of the model's size, "
            "or stored, in one float32 copy of what is tuned (momentum) or two (adam)."
        },
    )
    comparison: str = field(
        default="share",
        metadata={
            "help": "What a judge's verdicts say about the difference of two sides: share (the mean preference), logit (the "
            "shrunk estimate of a logistic rater) or sign (only the majority)."
        },
    )
    informative_target: float = field(
        default=0.8, metadata={"help": "Share of directions that find a difference, which epsilon=auto maintains."}
    )
    parameters: list[str] | None = field(
        default=None, metadata={"help": "Tune only the parameters that match these shell patterns, such as '*.bias'."}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "For a model given by name: float32, bfloat16, float16, or auto (as it was saved)."},
    )
    device_map: str | None = field(
        default=None,
        metadata={
            "help": "For a model given by name that is larger than a device: auto spreads it over the GPUs, and what they cannot "
            "hold over CPU and disk (see accelerate); weights on disk are only read, not tuned. Default: one device."
        },
    )
    label_column: str = field(
        default="label",
        metadata={
            "help": "Column with the true label: minibatches keep its proportions. With options, the text of the right one; with "
            "loss=cross_entropy and neither label words nor options, the text to generate."
        },
    )
    label_reward: str = field(
        default="expected",
        metadata={
            "help": "Prompts with label words or options: 'expected' is the expected reward under their probabilities, which "
            "changes with every perturbation (rewards of a whole set, such as F1, are called 8 times per side); 'best' is the "
            "reward of the most likely one."
        },
    )
    calibration: str = field(
        default="auto",
        metadata={
            "help": "Where tuning starts. Label words: 'head': a linear head on the model's last state, tuned by MeZO before the "
            "model is, on the likelihood of the labels that the reward favours (a reward of a whole set is called for each label "
            "of each row); 'bias': one fitted bias per label, a threshold (about 100 calls per label). Classifiers: 'probe': "
            "logistic regression on the true labels sets the head's last layer. 'none': neither. 'auto': 'head', and 'probe' "
            "for a classifier whose head is new."
        },
    )
    calibration_rows: int = field(
        default=1024, metadata={"help": "Maximum training rows that this start is fitted to."}
    )
    check_weights_steps: int = field(
        default=0,
        metadata={"help": "With several processes: compare their weights by SHA-256 every this many steps, and at the end. 0: "
                  "only at the end."},
    )  # fmt: skip
    forward_batch_size: int = field(
        default=64,
        metadata={"help": "Maximum inputs per forward pass; halved when memory runs out. Results do not depend on it."},
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Maximum tokens of a prompt; longer texts are cut. Default: as many as the model takes."},
    )
    max_completion_length: int = field(
        default=64, metadata={"help": "Maximum tokens to generate, or to teach with loss=cross_entropy."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; 0 decodes greedily."})
    top_k: int | None = field(default=None, metadata={"help": "Sample among the k most likely tokens."})
    top_p: float | None = field(
        default=None, metadata={"help": "Sample among the most likely tokens with this total probability."}
    )
    stop: str | None = field(
        default=None,
        metadata={
            "help": "Generated answers end before this text, such as \\n for a line break; loss=cross_entropy teaches it as "
            "their end. '': no such text. Default: the task's, or none."
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per reward function. Default: 1 each."}
    )

    def __post_init__(self) -> None:
        self._refuse_backpropagation()  # before transformers asks a device for it
        self._check_what_is_tuned()
        self._left_open = [name for name in ("estimator", "n_spsa") if getattr(self, name) == "auto"]
        self._decide(judged=False)
        self._check_numbers()  # before transformers computes with them
        if not isinstance(self.stop, str | None):
            raise ValueError(f"stop must be a text, got {self.stop!r}")
        self.stop = self.stop or None
        super().__post_init__()
        # `accelerate launch` may ask for fp16, whose scaler, which only a GPU gets, refuses a step without gradients.
        self.mixed_precision = "no"
        for name in ("early_stopping_patience", "stop_below_gain"):
            if getattr(self, name) is not None and self.eval_strategy == "no":
                raise ValueError(
                    f"{name} needs held-out scores, and there are no evaluations: set eval_strategy='steps', or leave it out"
                )
        if self.epsilon != "auto":
            try:
                self.epsilon_value: Any = float(self.epsilon)
            except (ValueError, TypeError, OverflowError):
                raise ValueError(f"epsilon must be a positive number or 'auto', got {self.epsilon!r}") from None
            if not 0 < self.epsilon_value < float("inf"):
                raise ValueError(f"epsilon must be a positive number or 'auto', got {self.epsilon!r}")
        else:
            self.epsilon_value = "auto"
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {self.distribution!r}")
        if self.evaluation not in ("auto", "twin", "scratch"):
            raise ValueError(f"evaluation must be auto, twin or scratch, got {self.evaluation!r}")
        if self.evaluation == "twin" and not rank(self.distribution):
            raise ValueError(f"evaluation='twin' needs distribution='rank1' or 'rank4', got {self.distribution!r}")
        if self.evaluation == "twin" and self.estimator == "forward_gradient":
            raise ValueError(
                "evaluation='twin' stacks points, and estimator='forward_gradient' has only one: leave it at 'auto'"
            )
        if self.label_reward not in get_args(LabelReward):
            raise ValueError(f"label_reward must be 'expected' or 'best', got {self.label_reward!r}")
        if self.comparison not in COMPARISONS:
            raise ValueError(f"comparison must be one of {', '.join(COMPARISONS)}, got {self.comparison!r}")
        if self.calibration not in get_args(Calibration):
            kinds = ", ".join(get_args(Calibration))
            raise ValueError(f"calibration must be one of {kinds}, got {self.calibration!r}")
        if self.estimator not in get_args(EstimatorName):
            raise ValueError(f"estimator must be one of {', '.join(get_args(EstimatorName))}, got {self.estimator!r}")
        check_block_scales(self.block_scales, self.block_scales_every)
        Averaging(self.beta1, self.beta2, self.moment_window, self.moments)  # type: ignore[arg-type]
        directions = Directions.parse(self.n_spsa)
        if self.estimator == "one_sided" and min(directions.start, directions.end) < 2:
            raise ValueError(
                f"estimator='one_sided' compares directions with each other, and n_spsa={self.n_spsa!r} has steps with only one: "
                "use estimator='spsa', or more directions"
            )

    def _check_numbers(self) -> None:
        for name, low in _WHOLE.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not isinstance(value, numbers.Integral):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
            if int(value) < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
            if int(value) >= 2**63:
                raise ValueError(f"{name} must be below 2**63, got {value}")
        for name, (interval, inside) in _REAL.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not isinstance(value, numbers.Real) or not inside(value):  # NaN is outside every interval
                raise ValueError(f"{name} must be {interval}, got {value!r}")

    def judged(self) -> MeZOConfig:
        """A copy for a judge, which compares two sides of a direction: what was left open is decided for it."""
        args = copy.copy(self)
        for name in self._left_open:
            setattr(args, name, "auto")
        args._decide(judged=True)
        return args

    def sized(self, parameters: int) -> MeZOConfig:
        """A copy for this many tuned parameters: a learning rate that was left open becomes the one that suits them.

        It stays open for SGD and momentum, whose steps scale with the objective's slope.
        """
        if self.learning_rate is not None or not measured_in_weights(self.update):
            return self
        args = copy.copy(self)
        # As far as one direction after another would go: the rule averages over directions.
        times = Directions.parse(self.n_spsa).start if self.update == "normalized" else 1
        args.learning_rate = default_learning_rate(self.tune, parameters) * times
        return args

    @property
    def answering(self) -> dict[str, Any]:
        """The settings that decide how prompts are read and answered, by name."""
        return {name: getattr(self, name) for name in ANSWERING}

    def needed_learning_rate(self) -> float:
        """The learning rate.

        Raises:
            ValueError: it was left open, and no default suits every objective.
        """
        if self.learning_rate is None:
            raise ValueError(
                f"update={self.update!r} multiplies the objective's slope by the learning rate, so no default suits: give "
                f"learning_rate (`zorl diagnose … --update {self.update}` suggests one), or use update='normalized'"
            )
        return self.learning_rate

    def _decide(self, judged: bool) -> None:
        """Decides what was left open: the estimator and the directions per step."""
        if self.n_spsa == "auto":
            alone = judged or self.estimator not in ("auto", "one_sided")
            self.n_spsa = "1" if alone else str(DIRECTIONS)
        if self.estimator == "auto":
            directions = Directions.parse(self.n_spsa)
            several = min(directions.start, directions.end) > 1
            self.estimator = "one_sided" if several and not judged else "spsa"

    def _check_what_is_tuned(self) -> None:
        if self.tune not in SCALES:
            raise ValueError(f"tune must be one of {', '.join(SCALES)}, got {self.tune!r}")
        if self.quantize is not None and self.quantize not in PACKAGES:
            raise ValueError(f"quantize must be {' or '.join(PACKAGES)}, got {self.quantize!r}")
        self.epsilon = SCALES[self.tune].epsilon if self.epsilon is None else self.epsilon

    def _refuse_backpropagation(self) -> None:
        new_name = getattr(self, "activation_checkpointing", False)  # since transformers 5.18
        wrong = {
            "fp16": (self.fp16, "load the model in half precision with dtype='float16' instead"),
            "bf16": (self.bf16, "load the model in half precision with dtype='bfloat16' instead"),
            "fp16_full_eval": (self.fp16_full_eval, "load the model in half precision with dtype='float16' instead"),
            "bf16_full_eval": (self.bf16_full_eval, "load the model in half precision with dtype='bfloat16' instead"),
            "gradient_checkpointing": (self.gradient_checkpointing, "no activations are kept"),
            "activation_checkpointing": (new_name, "no activations are kept"),
            "max_grad_norm": (self.max_grad_norm, "there is no gradient; update='normalized' bounds each step"),
            "weight_decay": (self.weight_decay, "a decayed weight cannot be replayed from the trajectory bit for bit"),
            "deepspeed": (self.deepspeed, "one process needs no sharded optimizer states: there are none"),
            "fsdp": (self.fsdp, "one process needs no sharded gradients: there are none"),
            "label_smoothing_factor": (self.label_smoothing_factor, "rewards and losses are taken as they are"),
            "neftune_noise_alpha": (
                self.neftune_noise_alpha,
                "nothing but a probe's direction is added to the weights",
            ),
        }
        for name, (value, reason) in wrong.items():
            if value:
                raise ValueError(f"{name}={value!r} belongs to backpropagation: {reason}")
        defaults = {f.name: f.default for f in fields(TrainingArguments)}
        instead = {"optim": "update", "adam_beta1": "beta1", "adam_beta2": "beta2", "data_seed": "seed"}
        for name, own in instead.items():
            if getattr(self, name) not in (defaults[name], None):
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect here: give {own} in its place")
        if self.lr_scheduler_type in _MEASURED_SCHEDULES:
            raise ValueError(
                f"lr_scheduler_type={SchedulerType(self.lr_scheduler_type).value!r} follows measurements, and a schedule has to "
                "be a function of the step, or else a run could not be continued: choose another, such as linear or cosine"
            )
