"""The files of a run: what is in its folder, and how the base weights are restored.

trajectory.zorl      every step; with the base weights it gives the trained weights
init.safetensors     first values that the base checkpoint does not hold: adapters, new heads, weights changed in memory
trainer_state.json   the Trainer's log, for resuming it
zorl.json            prompt, label words and objective, so that `zorl eval --model out` needs none of them
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from zorl.adapters import adapt, untie_output_embedding
from zorl.directions import canonical_name
from zorl.models import load_model
from zorl.offload import named_stored
from zorl.output_bias import add_output_bias
from zorl.parameters import ParameterSet, base_sha256, select, tensors_sha256
from zorl.trajectory import TrajectoryError, read
from zorl.whole_files import read_json, whole_file, write_json, writing


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trajectory = path / "trajectory.zorl"
        self.init = path / "init.safetensors"
        self.state = path / "trainer_state.json"
        self.settings = path / "zorl.json"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Reserves the folder for this run during the block, and makes it where it does not exist.

        Raises:
            TrajectoryError: another run is using it.
            OSError: it cannot be written.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / "run.lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                raise TrajectoryError(
                    f"another run is writing {self.path}; stop it, or choose another output folder"
                ) from None
        try:
            yield
        finally:
            lock.release()

    @torch.no_grad()
    def keep_init(
        self, named: Mapping[str, torch.Tensor], names: Collection[str], *, writes: bool = True
    ) -> str | None:
        """Saves the first values of a new run's parameters; the parameters of a run that continues get theirs back.

        Args:
            named: the model's parameters by canonical name.
            names: those whose first values a new run saves: the base checkpoint does not hold them.
            writes: False where another process saves them.

        Returns:
            The SHA-256 of what is saved; None where nothing is.

        Raises:
            TrajectoryError: the run has a trajectory, but its first values are gone or damaged.
            OSError: they could not be written.
        """
        header: dict[str, Any] = {}
        if self.trajectory.exists():
            header = read(self.trajectory, until=0)[0]
            if header["init_sha256"] is None:
                return None
        elif not names:
            return None
        elif writes:  # a file left by a run that never made a step is overwritten
            with whole_file(self.init) as new:
                save_file({name: named[name].detach().contiguous().clone() for name in names}, new)
        tensors = self._read_init(header)
        found = {name: (named[name].shape, named[name].dtype) for name in tensors.keys() & named.keys()}
        if found == {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}:
            for name, tensor in tensors.items():
                named[name].copy_(tensor)
        return tensors_sha256(tensors)  # where the model has other parameters, the trajectory says which

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        write_json(self.settings, settings)

    def read_settings(self) -> dict[str, Any]:
        """The settings that a run saved; empty for a folder without a run.

        Raises:
            ValueError: the file is damaged.
        """
        if not self.settings.is_file():
            return {}
        settings: dict[str, Any] = read_json(self.settings, "run the same command again, which rewrites it")
        return settings

    @torch.no_grad()
    def restore_base(self, header: Mapping[str, Any], model: torch.nn.Module, parameters: ParameterSet) -> None:
        """Writes the base weights back into the tuned parameters and those that the base checkpoint lacks.

        Raises:
            TrajectoryError: the result is not what the run started from.
        """
        base = {} if header["init_sha256"] is None else self._read_init(header)
        if rest := parameters.keys() - base.keys():
            dtype = str(next(iter(parameters.values())).dtype).removeprefix("torch.")
            loaded = load_model(header["model"], dtype, classes=header["prompt"].get("classes"))
            found = {canonical_name(name): tensor for name, tensor in loaded.named_parameters()}
            base |= {name: found[name] for name in rest}
        named = {canonical_name(name): values for name, _, values in named_stored(model)}
        for name, tensor in base.items():
            named[name].copy_(tensor)
        check_base(header, model)

    def _read_init(self, header: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        if not self.init.is_file():
            raise TrajectoryError(f"{self.init} is missing: it holds the tuned parameters' first values")
        try:
            tensors = load_file(self.init)
        except (SafetensorError, ValueError) as error:
            raise TrajectoryError(
                f"{self.init} is damaged ({error}): it holds the tuned parameters' first values, restore it from a copy"
            ) from None
        if header.get("init_sha256") not in (None, tensors_sha256(tensors)):
            raise TrajectoryError(f"{self.init} is not the file that the run was started with: its SHA-256 differs")
        return tensors

    def rebuild(self, header: Mapping[str, Any], model: str | None = None) -> tuple[Any, ParameterSet]:
        """The run's model with its base weights, and the tuned parameters.

        Args:
            model: name or path of the base model; by default the one in the header.

        Raises:
            TrajectoryError: the base is another model than the run's, or has other weights or shapes.
        """
        recorded = {name: dtype for name, _, dtype in header["parameters"]}
        name = model or header["model"]
        if not name:
            raise TrajectoryError("the run's model was made in memory: build it in a script and use zorl.replay.replay")
        classes = header["prompt"].get("classes")
        dtype = header.get("dtype") or next(iter(recorded.values()))
        loaded: Any = load_model(name, dtype, classes=classes, quantize=header.get("quantize"))
        if header["peft"] is not None:
            from peft import get_peft_config

            loaded = adapt(loaded, get_peft_config(dict(header["peft"])))
        if header.get("untied"):
            untie_output_embedding(loaded)
        if header.get("output_bias"):
            add_output_bias(loaded)
        available = dict(select(loaded))
        if missing := recorded.keys() - {canonical_name(n) for n in available}:
            raise TrajectoryError(
                f"{name!r} is not the base of the run: it lacks {len(missing)} of its parameters, such as {min(missing)!r}"
            )
        tuned = ParameterSet((n, p) for n, p in available.items() if canonical_name(n) in recorded)
        if header["init_sha256"] is not None:
            named = {canonical_name(n): p for n, p in loaded.named_parameters()}
            with torch.no_grad():
                for key, tensor in self._read_init(header).items():
                    if named[key].shape != tensor.shape:
                        raise TrajectoryError(
                            f"{key!r} has shape {list(tensor.shape)} in the run and {list(named[key].shape)} in {name!r}: the "
                            "run began with a model that was changed in memory. Give the folder of such a model, or build it in "
                            "a script and use zorl.replay.replay"
                        )
                    named[key].copy_(tensor)
        check_base(header, loaded)
        return loaded, tuned


def check_base(header: Mapping[str, Any], model: torch.nn.Module) -> None:
    """Raises TrajectoryError unless the model's weights are those that the run started from."""
    found = base_sha256(model)
    if found != header["base_sha256"]:
        raise TrajectoryError(
            f"the base weights differ from the run's: their SHA-256 is {found[:16]}…, the trajectory's is "
            f"{header['base_sha256'][:16]}… (base model {header['model']!r})"
        )
