"""transformers' Trainer without a backward pass, and with a trajectory as its checkpoint.

What Trainer does for backpropagation and has no setting for is overridden here. Weights are never saved during training:
continuing a run, or going back to its best step, replays the trajectory onto the base weights.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerState
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import IntervalStrategy, TrainOutput

from zorl import processes
from zorl.config import MeZOConfig
from zorl.mezo import MeZO
from zorl.offload import is_offloaded
from zorl.parameters import ParameterSet
from zorl.progress import Progress
from zorl.prompts import Prompt
from zorl.replay import replay
from zorl.run_folder import RunFolder
from zorl.sampling import StratifiedSampler
from zorl.stopping import Stopping
from zorl.trajectory import read
from zorl.tuned_model import TunedModel
from zorl.whole_files import whole_file, writing


class Minibatch:
    """Rows as dictionaries of raw columns. A type of its own, so that nothing searches the texts for tensors to move."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = list(rows)


class ForwardTrainer(Trainer):
    """The base of `MeZOTrainer`, which sets the attributes below before training begins."""

    args: MeZOConfig
    folder: RunFolder
    tuned_model: TunedModel
    tuned: ParameterSet
    prompt: Prompt
    mezo: MeZO | None = None
    _rewound_to: int | None = None

    def __init__(self, *, args: MeZOConfig, **options: Any) -> None:
        # A process has one GPU. Trainer would multiply the batch by the number of those that it sees, for a DataParallel that
        # is never made here.
        if args.n_gpu > 1:
            args._n_gpu = 1
        if args.should_save:  # Trainer would make the folder, but with a less helpful error
            with writing(Path(str(args.output_dir))):
                Path(str(args.output_dir)).mkdir(parents=True, exist_ok=True)
        try:
            super().__init__(args=args, data_collator=Minibatch, **options)  # type: ignore[arg-type]
        except RuntimeError as error:
            if "to be installed" not in str(error):  # a package that report_to needs
                raise
            raise ImportError(str(error)) from error
        sets = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
        if sets and self._needs_metric() and not any(self.metric.startswith(f"eval_{name}_") for name in sets):
            raise ValueError(
                f"eval_dataset has the sets {', '.join(map(str, sets))}: say whose score decides which step is the best, such as "
                f"metric_for_best_model='{sets[0]}_reward'"
            )
        # Trainer derives how it scales losses from the model's forward, which is not called here.
        self.model_accepts_loss_kwargs = False
        self.progress = Progress()
        if not args.disable_tqdm:
            self.pop_callback(ProgressCallback)
            self.add_callback(self.progress)
        if args.early_stopping_patience is not None or args.stop_below_gain is not None:
            better = args.greater_is_better is not False  # None where no metric is named
            stopping = Stopping(
                args.early_stopping_patience, args.stop_below_gain, self.metric, greater_is_better=better
            )
            self.add_callback(stopping)

    @property
    def metric(self) -> str:
        """The held-out score that decides which step is the best, by its name in the log."""
        return f"eval_{str(self.args.metric_for_best_model or 'reward').removeprefix('eval_')}"

    def _needs_metric(self) -> bool:
        """Whether something depends on the best step, or its score was asked for by name."""
        rules = (self.args.early_stopping_patience, self.args.stop_below_gain)
        asked = self.args.metric_for_best_model not in (None, "reward")
        return asked or self.args.load_best_model_at_end or any(rule is not None for rule in rules)

    # --- a run -------------------------------------------------------------------------------------------------------

    def _begin(self, header: Mapping[str, Any] | None) -> None:
        """Prepares everything but the weights for a new run (None), or for the run with this header."""
        raise NotImplementedError

    def _make_optimizer(self, not_in_base: Sequence[str]) -> MeZO:
        """The optimizer that writes the run's trajectory.

        Args:
            not_in_base: the parameters whose first values a new run saves.
        """
        raise NotImplementedError

    def _end(self) -> None:
        """Called when training has ended, however it has."""

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains, or continues a run: bitwise where an uninterrupted one would be.

        Args:
            resume_from_checkpoint: True, or the path of `output_dir`, continues the run there; the model must hold the base
                weights.

        Raises:
            FileExistsError: `output_dir` holds a run and it was not asked to continue.
            ValueError: there is nothing to continue, it is to be continued from another folder, or the update needs a learning
                rate.
            TrajectoryError: the run there is of another model or other settings, its trajectory is damaged, or another
                process is writing it.
        """
        if self.train_dataset is None:
            raise ValueError("train_dataset is needed to train")
        self.args.needed_learning_rate()
        origin = resume_from_checkpoint
        if isinstance(origin, str | Path) and Path(origin).resolve() != self.folder.path.resolve():
            raise ValueError(
                f"resume_from_checkpoint={str(origin)!r} is not output_dir, {str(self.folder.path)!r}: a run continues in its "
                "own folder, so give that as output_dir"
            )
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
        self._rewound_to = None
        try:
            header = read(self.folder.trajectory, until=0)[0] if exists else None
            self._begin(header)
            if header is not None and self.mezo is not None:
                # This trainer has run before, and the trajectory is replayed onto the base weights.
                self.folder.restore_base(header, self.model, self.tuned)  # type: ignore[arg-type]
                self.mezo = None
            if not exists and self.args.should_save:
                self.folder.state.unlink(missing_ok=True)  # of a run whose trajectory was removed
            self.create_optimizer()
            assert self.mezo is not None
            if exists:
                with processes.first_goes_ahead():
                    self.save_log(self._state_at(self.mezo.steps))
            output = super().train(str(self.folder.path) if exists else None, trial, ignore_keys_for_eval)
            self.check_processes()
            return output
        finally:
            self.progress.close()
            if self.mezo is not None:
                self.mezo.close()
            self._end()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The MeZO optimizer. Where the run's trajectory exists, this replays it onto the model."""
        if self.mezo is None:
            new = not self.folder.trajectory.exists()
            not_in_base = (
                processes.first(lambda: sorted(self.tuned_model.not_in_base(self.prompt.classes))) if new else []
            )
            with processes.first_goes_ahead():
                self.mezo = self._make_optimizer(not_in_base)
            processes.agree("the model, the data or the settings", self.mezo.header)
            if self.mezo.truncated:
                warnings.warn(f"{self.mezo.truncated}; the run continues from there", stacklevel=2)
        self.optimizer = self.mezo
        return self.mezo

    @property
    def step(self) -> int:
        """The step whose weights the model holds: the last one, or the best that it was rewound to."""
        return self._rewound_to if self._rewound_to is not None else 0 if self.mezo is None else self.mezo.steps

    def check_processes(self) -> None:
        """Checks that all processes hold the same weights, by their SHA-256.

        Raises:
            ProcessError: they do not.
        """
        if processes.count() > 1:
            processes.agree("their weights", self.tuned.sha256())

    # --- the rows ----------------------------------------------------------------------------------------------------

    @property
    def rows_per_step(self) -> int:
        """The rows that each probe is scored on: those of all processes and accumulated minibatches."""
        return self.args.per_device_train_batch_size * processes.count() * self.args.gradient_accumulation_steps

    def calibration_rows(self) -> list[dict[str, Any]]:
        """The training rows to which a start is fitted; none of a data set that is read as a stream."""
        rows: Any = self.train_dataset
        if not isinstance(rows, list):
            return []
        size = min(self.args.calibration_rows, len(rows))
        sampler = StratifiedSampler(len(rows), size, self._labels(), self.args.seed)
        return [rows[i] for i in itertools.islice(sampler, sampler.batch_size)]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Minibatches that keep the proportions of the labels, so that a metric over a batch means something."""
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if not isinstance(dataset, list):
            return super()._get_train_sampler(dataset)
        return StratifiedSampler(len(dataset), self.rows_per_step, labels=self._labels(), seed=self.args.seed)

    def _labels(self) -> list[str] | None:
        """The labels of the training rows; None where there are none."""
        rows: Any = self.train_dataset
        column = self.args.label_column
        return [str(row[column]) for row in rows] if self.prompt.labels and column in rows[0] else None

    # --- what Trainer does for backpropagation ---------------------------------------------------------------------

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        return model  # neither DataParallel nor DistributedDataParallel: there are no gradients to reduce

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        if not any(map(is_offloaded, model.parameters())):  # otherwise accelerate moves it, module by module
            super()._move_model_to_device(model, device)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], None]:
        """The minibatches of one step. No tokens are counted, because no loss is averaged over them."""
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> None:
        """There is no gradient, and looking for one takes longer than moving a small model."""

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # Trainer's formula counts a backward pass; `forwards` in the log is what a run costs

    # --- several processes -------------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # No DistributedDataParallel: there are no gradients to synchronise.
        self.accelerator.prepare_model = lambda model, **_: model
        # Every process sees the whole batch; they share the work on it.
        self.accelerator.prepare_data_loader = lambda loader, **_: prepare_data_loader(
            loader, num_processes=1, process_index=0
        )

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any
    ) -> DataLoader[Any]:
        """Each batch holds the rows of all processes."""
        return super()._get_dataloader(dataset, description, batch_size * processes.count(), *args, **kwargs)

    # --- the trajectory as the checkpoint ---------------------------------------------------------------------------

    def _state_at(self, step: int) -> TrainerState:
        """The Trainer's state at a step of the trajectory, with the log as far as it was saved.

        Raises:
            ValueError: the file with the log is damaged.
        """
        state = TrainerState()
        if self.folder.state.exists():
            try:
                state = TrainerState.load_from_json(str(self.folder.state))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{self.folder.state} is damaged ({error}): restore it from a copy, or remove it, and the run continues "
                    "without its log and without knowing its best step"
                ) from None
            state.log_history = [entry for entry in state.log_history if entry.get("step", 0) <= step]
        state.global_step = step
        self._find_best(state)
        state.train_batch_size = self._train_batch_size  # a run that was killed early has saved no state
        state.compute_steps(
            self.args, max(self.args.max_steps, 1)
        )  # evaluate and save as often as the present settings say
        return state

    def _find_best(self, state: TrainerState) -> None:
        """The best step by the evaluations in the log: the settings may name another metric now, or steps may be lost."""
        sign = -1.0 if self.args.greater_is_better is False else 1.0
        looks = [entry for entry in state.log_history if sign * entry.get(self.metric, math.nan) > -math.inf]  # nor NaN
        best: dict[str, Any] = max(looks, key=lambda entry: sign * entry[self.metric], default={})
        state.best_metric, state.best_global_step = best.get(self.metric), best.get("step")
        # A path that was right elsewhere would not be found, and the last step taken for the best.
        state.best_model_checkpoint = str(self.folder.path) if best else None

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Saves each evaluation at once: a run that is killed and continued knows its best step as if it had not been."""
        if self.metric not in metrics and self._needs_metric():
            raise ValueError(
                f"metric_for_best_model={self.args.metric_for_best_model!r}: the evaluation has no {self.metric}, but "
                f"{', '.join(metrics) or 'no scores at all'}"
            )
        better = self.metric in metrics and super()._determine_best_metric(metrics, trial)
        self._save_checkpoint(self.model, trial)
        return better

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        begin = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None:
            self.state.compute_steps(self.args, max_steps)  # intervals given as shares of all steps are known only now
            if self._evaluation_was_cut_off(num_update_steps_per_epoch):
                self._determine_best_metric(self._evaluate(trial, None), trial)
        return begin

    def _evaluate(self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False) -> Any:
        if not skip_scheduler:
            return super()._evaluate(trial, ignore_keys_for_eval)
        # Trainer skips the scheduler for `eval_on_start` alone. The start is a candidate for the best step like any other.
        if self.state.global_step or self._evaluated(0):
            return {}  # the run continues; its start has been evaluated
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        self._determine_best_metric(metrics, trial)
        return metrics

    def _evaluated(self, step: int) -> bool:
        """Whether the log has the evaluation of a step, on each data set."""
        names = [f"eval_{name}" for name in self.eval_dataset] if isinstance(self.eval_dataset, dict) else ["eval"]
        found = {name for entry in self.state.log_history if entry.get("step") == step for name in entry}
        return all(f"{name}_runtime" in found for name in names)

    def _evaluation_was_cut_off(self, steps_per_epoch: int) -> bool:
        """Whether the run was killed between a step and its evaluation. Done late, it gives the same best step."""
        step = self.state.global_step
        if not step or self._evaluated(step):
            return False
        if self.args.eval_strategy == IntervalStrategy.EPOCH:
            return step % steps_per_epoch == 0
        by_steps = self.args.eval_strategy == IntervalStrategy.STEPS
        return by_steps and (step % self.state.eval_steps == 0 or step >= self.state.max_steps)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that has finished or stopped early does not get another step.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        pass  # the trajectory was replayed when the optimizer was made

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The optimizer's state is the trajectory; the schedule is a function of the step."""
        if checkpoint is not None and self.lr_scheduler is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch expects optimizer steps before these: they were replayed
                for _ in range(self.state.global_step):
                    self.lr_scheduler.step()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        pass  # no global random state is used

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Syncs the trajectory and saves the log: a checkpoint of a few bytes, after each evaluation as well."""
        if self.mezo is not None and self.mezo.trajectory is not None:
            self.mezo.trajectory.sync()
        self.state.best_model_checkpoint = str(self.folder.path)
        self.save_log(self.state)

    def save_log(self, state: TrainerState) -> None:
        """Saves the Trainer's state atomically: a run that is killed here can read the state before."""
        if self.args.should_save:
            with whole_file(self.folder.state) as new:
                state.save_to_json(str(new))

    def _load_best_model(self) -> None:
        """Rewinds to the best evaluation: the base weights, and the trajectory up to that step."""
        step = self.state.best_global_step
        if self.mezo is None or step is None or step == self.mezo.steps:
            return
        header, records = read(self.folder.trajectory, until=step)
        self.folder.restore_base(header, self.model, self.tuned)  # type: ignore[arg-type]
        replay(header, records, self.tuned)
        self._rewound_to = step
