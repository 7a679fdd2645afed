"""MeZOTrainer: the Hugging Face Trainer that users know, without a backward pass.

`training_step` asks a probe, has it answered and tells; `optimizer.step()`, which Trainer calls next, moves θ. `MeZOConfig`
and `zorl.forward_trainer` switch off what Trainer does for backpropagation.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, SchedulerType, TrainerCallback
from transformers.trainer_utils import PredictionOutput

from zorl import offload, processes
from zorl.adapters import save
from zorl.classifier_head import ClassifierHead
from zorl.classifier_models import is_classifier, prepare_classifier
from zorl.config import MeZOConfig
from zorl.data import checked_rows, rows_sha256
from zorl.directions import canonical_name, derive_seed
from zorl.forward_gradient import DirectionalDerivative
from zorl.forward_trainer import ForwardTrainer
from zorl.goal import Goal
from zorl.head_tuning import Calibration
from zorl.judge_objective import Judge
from zorl.loss_objectives import CallableLoss, CrossEntropy, LossFunction
from zorl.mezo import MeZO
from zorl.models import load_processing_class
from zorl.objectives import Asked, Objective
from zorl.offload import is_offloaded, named_stored
from zorl.perturbation import Evaluator, Scratch
from zorl.policies import make_policy
from zorl.probe import CENTRE, Probe, Scores
from zorl.prompts import Prompt
from zorl.reward_functions import RewardError, RewardFunctions
from zorl.reward_objective import RewardObjective
from zorl.run_folder import RunFolder
from zorl.starting_point import StartingPoint
from zorl.trajectory import read
from zorl.tuned_model import TunedModel
from zorl.twin import Twin, twin_or_scratch
from zorl.whole_files import writing

_STEPS_WITHOUT_ANSWER = 10  # in a row, after which that is said; a reward that has never applied is an error


class MeZOTrainer(ForwardTrainer):
    """Maximises rewards, minimises a loss, or follows a judge, with forward passes only.

    Args:
        model: a name or path, a model, or a PeftModel.
        reward_funcs: one function or several with TRL's signature; see `zorl.reward_functions`. Exactly one of
            `reward_funcs`, `judge` and `loss` is given.
        judge: compares two completions; see `zorl.judge_objective.Judge`.
        loss: `"cross_entropy"`, or `loss(model, rows)` → a float or one per row. Cross entropy is that of the label in
            `args.label_column` among the label words or options; without these, that of the text in the column, each token
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
        args = args if args is not None else MeZOConfig(output_dir="zorl_output")
        if processes.index() > 0:
            args = copy.copy(args)
            args.disable_tqdm = True  # only the first process shows progress
        rewards = (
            None
            if reward_funcs is None
            else RewardFunctions(reward_funcs, args.reward_weights, reward_processing_classes)
        )
        self.goal = Goal(rewards, judge, loss, RewardFunctions(metrics) if metrics else None)
        prompt = prompt if prompt is not None else Prompt("{prompt}")
        args = self.goal.settings(args, prompt)
        self.tuned_model = TunedModel.prepare(model, args, prompt.classes, peft_config)
        network, self.tuned = self.tuned_model.module, self.tuned_model.parameters
        if processing_class is None:
            if not self.tuned_model.base_name:
                raise ValueError("processing_class is needed: the model has no name or path to load a tokenizer from")
            processing_class = load_processing_class(self.tuned_model.base_name)
        train_dataset = checked_rows(train_dataset, "train_dataset", prompt, args.label_column, training=True)
        if is_classifier(network):
            rows = train_dataset if isinstance(train_dataset, list) else []
            labels = [row[args.label_column] for row in rows if args.label_column in row]
            prompt = prepare_classifier(network, prompt, processing_class, labels)
            train_dataset = checked_rows(train_dataset, "train_dataset", prompt, args.label_column, training=True)
        eval_dataset = checked_rows(eval_dataset, "eval_dataset", prompt, args.label_column)
        args = args.sized(self.tuned.numel)
        super().__init__(
            model=network,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.args: MeZOConfig
        # A user's own loss may read weights in any way, and computes one point at a time in any case.
        kinds = {"twin": Twin, "scratch": Scratch, "auto": Scratch if callable(loss) else twin_or_scratch}
        self.derivative: DirectionalDerivative | None = None
        if args.estimator == "forward_gradient":
            self.derivative = DirectionalDerivative(self.model, self.tuned, args.distribution)  # type: ignore[arg-type]
            self.evaluator: Evaluator = self.derivative.evaluator
        else:
            self.evaluator = kinds[args.evaluation](self.model, self.tuned, args.distribution)  # type: ignore[operator]
        self.folder = RunFolder(Path(str(args.output_dir)))
        self._use_prompt(prompt)
        self.starting_point = StartingPoint(self.calibration_rows(), self.rows_per_step, args)
        self._batch: list[dict[str, Any]] = []
        self._mute = 0  # latest steps in a row without an answer to learn from
        self._since_log: list[dict[str, float]] = []

    # --- training ---------------------------------------------------------------------------------------------------

    def _begin(self, header: Mapping[str, Any] | None) -> None:
        """Calibrates for a new run; takes the prompt, with the label head, from one that continues."""
        self._batch, self._since_log = [], []
        if header is None and self.mezo is None:
            self.calibrate()
        elif header is not None:
            recorded = Prompt.from_dict(header["prompt"])
            if replace(recorded, label_head=None) == replace(self.prompt, label_head=None):
                self._change_prompt(recorded)  # any other difference is reported when the trajectory is read
            self.starting_point.forwards = header["calibration_forwards"]
        self.starting_point.forget()

    def _end(self) -> None:
        rest = getattr(self.goal.judge, "rest", None)
        if rest is not None:
            rest()

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Gathers the rows of accumulated minibatches, then asks one probe about all of them and tells."""
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
        if isinstance(asked.answers, Scores):  # all use the first process's numbers: others may differ in the last bit
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
        self._mute = 0 if informative else self._mute + 1
        if not informative and isinstance(self.objective, RewardObjective):
            self._check_that_rewards_apply(self.objective)
        if self._mute == _STEPS_WITHOUT_ANSWER:
            warnings.warn(
                f"in the last {self._mute} steps there was no answer to learn from (NaN losses, or only abstentions), so nothing "
                "was tuned: if the loss was fine before, the run has diverged, and a lower learning rate may help",
                stacklevel=2,
            )
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
        """The objective's answers to a probe; with forward gradients, the slopes of its losses."""
        if self.derivative is None:
            return self.objective.ask(rows, probe.points, derive_seed(self.args.seed, "noise", probe.step))
        objective = self.objective
        assert isinstance(objective, CrossEntropy | CallableLoss)
        loss, slopes = self.derivative.slopes(probe.points, lambda: objective.losses(rows, [CENTRE]).nanmean())
        return Asked(slopes, {"reward": -loss})

    def _check_that_rewards_apply(self, objective: RewardObjective) -> None:
        assert self.mezo is not None
        if self.mezo.steps >= _STEPS_WITHOUT_ANSWER and not self.mezo.informative + self.mezo.tied:
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
        """The run's evaluations of a batch so far: one for each point of a probe, and those of the calibration."""
        return self.calibration_forwards + (0 if self.mezo is None else self.mezo.forwards)

    @property
    def calibration_forwards(self) -> int:
        """The evaluations of a batch for the calibration."""
        return self.starting_point.forwards

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        continues = self.mezo is None and self.folder.trajectory.exists()
        optimizer = super().create_optimizer(model)
        recorded = read(self.folder.trajectory, until=0)[0].get("goal_sha256") if continues else None
        if recorded not in (None, self.goal.sha256()):
            warnings.warn(
                f"{self.objective_name} or a metric has changed since the run began: scores before and after may not be "
                "comparable; for a run on the present ones alone, choose another output_dir",
                stacklevel=2,
            )
        return optimizer

    def _make_optimizer(self, not_in_base: Sequence[str]) -> MeZO:
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
            header=self._header(not_in_base),
        )

    def _header(self, not_in_base: Sequence[str]) -> dict[str, Any]:
        """The settings that decide where a run goes, and how its base is rebuilt.

        Args:
            not_in_base: the parameters whose first values a new run saves.
        """
        args = self.args
        named = {canonical_name(name): values for name, _, values in named_stored(self.model)}  # type: ignore[arg-type]
        init = self.folder.keep_init(named, not_in_base, writes=processes.index() == 0)
        return {
            **self.tuned_model.header(),
            "init_sha256": init,
            "quantize": args.quantize,
            "objective": self.objective_name,
            "prompt": self.prompt.to_dict(),
            "calibration_forwards": self.calibration_forwards,
            "learning_rate": args.learning_rate,
            "label_reward": args.label_reward,
            "evaluation": type(self.evaluator).__name__.lower(),
            **args.answering,
            "rows_per_step": self.rows_per_step,
            "rows": len(self.train_dataset) if isinstance(self.train_dataset, list) else None,
            "rows_sha256": rows_sha256(self.train_dataset) if isinstance(self.train_dataset, list) else None,
            **({"eval_rows_sha256": rows_sha256(self.eval_dataset)} if isinstance(self.eval_dataset, list) else {}),
            "goal_sha256": self.goal.sha256(),
            "label_column": args.label_column,
            "reward_weights": args.reward_weights,
            "lr_scheduler_type": SchedulerType(args.lr_scheduler_type).value,
            "lr_scheduler_kwargs": args.lr_scheduler_kwargs,
            "warmup_steps": args.warmup_steps,
        }

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Model, tokenizer and prompt; no pickled arguments."""
        target = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        assert self.model is not None
        if state_dict is None and any(map(is_offloaded, self.model.parameters())):
            state_dict = offload.state_dict(self.model)
        with writing(target):
            target.mkdir(parents=True, exist_ok=True)
            save(self.model, target, self.tuned_model.not_in_checkpoint, state_dict)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(target)
        RunFolder(target).write_settings(
            {
                "prompt": self.prompt.to_dict(),
                "label_column": self.args.label_column,
                "objective": self.objective_name,
                "dtype": self.tuned_model.dtype,
                "quantize": self.args.quantize,
                **self.args.answering,
                "step": self.step,
                "weights_sha256": self.tuned.sha256(),
            }
        )

    # --- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Scores θ once over the whole split: rewards and metrics, each as `eval_<name>`, and `eval_reward`.

        Raises:
            ValueError: there is no data set, it is empty, or its rows do not suit the prompt.
        """
        dataset: Any = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(dataset, dict):
            return {
                key: value
                for name, part in dataset.items()
                for key, value in self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}").items()
            }
        if dataset is None:
            raise ValueError("eval_dataset is needed to evaluate")
        rows = checked_rows(list(dataset), "eval_dataset", self.prompt, self.args.label_column)
        if isinstance(self.objective, RewardObjective):
            self.objective.trainer_state = self.state
        start = time.perf_counter()
        figures = self.objective.evaluate(rows)
        seconds = time.perf_counter() - start
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        metrics[f"{metric_key_prefix}_forwards"] = self.forwards  # spent on tuning so far
        metrics[f"{metric_key_prefix}_runtime"] = round(seconds, 4)
        metrics[f"{metric_key_prefix}_samples_per_second"] = round(len(rows) / max(seconds, 1e-9), 3)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """The completions of θ (label names for prompts with label words)."""
        (answers,) = self.policy.answers(list(test_dataset), [CENTRE])
        return PredictionOutput([a.completion for a in answers], None, {})  # type: ignore[arg-type]

    # --- where tuning starts ---------------------------------------------------------------------------------------

    def calibrate(self, kind: Calibration | None = None) -> None:
        """Fits biases or a head for the labels to training rows.

        Those for label words are kept in the prompt and change no weight; a linear probe writes the last layer of a classifier.
        The rows count towards the run's forward passes, as batches. Nothing happens without labels or a reward, or where the
        prompt came with a head.

        Args:
            kind: "auto", "head", "bias", "probe" or "none"; by default `args.calibration`.

        Raises:
            ValueError: the kind is for another kind of model, or a probe finds no true labels, or none of some class.
        """
        chosen = kind if kind is not None else self.args.calibration
        if isinstance(self.policy, ClassifierHead):
            tuned = self.mezo is not None
            self.starting_point.probe(self.policy, chosen, new_head=self.tuned_model.new_head, tuned=tuned)
        else:
            prompt = self.starting_point.prompt(self.prompt, self.objective, chosen)
            if prompt is not self.prompt:
                self._change_prompt(prompt)

    def _change_prompt(self, prompt: Prompt) -> None:
        """Replaces the prompt, and keeps the batch size that was found to fit."""
        self.args.forward_batch_size = self.policy.forwards.batch_size
        self._use_prompt(prompt)

    def _use_prompt(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.policy = make_policy(self.evaluator, self.processing_class, prompt, self.args)
        self.objective: Objective = self.goal.objective(
            self.policy,
            label_column=self.args.label_column,
            label_reward=self.args.label_reward,  # type: ignore[arg-type]
        )
        if isinstance(self.objective, RewardObjective):
            self.objective.trainer_state = self.state  # rewards are asked before the first step, too
        self.objective_name = self.objective.name
