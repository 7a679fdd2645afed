"""The log that is the checkpoint: append, read, rewind, verify."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zorl.mezo import MeZO
from zorl.parameters import ParameterSet
from zorl.probe import Scores
from zorl.replay import replay, steps_of
from zorl.schedules import Directions
from zorl.trajectory import (
    SCHEMA,
    Record,
    Trajectory,
    TrajectoryError,
    check_parameters,
    direction_seed,
    read,
)
from zorl.updates import bfloat16

HEADER = {"schema": SCHEMA, "seed": 0, "n_spsa": "1", "distribution": "rademacher", "in_place": False}
floats = st.one_of(st.just(math.nan), st.floats(width=32, allow_nan=False, allow_infinity=False).map(bfloat16))


def record(step: int, n: int = 1) -> Record:
    return Record(tuple(bfloat16(step + i / 8) for i in range(n)), tuple(bfloat16(-(step + i) / 64) for i in range(n)))


def written(path: Path, steps: int, n_spsa: str = "1") -> list[Record]:
    """A trajectory of this many steps, and its records."""
    trajectory = Trajectory.create(path, {**HEADER, "n_spsa": n_spsa})
    records = [record(step, Directions.parse(n_spsa).at(step)) for step in range(steps)]
    for one in records:
        trajectory.append(one)
    trajectory.close()
    return records


def same(a: list[Record], b: list[Record]) -> bool:
    return [bytes(one) for one in a] == [bytes(one) for one in b]


@pytest.mark.parametrize("steps", [0, 1, 15, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize("n_spsa", ["1", "3", "1-5/20"])
def test_what_was_appended_is_read(tmp_path: Path, steps: int, n_spsa: str):
    path = tmp_path / "a" / "trajectory.zorl"
    records = written(path, steps, n_spsa)
    header, found = read(path)
    assert header == {**HEADER, "n_spsa": n_spsa}
    assert same(found, records)
    for until in {0, steps // 2, steps}:
        assert same(read(path, until)[1], records[:until])


@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=5))
def test_a_record_survives_its_bytes(pairs: list[tuple[float, float]]):
    projected, coefficients = zip(*pairs, strict=True)
    again = Record.from_bytes(bytes(Record(projected, coefficients)))
    assert [struct.pack("<d", g) for g in again.projected if g == g] == [
        struct.pack("<d", g) for g in projected if g == g
    ]
    assert [math.isnan(g) for g in again.projected] == [math.isnan(g) for g in projected]
    assert bytes(again) == bytes(Record(projected, coefficients))


def test_a_record_is_little_endian_bfloat16_pairs():
    assert bytes(Record((1.0, math.nan), (-0.5, 0.0))).hex() == "803f" + "00bf" + "c07f" + "0000"


@given(st.lists(st.booleans(), max_size=60))
@settings(max_examples=30, deadline=None)
def test_closing_and_resuming_in_between_changes_nothing(tmp_path_factory: pytest.TempPathFactory, reopen: list[bool]):
    folder = tmp_path_factory.mktemp("t")
    straight = written(folder / "straight", len(reopen), "1-3/10")
    broken = folder / "broken"
    trajectory = Trajectory.create(broken, {**HEADER, "n_spsa": "1-3/10"})
    for one, again in zip(straight, reopen, strict=True):
        if again:
            trajectory.close()
            trajectory, cut = Trajectory.resume(broken)
            assert cut is None
        trajectory.append(one)
    trajectory.close()
    assert broken.read_bytes() == (folder / "straight").read_bytes()


@pytest.mark.parametrize("steps", [2, 17])
def test_every_flipped_bit_is_noticed(tmp_path: Path, steps: int):
    path = tmp_path / "trajectory.zorl"
    records = written(path, steps)
    intact = path.read_bytes()
    for i in range(len(intact)):
        for bit in range(8):
            data = bytearray(intact)
            data[i] ^= 1 << bit
            path.write_bytes(bytes(data))
            with pytest.raises(TrajectoryError) as caught:
                read(path)
            assert str(path) in str(caught.value)
    path.write_bytes(intact)
    assert same(read(path)[1], records)


def test_a_flipped_bit_costs_no_step_before_its_block(tmp_path: Path):
    path = tmp_path / "trajectory.zorl"
    records = written(path, 40)
    data = bytearray(path.read_bytes())
    data[-4 * 8 - 4 - 10] ^= 4  # within the second of three blocks: 16, 16 and 8 steps
    path.write_bytes(bytes(data))
    with pytest.raises(TrajectoryError, match=r"what follows step 16 fails its checksum .* first 16 steps are intact"):
        read(path)
    with pytest.raises(TrajectoryError, match="replay them with --until 16"):
        read(path, 17)
    assert same(read(path, 16)[1], records[:16])
    with pytest.raises(TrajectoryError, match="a bit flipped, or it was edited"):
        Trajectory.resume(path)
    assert path.read_bytes() == bytes(data), "a file that is damaged in the middle is left as it is"


@pytest.mark.parametrize("n_spsa", ["1", "2-4/10"])
def test_a_torn_tail_of_any_length_is_cut(tmp_path: Path, n_spsa: str):
    path = tmp_path / "trajectory.zorl"
    records = written(path, 20, n_spsa)
    intact = path.read_bytes()
    head = len(intact_header(intact))
    for size in range(head, len(intact)):
        path.write_bytes(intact[:size])
        trajectory, cut = Trajectory.resume(path)
        kept = len(trajectory.records)
        assert same(trajectory.records, records[:kept])
        whole = size == head or (kept > 0 and path.stat().st_size == size)
        assert (cut is None) == whole
        if cut is not None:
            assert f"the first {kept} steps are intact" in cut
            assert kept in (0, 16), "no more than the open block is lost"
        for one in records[kept:]:
            trajectory.append(one)
        trajectory.close()
        assert path.read_bytes() == intact


def intact_header(data: bytes) -> bytes:
    return data[: 8 + struct.unpack("<I", data[4:8])[0] + 4]


def test_a_torn_header_is_named(tmp_path: Path):
    path = tmp_path / "trajectory.zorl"
    written(path, 2)
    data = path.read_bytes()
    for size in range(len(intact_header(data))):
        path.write_bytes(data[:size])
        with pytest.raises(TrajectoryError, match="header is damaged|is not a zorl trajectory"):
            read(path)
        with pytest.raises(TrajectoryError):
            Trajectory.resume(path)


def test_a_write_that_the_power_cut_short_costs_its_block_at_most(tmp_path: Path):
    """An append overwrites the open block's checksum: every prefix of that write must leave a file that can go on."""
    path = tmp_path / "trajectory.zorl"
    records = written(path, 20)
    before = path.read_bytes()
    (tmp_path / "longer").mkdir()
    written(tmp_path / "longer" / "trajectory.zorl", 21)
    after = (tmp_path / "longer" / "trajectory.zorl").read_bytes()
    for size in range(len(before) - 4, len(after)):
        path.write_bytes(after[:size] + before[size:])
        trajectory, _ = Trajectory.resume(path)
        assert same(trajectory.records, records[: len(trajectory.records)])
        assert len(trajectory.records) in (16, 20)
        trajectory.close()


