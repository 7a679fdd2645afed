"""MeZOTrainer: the Hugging Face Trainer that users know, without a backward pass.

`training_step` asks a probe, has it answered and tells; `optimizer.step()`, which Trainer calls next, moves θ. What
Trainer assumes of backpropagation is switched off in `MeZOConfig` and `zorl.forward_trainer`.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PredictionOutput, TrainOutput

from zorl import offload, processes
from zorl.adapters import adapt, is_peft, prepare
from zorl.classifier_head import (
    ClassifierHead,
    has_new_head,
    is_classifier,
    parameters_not_in_checkpoint,
    prepare_classifier,
)
from zorl.config import MeZOConfig
from zorl.data import checked_rows
from zorl.directions import canonical_name, derive_seed
from zorl.forward_gradient import DirectionalDerivative
from zorl.forward_trainer import ForwardTrainer
from zorl.head_tuning import Calibration, LabelGoal, fit_bias, fit_head
from zorl.linear_probe import probe
from zorl.mezo import MeZO
from zorl.models import load_model, load_processing_class
from zorl.objectives import (
    Asked,
    CallableLoss,
    CrossEntropy,
    Judge,
    LossFunction,
    Objective,
    RewardObjective,
    make_objective,
)
from zorl.offload import is_offloaded, named_stored
from zorl.parameters import ParameterSet, base_sha256, select
from zorl.perturbation import Evaluator, Scratch
from zorl.policies import make_policy
from zorl.probe import CENTRE, Probe, Scores
from zorl.progress import Progress
from zorl.prompts import Prompt
from zorl.reward_functions import RewardError, RewardFunctions
from zorl.run_folder import RunFolder, peft_to_json
from zorl.sampling import StratifiedSampler
from zorl.scoring import LabelWords
from zorl.stopping import Stopping
from zorl.trajectory import read
from zorl.twin import Twin, twin_or_scratch
from zorl.whole_files import writing

_STEPS_WITHOUT_REWARD = 10  # after which a reward that never applies is taken for a mistake


class Minibatch:
    """Rows as dictionaries of raw columns. Its own type, so that nobody walks through the texts to move tensors."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = list(rows)


