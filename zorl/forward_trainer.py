"""transformers' Trainer without a backward pass, with the trajectory as its checkpoint.

Here is overridden what Trainer does for backpropagation and cannot be configured not to do. Weights are never saved while
training: continuing a run, or going back to its best step, replays the trajectory onto the base weights.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.trainer_utils import IntervalStrategy

from zorl import processes
from zorl.config import MeZOConfig
from zorl.mezo import MeZO
from zorl.offload import is_away
from zorl.parameters import ParameterSet
from zorl.replay import replay
from zorl.run_folder import RunFolder
from zorl.trajectory import read
from zorl.whole_files import whole_file


class ForwardTrainer(Trainer):
    """The base of `MeZOTrainer`, which sets the attributes below before training begins."""

    args: MeZOConfig
    folder: RunFolder
    tuned: ParameterSet
    mezo: MeZO | None = None
    _rewound_to: int | None = None

    # --- what Trainer does for backpropagation ---------------------------------------------------------------------

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        return model  # neither DataParallel nor DistributedDataParallel: there are no gradients to reduce

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        if not any(map(is_away, model.parameters())):  # otherwise accelerate moves it, module by module
            super()._move_model_to_device(model, device)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], None]:
        """The minibatches of one step. There are no tokens to count, because no loss is averaged over them."""
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> None:
        """The gradient norm: there is none to log, and looking for it takes longer than moving a small model."""

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # Trainer's formula counts a backward pass; `forwards` in the log is what a run costs

    # --- several processes -------------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # Not DistributedDataParallel, which would copy gradients, and there are none.
        self.accelerator.prepare_model = lambda model, **_: model
        # Every process sees the whole batch: they share the work on it.
        self.accelerator.prepare_data_loader = lambda loader, **_: prepare_data_loader(
            loader, num_processes=1, process_index=0
        )

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any
    ) -> DataLoader[Any]:
        """The rows of a batch, those of all processes."""
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
                    "without its log and what it knew of its best step"
                ) from None
            state.log_history = [entry for entry in state.log_history if entry.get("step", 0) <= step]
        state.global_step = step
        state.train_batch_size = self._train_batch_size  # a run that was killed early has not saved a state
        state.compute_steps(
            self.args, max(self.args.max_steps, 1)
        )  # evaluate and save as often as the current settings say
        return state

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
                self._save_checkpoint(self.model, trial)
        return begin

    def _evaluation_was_cut_off(self, steps_an_epoch: int) -> bool:
        """Makes up for an evaluation that a kill prevented after its step, so that the best step is the same."""
        step = self.state.global_step
        if not step or any(e.get("step") == step and "eval_runtime" in e for e in self.state.log_history):
            return False
        if self.args.eval_strategy == IntervalStrategy.EPOCH:
            return step % steps_an_epoch == 0
        by_steps = self.args.eval_strategy == IntervalStrategy.STEPS
        return by_steps and (step % self.state.eval_steps == 0 or step >= self.state.max_steps)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that has finished or stopped early does not get one more step.
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
                warnings.simplefilter("ignore")  # torch warns of missing optimizer steps, which were replayed
                for _ in range(self.state.global_step):
                    self.lr_scheduler.step()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        pass  # no global random state is used

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Syncs the trajectory and saves the log: a checkpoint in a few bytes."""
        if self.mezo is not None and self.mezo.trajectory is not None:
            self.mezo.trajectory.sync()
        self.state.best_model_checkpoint = str(self.folder.path)
        self.save_log(self.state)

    def save_log(self, state: TrainerState) -> None:
        """Saves the Trainer's state atomically: a run that is killed here can read the previous one."""
        if self.args.should_save:
            with whole_file(self.folder.state) as new:
                state.save_to_json(str(new))

    def _load_best_model(self) -> None:
        """Rewinds to the best evaluation: base weights, and the trajectory up to there."""
        step = self.state.best_global_step
        if self.mezo is None or not step or step == self.mezo.steps:
            return
        header, records = read(self.folder.trajectory, until=step)
        self.folder.restore_base(header, self.model, self.tuned)  # type: ignore[arg-type]
        replay(header, records, self.tuned)
        self._rewound_to = step