def test_a_full_disk_loses_nothing(tmp_path: Path):
    """In a process that may not write files beyond 1,000 bytes: step by step until it is full, then with room again."""
    program = f"""
import resource, signal, sys
from pathlib import Path
from zorl.trajectory import Record, Trajectory, read
from zorl.updates import bfloat16
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path({str(tmp_path / "trajectory.zorl")!r})
trajectory = Trajectory.create(path, {HEADER!r})
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit in range(900, 1000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    while True:
        before = path.read_bytes()
        try:
            trajectory.append(Record((float(len(trajectory.records)),), (0.5,)))
        except OSError as error:
            assert "step %d is not committed, free space" % (len(trajectory.records) + 1) in str(error), error
            assert str(path) in str(error)
            assert path.read_bytes() == before
            break
    assert len(read(path)[1]) == len(trajectory.records)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
for _ in range(50):
    trajectory.append(Record((float(len(trajectory.records)),), (0.5,)))
trajectory.close()
found = [record.projected[0] for record in read(path)[1]]
assert found == [bfloat16(float(i)) for i in range(len(found))]
print(len(found))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 200


def test_a_full_disk_leaves_the_optimizer_before_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    w = torch.linspace(-1, 1, 9)
    optimizer = MeZO([("w", w)], lr=0.1, trajectory=tmp_path / "trajectory.zorl")
    optimizer.step(lambda: w.square().sum())
    before, size = w.clone(), (tmp_path / "trajectory.zorl").stat().st_size
    assert optimizer.trajectory is not None

    class Full:
        """The file, on a disk that takes three bytes more."""

        def __init__(self, file: Any) -> None:
            self.file, self.full = file, True

        def write(self, data: bytes) -> int:
            return self.file.write(data[:3] if self.full and len(data) > 4 else data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    full = Full(optimizer.trajectory._file)
    monkeypatch.setattr(optimizer.trajectory, "_file", full)
    with pytest.raises(OSError, match=r"No space left on device; step 2 is not committed"):
        optimizer.step(lambda: w.square().sum())
    assert torch.equal(w, before)
    assert optimizer.steps == 1
    assert (tmp_path / "trajectory.zorl").stat().st_size == size
    full.full = False
    optimizer.step(lambda: w.square().sum())
    optimizer.close()
    resumed = torch.linspace(-1, 1, 9)
    MeZO([("w", resumed)], lr=0.1, trajectory=tmp_path / "trajectory.zorl").close()
    assert torch.equal(resumed, w)


def test_twenty_thousand_steps_stay_below_a_hundred_thousand_bytes(tmp_path: Path):
    path = tmp_path / "trajectory.zorl"
    parameters = [[f"model.decoder.layers.{i}.self_attn.q_proj.weight", [768, 768], "float32"] for i in range(200)]
    trajectory = Trajectory.create(path, {**HEADER, "parameters": parameters})
    for step in range(20_000):
        trajectory.append(Record((1.0 + step,), (0.5,)))
    trajectory.close()
    assert path.stat().st_size < 100_000
    assert len(read(path)[1]) == 20_000


def test_only_one_may_write(tmp_path: Path):
    path = tmp_path / "trajectory.zorl"
    trajectory = Trajectory.create(path, HEADER)
    for again in (Trajectory.resume, lambda p: Trajectory.create(p, HEADER)):
        with pytest.raises(TrajectoryError, match=f"another run is writing {path}; stop it, or choose another"):
            again(path)
    trajectory.append(record(0))
    assert len(read(path)[1]) == 1, "reading is for everyone"
    trajectory.close()
    trajectory.close()
    Trajectory.resume(path)[0].close()


def test_another_process_may_not_write_either(tmp_path: Path):
    path = tmp_path / "trajectory.zorl"
    trajectory = Trajectory.create(path, HEADER)
    program = f"from zorl.trajectory import Trajectory; Trajectory.resume({str(path)!r})"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode != 0
    assert f"TrajectoryError: another run is writing {path}" in found.stderr
    trajectory.close()


def test_a_trajectory_is_not_overwritten(tmp_path: Path):
    path = tmp_path / "trajectory.zorl"
    written(path, 3)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists: resume that run, or remove the file to start again"):
        Trajectory.create(path, HEADER)
    assert path.read_bytes() == before
    Trajectory.resume(path)[0].close()  # the lock was given back


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(
        TrajectoryError, match=r"model\.safetensors is not a zorl trajectory: it does not start with ZORL$"
    ):
        read(path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")


def test_a_newer_schema_is_refused(tmp_path: Path):
    path = tmp_path / "trajectory.zorl"
    Trajectory.create(path, {**HEADER, "schema": 2}).close()
    with pytest.raises(TrajectoryError, match="has schema 2, this version of zorl reads schema 1"):
        read(path)


@pytest.mark.parametrize("until", [-1, 4])
def test_more_steps_than_there_are_cannot_be_read(tmp_path: Path, until: int):
    path = tmp_path / "trajectory.zorl"
    written(path, 3)
    with pytest.raises(TrajectoryError, match=f"holds 3 steps, so it cannot be replayed until step {until}"):
        read(path, until)


def test_the_file_is_what_its_description_says(tmp_path: Path):
    path = tmp_path / "trajectory.zorl"
    records = written(path, 17)
    data = path.read_bytes()
    head = intact_header(data)
    assert data[:4] == b"ZORL"
    assert json.loads(zlib.decompress(head[8:-4])) == HEADER
    chain = zlib.crc32(head[:-4])
    assert struct.unpack("<I", head[-4:]) == (chain,)
    first, rest = data[len(head) : len(head) + 68], data[len(head) + 68 :]
    assert first[:64] == b"".join(map(bytes, records[:16]))
    chain = zlib.crc32(first[:64], chain)
    assert struct.unpack("<I", first[64:]) == (chain,)
    assert rest == bytes(records[16]) + struct.pack("<I", zlib.crc32(bytes(records[16]), chain))


# --- replay ------------------------------------------------------------------------------------------------------------


def base() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(5, 7, generator=generator),
        "a.bias": torch.randn(7, generator=generator).bfloat16(),
        "c": torch.randn(3, generator=generator).half(),
    }


def tuned(path: Path, steps: int, *, closure: bool, **options: Any) -> list[str]:
    """The hash of the weights after each step of a run, the first that of the base."""
    weights = base()
    optimizer = MeZO(weights.items(), lr=0.01, epsilon=0.01, seed=3, trajectory=path, **options)
    hashes = [optimizer.parameters.sha256()]
    for _ in range(steps):
        if closure:
            optimizer.step(lambda: sum(w.float().square().sum() for w in weights.values()))
        else:
            probe = optimizer.ask()
            optimizer.tell(probe.id, Scores.of_losses([math.sin(p.seed % 1000 + p.offset) for p in probe.points]))
            optimizer.step()
        hashes.append(optimizer.parameters.sha256())
    optimizer.close()
    return hashes


@pytest.mark.parametrize("closure", [False, True], ids=["ask and tell", "closure"])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("update", ["sgd", "normalized"])
def test_the_base_and_the_log_give_the_weights_of_any_step(
    tmp_path: Path, closure: bool, distribution: str, update: str
):
    path = tmp_path / "trajectory.zorl"
    hashes = tuned(path, 20, closure=closure, distribution=distribution, update=update, n_spsa="1-3/10")
    assert len(set(hashes)) == 21
    for until in (0, 1, 7, 16, 20):
        header, records = read(path, until)
        parameters = ParameterSet(base().items())
        replay(header, records, parameters)
        if until or not closure:  # before its first step a closure's run has snapped θ to its grid
            assert parameters.sha256() == hashes[until]


def test_a_replay_in_pieces_is_the_replay_of_the_whole(tmp_path: Path):
    path = tmp_path / "trajectory.zorl"
    hashes = tuned(path, 20, closure=False, n_spsa="1-3/10")
    header, records = read(path)
    parameters = ParameterSet(base().items())
    for first in range(0, 20, 6):
        parameters.add(steps_of(header, records[first : first + 6], first), header["distribution"])
    assert parameters.sha256() == hashes[-1]


def test_steps_are_those_of_the_master_seed(tmp_path: Path):
    steps = steps_of({"seed": 5}, [Record((1.0, 2.0), (0.1, 0.2)), Record((3.0,), (0.3,))], first=7)
    assert [(step.seed, step.coefficient) for step in steps] == [
        (direction_seed(5, 7, 0), 0.1),
        (direction_seed(5, 7, 1), 0.2),
        (direction_seed(5, 8, 0), 0.3),
    ]
    assert len({step.seed for step in steps}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("c"), "the model lacks 1 of the trajectory's parameters, such as 'c'"),
        (lambda w: w.update(d=torch.zeros(1)), "the model also has 1 of the trajectory's parameters, such as 'd'"),
        (
            lambda w: w.update({"b.weight": torch.zeros(7, 5)}),
            r"parameter 'b.weight' is float32 of shape \[7, 5\], the trajectory's is float32 of shape \[5, 7\]",
        ),
        (
            lambda w: w.update(c=w["c"].float()),
            r"parameter 'c' is float32 of shape \[3\], the trajectory's is float16 of shape \[3\]",
        ),
    ],
)
def test_parameters_of_another_model_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str
):
    path = tmp_path / "trajectory.zorl"
    tuned(path, 2, closure=False)
    other = base()
    change(other)
    header, records = read(path)
    parameters = ParameterSet(other.items())
    before = parameters.sha256()
    with pytest.raises(TrajectoryError, match=message):
        replay(header, records, parameters)
    with pytest.raises(TrajectoryError, match=message):
        MeZO(other.items(), lr=0.01, epsilon=0.01, seed=3, trajectory=path)
    assert parameters.sha256() == before
    check_parameters(header, ParameterSet(base().items()))


def test_resuming_on_another_base_names_both_hashes_and_changes_nothing(tmp_path: Path):
    path = tmp_path / "trajectory.zorl"
    tuned(path, 2, closure=False)
    other = base()
    other["a.bias"][3] += 1
    found = ParameterSet(other.items()).sha256()
    with pytest.raises(TrajectoryError, match=f"base_sha256 was '{read(path)[0]['base_sha256']}', is now '{found}'"):
        MeZO(other.items(), lr=0.01, epsilon=0.01, seed=3, trajectory=path)
    assert ParameterSet(other.items()).sha256() == found
    MeZO(base().items(), lr=0.01, epsilon=0.01, seed=3, trajectory=path).close()  # the lock was given back


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"seed": 4}, "seed was 3, is now 4"),
        ({"epsilon": 0.02}, "epsilon was 0.01, is now 0.02"),
        ({"epsilon": "auto"}, "epsilon was 0.01, is now 'auto'"),
        ({"n_spsa": 2}, "n_spsa was '1', is now '2'"),
        ({"distribution": "gaussian"}, "distribution was 'rademacher', is now 'gaussian'"),
        ({"update": "normalized"}, "update was 'sgd', is now 'normalized'"),
        ({"informative_target": 0.5}, "informative_target was 0.8, is now 0.5"),
        ({"header": {"task": "b"}}, "task was None, is now 'b'"),
    ],
)
def test_resuming_with_other_settings_names_them(tmp_path: Path, option: dict[str, Any], message: str):
    path = tmp_path / "trajectory.zorl"
    tuned(path, 2, closure=False)
    with pytest.raises(TrajectoryError, match=f"recorded with other settings: {message}"):
        MeZO(base().items(), **{"lr": 0.01, "epsilon": 0.01, "seed": 3, "trajectory": path, **option})