class MeZOTrainer(ForwardTrainer):
    """Maximises rewards, minimises a loss, or follows a judge, with forward passes alone.

    Args:
        model: a name or path, a model, or a PeftModel.
        reward_funcs: one function or several with TRL's signature; see `zorl.reward_functions`. Exactly one of
            `reward_funcs`, `judge` and `loss` is given.
        judge: compares two completions; see `zorl.objectives.Judge`.
        loss: `"cross_entropy"`, or `loss(model, rows)` → a float or one per row. Cross entropy is that of the label in
            `args.label_column` among the label words or options; without these, of the text in that column, token by token
            given those before it (see `zorl.teacher_forcing`), and answers are then decoded greedily.
        args: settings; the default writes to `zorl_output`.
        train_dataset: rows with the columns of the prompt and of the rewards.
        eval_dataset: held-out rows, scored once over the whole split.
        processing_class: the tokenizer; by default the model's own.
        prompt: template and label words or options. By default the column `prompt` is answered with generated text. For a
            sequence-classification model it has neither; its classes are by default those that the model's configuration
            names, or the labels of the training rows.
        metrics: functions that are recorded at evaluations and never optimised.
        peft_config: tune an adapter (LoRA, prefix, …) instead of the model.
        callbacks: as in transformers.
        reward_processing_classes: tokenizers of reward models given by name, as in TRL.

    Raises:
        ValueError: arguments contradict each other, a column or a label word is missing, or a data set is empty or holds
            one class only.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any | None = None,
        *,
        judge: Judge | None = None,
        loss: str | LossFunction | None = None,
        args: MeZOConfig | None = None,
        train_dataset: Any | None = None,
        eval_dataset: Any | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        prompt: Prompt | None = None,
        metrics: Any | None = None,
        peft_config: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        reward_processing_classes: Any | None = None,
    ) -> None:
        given = [
            name
            for name, value in (("reward_funcs", reward_funcs), ("judge", judge), ("loss", loss))
            if value is not None
        ]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise ValueError(f"give exactly one of reward_funcs, judge and loss: got {found}")
        args = args if args is not None else MeZOConfig(output_dir="zorl_output")
        if processes.index() > 0:
            args = copy.copy(args)
            args.disable_tqdm = True  # the first process shows how far the run is
        if args.estimator == "forward_gradient" and processes.count() > 1:
            raise ValueError("estimator='forward_gradient' runs in one process; with several use estimator='spsa'")
        args = args.judged() if judge is not None else args
        if judge is not None and args.estimator in ("one_sided", "one_point"):
            raise ValueError(
                f"a judge compares two sides of a direction, and estimator={args.estimator!r} looks at one: use "
                "estimator='spsa', or a reward or loss in place of the judge"
            )
        if args.estimator == "forward_gradient" and loss is None:
            raise ValueError(
                f"estimator='forward_gradient' differentiates a loss, and {given[0]} has no slope: use estimator='spsa', or "
                "give a loss"
            )
        prompt = prompt if prompt is not None else Prompt("{prompt}")
        if loss == "cross_entropy" and not prompt.chooses:
            args = copy.copy(args)
            args.temperature = 0.0  # taught token by token, nothing is sampled
        name = model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", "") or "")
        if args.quantize is not None and not isinstance(model, str):
            raise ValueError(
                f"quantize={args.quantize!r} is for a model given by name: quantise this one as you load it"
            )
        network: Any = model
        if isinstance(model, str):
            placed = {} if args.device_map is None else {"device_map": args.device_map}
            network = load_model(model, args.dtype, classes=prompt.classes, quantize=args.quantize, **placed)
        in_base = {id(parameter) for parameter in network.parameters()}
        if peft_config is not None:
            if is_peft(network):
                raise ValueError("the model is a PeftModel already: leave peft_config out, or pass the base model")
            if args.tune != "full":
                raise ValueError(f"peft_config and tune={args.tune!r} both say what is tuned: leave one of them out")
            network = adapt(network, peft_config)
        network = prepare(network, args)
        self._added = [(name, p) for name, p in network.named_parameters() if id(p) not in in_base]
        if processing_class is None and not name:
            raise ValueError("processing_class is needed: the model has no name or path to load a tokenizer from")
        self.base_name = name
        processing_class = processing_class if processing_class is not None else load_processing_class(name)
        train_dataset = checked_rows(train_dataset, "train_dataset", prompt, args.label_column)
        self._new_head, self._not_in_checkpoint = False, set[str]()  # of a classifier
        if is_classifier(network):
            rows = train_dataset if isinstance(train_dataset, list) else []
            labels = [row[args.label_column] for row in rows if args.label_column in row]
            prompt = prepare_classifier(network, prompt, processing_class, labels)
            train_dataset = checked_rows(train_dataset, "train_dataset", prompt, args.label_column)
            self._new_head, self._not_in_checkpoint = has_new_head(network), parameters_not_in_checkpoint(network)
        eval_dataset = checked_rows(eval_dataset, "eval_dataset", prompt, args.label_column)
        self.tuned = ParameterSet(select(network, args.parameters))
        args = args.sized(self.tuned.numel)
        # A process has one GPU. Trainer would multiply the batch by all it sees, for a DataParallel that nobody makes here.
        if args.n_gpu > 1:
            args._n_gpu = 1
        if args.should_save:  # Trainer makes the folder, and says less where it cannot
            with writing(Path(str(args.output_dir))):
                Path(str(args.output_dir)).mkdir(parents=True, exist_ok=True)
        try:
            super().__init__(
                model=network,
                args=args,
                data_collator=Minibatch,  # type: ignore[arg-type]
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
            )
        except RuntimeError as error:
            if "to be installed" not in str(error):  # what report_to names
                raise
            raise ImportError(str(error)) from error
        self.args: MeZOConfig
        self.progress = Progress()
        if not args.disable_tqdm:
            self.pop_callback(ProgressCallback)
            self.add_callback(self.progress)
        if args.early_stopping_patience is not None or args.stop_below_gain is not None:
            self.add_callback(Stopping(args.early_stopping_patience, args.stop_below_gain))
        # A loss of the user's own may read weights in any way, and computes one point at a time anyhow.
        kinds = {"twin": Twin, "scratch": Scratch, "auto": Scratch if callable(loss) else twin_or_scratch}
        self.derivative: DirectionalDerivative | None = None
        if args.estimator == "forward_gradient":
            self.derivative = DirectionalDerivative(self.model, self.tuned, args.distribution)  # type: ignore[arg-type]
            self.evaluator: Evaluator = self.derivative.evaluator
        else:
            self.evaluator = kinds[args.evaluation](self.model, self.tuned, args.distribution)  # type: ignore[operator]
        self.folder = RunFolder(Path(str(args.output_dir)))
        self._goal: dict[str, Any] = {
            "rewards": None
            if reward_funcs is None
            else RewardFunctions(reward_funcs, self.args.reward_weights, reward_processing_classes),
            "judge": judge,
            "loss": loss,
            "metrics": RewardFunctions(metrics) if metrics else None,
        }
        self._use_prompt(prompt)
        self._batch: list[dict[str, Any]] = []
        self._since_log: list[dict[str, float]] = []
        self.mezo: MeZO | None = None
        self._rewound_to: int | None = None
        self.calibration_forwards = 0
        self._goal_of_labels: LabelGoal | None = None
        # Trainer derives how it scales losses from the model's forward, which is not called here.
        self.model_accepts_loss_kwargs = False

    # --- training ---------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains, or continues a run: bitwise where an uninterrupted one would be.

        Args:
            resume_from_checkpoint: True continues the run in `output_dir`; the model must hold the base weights.

        Raises:
            FileExistsError: `output_dir` holds a run and it was not asked to continue.
            ValueError: there is nothing to continue, or the update needs a learning rate.
            TrajectoryError: the run there is of another model or other settings, its trajectory is damaged, or another
                process is writing it.
        """
        if self.train_dataset is None:
            raise ValueError("train_dataset is needed to train")
        self.args.needed_learning_rate()
        with self.folder.claimed() if processes.index() == 0 else contextlib.nullcontext():
            return self._train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _train(self, resume_from_checkpoint: Any, trial: Any, ignore_keys_for_eval: list[str] | None) -> TrainOutput:
        exists = self.folder.trajectory.exists()
        processes.agree(f"whether {self.folder.trajectory} exists (they must share output_dir)", exists)
        if exists and not resume_from_checkpoint:
            raise FileExistsError(
                f"{self.folder.trajectory} holds a run: continue it with resume_from_checkpoint=True, or choose "
                "another output_dir"
            )
        if resume_from_checkpoint and not exists:
            raise ValueError(f"there is no run to continue: {self.folder.trajectory} does not exist")
        self._batch, self._since_log, self._rewound_to = [], [], None
        try:
            if exists:
                self._resume_prompt()
                self._forget_run()
            elif self.mezo is None:
                self.calibrate()
            self._goal_of_labels = None  # of the weights as they were
            self.create_optimizer()
            assert self.mezo is not None
            if not exists:
                output = super().train(None, trial, ignore_keys_for_eval)
                self.check_processes()
                return output
            with processes.first_goes_ahead():
                self.save_log(self._state_at(self.mezo.steps))
            output = super().train(str(self.folder.path), trial, ignore_keys_for_eval)
            self.check_processes()
            return output
        finally:
            self.progress.close()
            if self.mezo is not None:
                self.mezo.close()

    def _forget_run(self) -> None:
        """Base weights again, where this very trainer has run before: they are what the trajectory is replayed onto."""
        if self.mezo is not None:
            header, _ = read(self.folder.trajectory, until=0)
            self.folder.restore_base(header, self.model, self.tuned)  # type: ignore[arg-type]
            self.mezo = None

    def _resume_prompt(self) -> None:
        """The run's prompt, with the label head that it started from."""
        header, _ = read(self.folder.trajectory, until=0)
        recorded = Prompt.from_dict(header["prompt"])
        if replace(recorded, label_head=None) == replace(self.prompt, label_head=None):
            self._change_prompt(recorded)  # where it differs in more, the trajectory says so
        self.calibration_forwards = header["calibration_forwards"]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Gathers the rows of accumulated minibatches, then asks one probe on all of them and tells."""
        assert self.mezo is not None
        self._batch += inputs.rows
        zero = torch.zeros((), device=self.args.device)
        if not self.accelerator.sync_gradients:
            return zero
        rows, self._batch = self._batch, []
        if isinstance(self.objective, RewardObjective):
            self.objective.trainer_state = self.state
        probe, sent_before = self.mezo.ask(), processes.exchanged_bytes
        asked = self._ask(rows, probe)
        if isinstance(asked.answers, Scores):  # one process's numbers for all: another's may differ in the last bit
            scores = asked.answers.values
            told = processes.first(lambda: scores.tolist())
            asked = replace(asked, answers=Scores(torch.tensor(told, dtype=scores.dtype)))
        record = self.mezo.tell(probe.id, asked.answers)
        figures = dict(asked.figures)
        if processes.count() > 1:
            figures["exchanged_bytes"] = processes.exchanged_bytes - sent_before
        if isinstance(asked.answers, Scores):
            figures["reward"] = asked.answers.values.nanmean().item()
        informative = [abs(g) for g in record.projected if not math.isnan(g)]
        if not informative and isinstance(self.objective, RewardObjective):
            self._check_that_rewards_apply(self.objective)
        if informative:
            figures["projected_gradient"] = sum(informative) / len(informative)
        if informative and self.derivative is None:
            figures["loss_difference"] = figures["projected_gradient"] * self.mezo.estimator.sides * probe.epsilon
        self._since_log.append(figures)
        if self.args.check_weights_steps and not self.mezo.steps % self.args.check_weights_steps:
            self.check_processes()
        reward = figures.get("reward", math.nan)
        return zero - (0.0 if math.isnan(reward) else reward)

    def _ask(self, rows: list[dict[str, Any]], probe: Probe) -> Asked:
        """The objective's answers to a probe; with forward gradients the slopes of its losses."""
        if self.derivative is None:
            return self.objective.ask(rows, probe.points, derive_seed(self.args.seed, "noise", probe.step))
        objective = self.objective
        assert isinstance(objective, CrossEntropy | CallableLoss)
        loss, slopes = self.derivative.slopes(probe.points, lambda: objective.losses(rows, [CENTRE]).nanmean())
        return Asked(slopes, {"reward": -loss})

    def check_processes(self) -> None:
        """Checks that all processes hold the same weights, by their SHA-256.

        Raises:
            ProcessError: they do not.
        """
        if processes.count() > 1:
            processes.agree("their weights", self.tuned.sha256())

    def _check_that_rewards_apply(self, objective: RewardObjective) -> None:
        assert self.mezo is not None
        if self.mezo.steps >= _STEPS_WITHOUT_REWARD and not self.mezo.informative + self.mezo.tied:
            raise RewardError(
                f"after {self.mezo.steps} batches there is no reward to follow: "
                f"{' and '.join(map(repr, objective.rewards.names))} returned None for every row"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the figures of the steps since the last log."""
        if "learning_rate" in logs and self.mezo is not None:
            for name in sorted({name for figures in self._since_log for name in figures}):
                values = [f[name] for f in self._since_log if name in f and not math.isnan(f[name])]
                if values:
                    logs[name] = sum(values) / len(values)
            logs["informative_share"] = self.mezo.recent_informative_share
            logs["epsilon"] = self.mezo.epsilon.value
            logs["forwards"] = self.forwards
            self._since_log = []
        super().log(logs, start_time)

    @property
    def forwards(self) -> int:
        """Evaluations of a batch that the run has spent: one for each point of a probe, and those of the calibration."""
        return self.calibration_forwards + (0 if self.mezo is None else self.mezo.forwards)

    @property
    def step(self) -> int:
        """The step whose weights the model holds: the last one, or the best that it was rewound to."""
        return self._rewound_to if self._rewound_to is not None else 0 if self.mezo is None else self.mezo.steps

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The MeZO optimizer. Where the run's trajectory exists, this replays it onto the model."""
        if self.mezo is None:
            with processes.first_goes_ahead():
                self.mezo = self._make_optimizer()
            processes.agree("the model, the data or the settings", self.mezo.header)
            if self.mezo.truncated:
                print(f"{self.mezo.truncated}; continuing from there")
        self.optimizer = self.mezo
        return self.mezo

    def _make_optimizer(self) -> MeZO:
        args = self.args
        self.folder.path.mkdir(parents=True, exist_ok=True)
        return MeZO(
            self.tuned.items(),
            lr=args.needed_learning_rate(),
            epsilon=args.epsilon_value,
            n_spsa=args.n_spsa,
            distribution=args.distribution,  # type: ignore[arg-type]
            update=args.update,  # type: ignore[arg-type]
            beta1=args.beta1,
            beta2=args.beta2,
            moment_window=args.moment_window,
            moments=args.moments,  # type: ignore[arg-type]
            seed=args.seed,
            informative_target=args.informative_target,
            estimator=args.estimator,  # type: ignore[arg-type]
            block_scales=args.block_scales,  # type: ignore[arg-type]
            block_scales_every=args.block_scales_every,
            comparison=args.comparison,  # type: ignore[arg-type]
            trajectory=self.folder.trajectory,
            writes=processes.index() == 0,
            header=self._header(),
        )

    def _header(self) -> dict[str, Any]:
        """What else decides where a run goes, or how its base is rebuilt."""
        args = self.args
        named = {canonical_name(name): values for name, _, values in named_stored(self.model)}  # type: ignore[arg-type]
        first = self._not_in_base()
        init = (
            self.folder.keep_init({name: named[name] for name in first}, writes=processes.index() == 0)
            if first
            else None
        )
        return {
            "model": self.base_name,
            "peft": peft_to_json(self.model),
            "quantize": args.quantize,
            "dtype": None if peft_to_json(self.model) is None else self._dtype,  # else it is that of what is tuned
            "untied": True if args.tune == "head" and self._added else None,
            "base_sha256": base_sha256(self.model),  # type: ignore[arg-type]
            "init_sha256": init,
            "objective": self.objective_name,
            "prompt": self.prompt.to_dict(),
            "calibration_forwards": self.calibration_forwards,
            "learning_rate": args.learning_rate,
            "label_reward": args.label_reward,
            "evaluation": type(self.evaluator).__name__.lower(),
            "answers": [args.max_length, args.max_completion_length, args.temperature, args.top_k, args.top_p],
            "batch": [args.per_device_train_batch_size * processes.count(), args.gradient_accumulation_steps],
            "rows": len(self.train_dataset) if isinstance(self.train_dataset, list) else None,
        }

    def _not_in_base(self) -> set[str]:
        """What no base checkpoint holds: an adapter's parameters, a new or untied head's, those of a model made in memory."""
        made_here = peft_to_json(self.model) is not None or not self.base_name
        added = {canonical_name(name) for name, _ in self._added}
        return self._not_in_checkpoint | added | (set(self.tuned) if made_here else set())

    @property
    def _dtype(self) -> str:
        """Of the base model."""
        return str(self.model.dtype).removeprefix("torch.")  # type: ignore[union-attr]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Model, tokenizer and prompt; no pickled arguments."""
        target = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        assert self.model is not None
        if state_dict is None and any(map(is_offloaded, self.model.parameters())):
            state_dict = offload.state_dict(self.model)
        with writing(target):
            target.mkdir(parents=True, exist_ok=True)
            self.model.save_pretrained(target, state_dict=state_dict)  # type: ignore[operator]
            if self.processing_class is not None:
                self.processing_class.save_pretrained(target)
        RunFolder(target).write_settings(
            {
                "prompt": self.prompt.to_dict(),
                "label_column": self.args.label_column,
                "objective": self.objective_name,
                "dtype": self._dtype,
                "quantize": self.args.quantize,
                "max_length": self.args.max_length,
                "max_completion_length": self.args.max_completion_length,
                "temperature": self.args.temperature,
                "top_k": self.args.top_k,
                "top_p": self.args.top_p,
                "step": self.step,
                "weights_sha256": self.tuned.sha256(),
            }
        )

    # --- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Scores θ once over the whole split: rewards and metrics, each as `eval_<name>`, and `eval_reward`."""
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(dataset, dict):
            return {
                key: value
                for name, part in dataset.items()
                for key, value in self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}").items()
            }
        if dataset is None:
            raise ValueError("eval_dataset is needed to evaluate")
        rows = _as_rows(dataset)
        start = time.perf_counter()
        figures = self.objective.evaluate(rows)
        seconds = time.perf_counter() - start
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        metrics[f"{metric_key_prefix}_forwards"] = self.forwards  # spent on tuning up to here
        metrics[f"{metric_key_prefix}_runtime"] = round(seconds, 4)
        metrics[f"{metric_key_prefix}_samples_per_second"] = round(len(rows) / max(seconds, 1e-9), 3)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """The completions of θ (label names for prompts with label words)."""
        rows = _as_rows(test_dataset)
        (answers,) = self.policy.answers(rows, [CENTRE])
        return PredictionOutput([a.completion for a in answers], None, {})  # type: ignore[arg-type]

    # --- where tuning starts ---------------------------------------------------------------------------------------

    def calibrate(self, kind: Calibration | None = None) -> None:
        """Fits biases or a head for the labels to training rows.

        Those for label words are kept in the prompt and change no weight; a linear probe writes the last layer of a classifier.
        The rows count among the run's forwards, as batches. Does nothing where there are no labels, no rewards, or a head
        that the prompt came with.

        Args:
            kind: "auto", "head", "bias", "probe" or "none"; by default `args.calibration`.

        Raises:
            ValueError: it is for the other kind of model, or a probe finds no true labels, or none of a class.
        """
        asked = kind if kind is not None else self.args.calibration
        if isinstance(self.policy, ClassifierHead):
            self._calibrate_classifier(self.policy, asked)
            return
        if asked == "probe":
            raise ValueError(
                "calibration='probe' fits the head of a sequence-classification model: use 'head' or 'bias'"
            )
        kind = "head" if asked == "auto" else asked  # type: ignore[assignment]
        if kind == "none" or (self.prompt.label_head is not None and self._goal_of_labels is None):
            return
        goal = self._label_goal()
        if goal is None:
            return

        def fitted() -> dict[str, Any]:
            if kind == "bias":
                return replace(self.prompt, label_head=fit_bias(goal)).to_dict()
            with tqdm(desc="label head", unit="step", leave=False, disable=self.args.disable_tqdm) as bar:
                head = fit_head(goal, derive_seed(self.args.seed, "label head"), bar.update)
            return replace(self.prompt, label_head=head).to_dict()

        self._change_prompt(Prompt.from_dict(processes.first(fitted)))

    def _calibrate_classifier(self, policy: ClassifierHead, kind: str) -> None:
        if kind in ("head", "bias"):
            raise ValueError(f"calibration={kind!r} is for label words: use 'probe' for a classifier, or 'none'")
        sample, column = self._calibration_sample(), self.args.label_column
        labelled = bool(sample) and column in sample[0]
        if kind == "none" or (kind == "auto" and not (self._new_head and labelled)):
            return
        if not labelled:
            raise ValueError(f"calibration='probe' needs rows with true labels, and there is no column {column!r}")
        if self.mezo is not None:
            raise ValueError(
                "calibration='probe' writes weights, which a run has begun to tune: call it before train()"
            )
        probe(policy, sample, [str(row[column]) for row in sample])
        self.calibration_forwards = math.ceil(len(sample) / self._rows_a_step)

    def _calibration_sample(self) -> list[dict[str, Any]]:
        """The training rows that a start is fitted to; none of a data set that is read as a stream."""
        rows: Any = self.train_dataset
        if not isinstance(rows, list):
            return []
        size = min(self.args.calibration_rows, len(rows))
        sampler = StratifiedSampler(len(rows), size, self._labels(), self.args.seed)
        return [rows[i] for i in itertools.islice(sampler, sampler.batch_size)]

    def _label_goal(self) -> LabelGoal | None:
        """The objective on the rows that a start is fitted to, evaluated once; None where there is nothing to fit."""
        objective = self.objective
        if not isinstance(objective, RewardObjective | CrossEntropy) or not isinstance(objective.policy, LabelWords):
            return None
        if self._goal_of_labels is None and (sample := self._calibration_sample()):
            self._goal_of_labels = objective.label_goal(sample)
            self.calibration_forwards = math.ceil(len(sample) / self._rows_a_step)
        return self._goal_of_labels

    def _change_prompt(self, prompt: Prompt) -> None:
        """Another prompt, in forwards of the size that has been found to fit."""
        self.args.forward_batch_size = self.policy.forwards.batch_size
        self._use_prompt(prompt)

    def _use_prompt(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.policy = make_policy(self.evaluator, self.processing_class, prompt, self.args)
        self.objective: Objective = make_objective(
            self.policy,
            **self._goal,
            label_column=self.args.label_column,
            label_reward=self.args.label_reward,  # type: ignore[arg-type]
        )
        if isinstance(self.objective, RewardObjective):
            self.objective.trainer_state = self.state  # rewards are asked before the first step, too
        self.objective_name = self.objective.name

    # --- parts ------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Minibatches that keep the proportions of the labels, so that a metric over a batch means something."""
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if not isinstance(dataset, list):
            return super()._get_train_sampler(dataset)
        return StratifiedSampler(len(dataset), self._rows_a_step, labels=self._labels(), seed=self.args.seed)

    def _labels(self) -> list[str] | None:
        """The labels of the training rows, where there are any."""
        rows: Any = self.train_dataset
        column = self.args.label_column
        return [str(row[column]) for row in rows] if self.prompt.labels and column in rows[0] else None

    @property
    def _rows_a_step(self) -> int:
        return self.args.per_device_train_batch_size * processes.count() * self.args.gradient_accumulation_steps


def _as_rows(dataset: Any) -> list[dict[str, Any]]:
    return dataset if isinstance(dataset, list) else list(dataset)
