"""The log that is the checkpoint: (base weights, trajectory) → weights, bit for bit.

A direction is a seed, and seeds follow from the master seed, so a step is given by two bfloat16 numbers per direction: the
measured projected gradient (NaN: abstained, 0: a tie) and the applied coefficient. 20,000 steps take 85 kB. Everything
else — moments, ε, the informative share — is a pure function of these.

File layout, all little-endian::

    b"ZORL" · u32 n · n bytes of zlib-compressed JSON (the header) · u32 CRC-32 of everything before
    blocks of 16 steps: per direction bf16 g, bf16 c; per direction f32 loss, with the one-point estimator
                        · u32 CRC-32, chained with the block before

The last block may hold fewer steps; its checksum moves along as it grows. So a flipped bit is detected anywhere, and a
write cut short by a power failure costs at most the steps of its own block.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from zorl.block_scales import measures
from zorl.directions import derive_seed
from zorl.parameters import ParameterSet
from zorl.schedules import Directions
from zorl.whole_files import whole_file, writing
from zorl.wording import counted

SCHEMA = 1
_MAGIC = b"ZORL"
_STEPS_PER_BLOCK = 16
# Settings that the headers of earlier versions lack: what they were is not known.
_RECORDED_LATER = {
    "rows_sha256",
    "eval_rows_sha256",
    "label_column",
    "reward_weights",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
}
_U32 = struct.Struct("<I")


class TrajectoryError(ValueError):
    """A trajectory is damaged, or belongs to another model or run than the one it is used with."""


@dataclass(frozen=True, slots=True)
class Record:
    """One committed step: per direction the measured projected gradient and the applied coefficient (bfloat16 values).

    Attributes:
        losses: per direction what the estimator has to remember (float32 values); empty for most estimators.
    """

    projected: tuple[float, ...]
    coefficients: tuple[float, ...]
    losses: tuple[float, ...] = ()

    def __bytes__(self) -> bytes:
        pairs = torch.tensor([self.projected, self.coefficients], dtype=torch.float32).bfloat16().float().T.numpy()
        words = np.ascontiguousarray(pairs).view(np.uint32) >> 16
        words[np.isnan(pairs)] = 0x7FC0  # the bits of torch's NaN differ between machines
        losses = np.array(self.losses, dtype="<f4")
        losses[np.isnan(losses)] = np.nan
        return words.astype("<u2").tobytes() + losses.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, directions: int | None = None) -> Record:
        """Decodes a record of `directions` directions followed by losses; None: there are no losses."""
        pairs = data if directions is None else data[: 4 * directions]
        words = np.frombuffer(pairs, dtype="<u2").astype(np.uint32) << 16
        values = words.view(np.float32).tolist()
        losses = np.frombuffer(data[len(pairs) :], dtype="<f4").tolist()
        return cls(tuple(values[0::2]), tuple(values[1::2]), tuple(losses))


class Trajectory:
    """A trajectory file open for appending. A lock file beside it keeps others from opening it too.

    Use `create` or `resume`, and `read` only to read.
    """

    def __init__(self, path: Path, header: dict[str, Any], records: list[Record], lock: FileLock) -> None:
        self.path = path
        self.header = header
        self.records = records
        self._lock = lock
        self._file = path.open("r+b", buffering=0)  # closed when the run ends
        # The open block: where it starts, its steps so far, and the checksum that it continues. The header's size and checksum
        # are read, not recomputed: another version of zlib may pack the header into another number of bytes.
        self._start = 8 + _U32.unpack(self._file.read(8)[4:])[0] + 4
        self._file.seek(self._start - 4)
        self._open, self._chain = b"", _U32.unpack(self._file.read(4))[0]
        self._open_steps = 0
        for record in records:
            self._take(bytes(record))

    @classmethod
    def create(cls, path: str | Path, header: Mapping[str, Any]) -> Trajectory:
        """A new, empty trajectory.

        Raises:
            FileExistsError: the file exists; resume it or remove it.
            TrajectoryError: another run is writing it.
            OSError: it could not be written; no file is left behind.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(path)
        try:
            if path.exists():
                raise FileExistsError(f"{path} exists: resume that run, or remove the file to start again")
            with whole_file(path) as new:  # a run that is killed here leaves no half-written header
                new.write_bytes(_encode_header(dict(header)))
            return cls(path, dict(header), [], lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def resume(cls, path: str | Path) -> tuple[Trajectory, str | None]:
        """The trajectory at `path`, truncated after its last intact step, and what was cut off (None: nothing).

        Raises:
            TrajectoryError: the header or a block before the last one is damaged, or another run is writing it.
        """
        path = Path(path)
        lock = _locked(path)
        try:
            header, records, damage, intact = _parse(path)
            if damage is not None and not damage.tail:
                raise TrajectoryError(str(damage))
            trajectory = cls(path, header, records, lock)
            os.truncate(path, intact)
            return trajectory, None if damage is None else str(damage)
        except BaseException:
            lock.release()
            raise

    def append(self, record: Record) -> None:
        """Commits a step. Once this returns, a killed process does not lose it (`sync` protects against a power failure too).

        Raises:
            OSError: it could not be written, as on a full disk. The file is as it was, and the step is not committed.
        """
        before = (self._start, self._open, self._chain, self._open_steps)
        position, old_checksum = self._start + len(self._open), self._checksum() if self._open_steps else b""
        data = bytes(record)
        self._take(data)
        checksum = self._checksum() if self._open_steps else _U32.pack(self._chain)
        try:
            self._write(position, data + checksum)
        except OSError as error:
            self._start, self._open, self._chain, self._open_steps = before
            self._write(position, old_checksum)  # overwrites bytes that the file already has: needs no space
            self._file.truncate(position + len(old_checksum))
            raise OSError(
                error.errno,
                f"{error.strerror}; step {len(self.records) + 1} is not committed, free space and resume",
                str(self.path),
            ) from error
        self.records.append(record)

    def sync(self) -> None:
        """Returns once every appended step is on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Syncs, closes and unlocks. Closing twice is harmless."""
        if not self._file.closed:
            self.sync()
            self._file.close()
            self._lock.release()

    def _write(self, position: int, data: bytes) -> None:
        self._file.seek(position)
        if self._file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _take(self, data: bytes) -> None:
        self._open += data
        self._open_steps += 1
        if self._open_steps == _STEPS_PER_BLOCK:
            self._start += len(self._open) + 4
            self._chain = zlib.crc32(self._open, self._chain)
            self._open, self._open_steps = b"", 0

    def _checksum(self) -> bytes:
        return _U32.pack(zlib.crc32(self._open, self._chain))


@dataclass(frozen=True, slots=True)
class Damage:
    """Where a file stops being intact."""

    path: Path
    intact_steps: int
    tail: bool  # in the last block, as after a write that was cut short

    def __str__(self) -> str:
        return (
            f"{self.path}: what follows step {self.intact_steps} fails its checksum "
            f"({'a write was cut short, or a bit flipped' if self.tail else 'a bit flipped, or it was edited'}); "
            f"the first {self.intact_steps} steps are intact"
        )


def read(path: str | Path, until: int | None = None) -> tuple[dict[str, Any], list[Record]]:
    """The header and the first `until` steps (None: all).

    Raises:
        TrajectoryError: the file is not a trajectory, is damaged within these steps, or has fewer.
    """
    header, records, damage, _ = _parse(Path(path))
    if damage is not None and (until is None or until > len(records)):
        raise TrajectoryError(
            f"{damage}: replay them with --until {len(records)}, or resume the run to repeat the rest"
        )
    if until is not None and not 0 <= until <= len(records):
        raise TrajectoryError(
            f"{path} holds {counted(len(records), 'step', 'steps')}, so it cannot be replayed until step {until}"
        )
    return header, records[:until]


def direction_seed(master: int, step: int, index: int) -> int:
    """The seed of a step's direction: all follow from the run's master seed."""
    return derive_seed(master, "direction", step, index)


def directions_of(header: Mapping[str, Any]) -> Callable[[int], int]:
    """The number of directions at each step of a run: one per block in a step that measures the gradient norms of blocks."""
    planned = Directions.parse(header["n_spsa"])
    return lambda step: len(header["parameters"]) if measures(header, step) else planned.at(step)


def check_parameters(header: Mapping[str, Any], parameters: ParameterSet) -> None:
    """Raises TrajectoryError naming the first parameters that differ in name, shape or dtype."""
    recorded = {name: (list(shape), dtype) for name, shape, dtype in header["parameters"]}
    found = {name: (shape, dtype) for name, shape, dtype in parameters.describe()}
    for what, names in (("lacks", recorded.keys() - found.keys()), ("also has", found.keys() - recorded.keys())):
        if names:
            raise TrajectoryError(
                f"the model {what} {len(names)} of the trajectory's parameters, such as {min(names)!r}"
            )
    for name, (shape, dtype) in recorded.items():
        if found[name] != (shape, dtype):
            raise TrajectoryError(
                f"parameter {name!r} is {found[name][1]} of shape {found[name][0]}, the trajectory's is {dtype} of shape {shape}"
            )


def check_header(recorded: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises TrajectoryError naming the settings in which a run differs from the one that it continues."""
    recorded = _in_present_terms(recorded)
    # Of a run that an earlier version began.
    unknown = {key: expected[key] for key in _RECORDED_LATER & expected.keys()}
    recorded = unknown | recorded
    # A reward may be mended and the run continued; the trainer says so.
    ignored = ("parameters", "goal_sha256")
    different = [key for key in expected if recorded.get(key) != expected[key] and key not in ignored]
    if different:
        rows = {"rows_sha256": "the training rows", "eval_rows_sha256": "the evaluation rows"}
        found = "; ".join(
            f"{rows[key]} have changed" if key in rows else f"{key} was {recorded.get(key)!r}, is now {expected[key]!r}"
            for key in different
        )
        raise TrajectoryError(f"the trajectory was recorded with other settings: {found}")


def _in_present_terms(header: Mapping[str, Any]) -> dict[str, Any]:
    """The header with the names of today's settings: earlier versions had no choice of estimators, and wrote two lists."""
    present = {"estimator": "spsa", **header}
    answers = ("max_length", "max_completion_length", "temperature", "top_k", "top_p")
    present.update(zip(answers, present.pop("answers", ()), strict=False))
    if "batch" in present:
        present["rows_per_step"] = math.prod(present.pop("batch"))
    return present


def _encode_header(header: dict[str, Any]) -> bytes:
    # Keys stay in order, not sorted: the order of the label words is that of the label head's rows.
    packed = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    data = _MAGIC + _U32.pack(len(packed)) + packed
    return data + _U32.pack(zlib.crc32(data))


def _parse(path: Path) -> tuple[dict[str, Any], list[Record], Damage | None, int]:
    """Header, intact records, damage, and the number of bytes up to the end of the intact records."""
    data = path.read_bytes()
    if data[:4] != _MAGIC:
        raise TrajectoryError(f"{path} is not a zorl trajectory: it does not start with {_MAGIC.decode()}")
    size = _U32.unpack(data[4:8])[0] if len(data) >= 8 else len(data)
    end = 8 + size + 4
    if len(data) < end or zlib.crc32(data[: end - 4]) != _U32.unpack(data[end - 4 : end])[0]:
        raise TrajectoryError(f"{path}: the header is damaged (its checksum does not match); nothing can be replayed")
    header = json.loads(zlib.decompress(data[8 : end - 4]))
    if header.get("schema") != SCHEMA:
        raise TrajectoryError(f"{path} has schema {header.get('schema')}, this version of zorl reads schema {SCHEMA}")
    directions, bytes_each = directions_of(header), 8 if header.get("estimator") == "one_point" else 4
    records: list[Record] = []
    position, chain = end, _U32.unpack(data[end - 4 : end])[0]
    while position < len(data):
        sizes = [bytes_each * directions(len(records) + i) for i in range(_STEPS_PER_BLOCK)]
        last = len(data) - position < sum(sizes) + 4
        count = (
            next((k for k in range(1, _STEPS_PER_BLOCK) if sum(sizes[:k]) + 4 == len(data) - position), 0)
            if last
            else len(sizes)
        )
        stop = position + sum(sizes[:count])
        if not count or zlib.crc32(data[position:stop], chain) != _U32.unpack(data[stop : stop + 4])[0]:
            return header, records, Damage(path, len(records), last or stop + 4 == len(data)), position
        chain = _U32.unpack(data[stop : stop + 4])[0]
        for step_size in sizes[:count]:
            records.append(Record.from_bytes(data[position : position + step_size], step_size // bytes_each))
            position += step_size
        position += 4
    return header, records, None, position


def _locked(path: Path) -> FileLock:
    lock = FileLock(f"{path}.lock", timeout=0)
    with writing(path):
        try:
            lock.acquire()
        except Timeout:
            raise TrajectoryError(f"another run is writing {path}; stop it, or choose another output folder") from None
    return lock
