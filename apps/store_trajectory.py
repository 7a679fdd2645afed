"""A trajectory that agrees with the steps in a judgment store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zorl.rewards.judgment_store import StoredStep
from zorl.trajectory import Record, Trajectory, TrajectoryError, read


def follow_store(path: Path, header: Mapping[str, Any], steps: Sequence[StoredStep]) -> None:
    """Makes a trajectory agree with the committed steps.

    A process that was killed may have written a step without committing it, or committed one without writing it. A damaged
    or missing file is written anew.
    """
    committed = [
        Record(*each)
        for step in steps
        for each in [(step.projected, step.coefficients)] * bool(step.projected) + list(step.replayed)
    ]
    try:
        written: list[Record] | None = read(path)[1]
    except (TrajectoryError, FileNotFoundError):
        written = None
    if written is not None and [bytes(r) for r in written] == [bytes(r) for r in committed]:
        return
    whole = path.with_name(f"{path.name}.rebuilt")
    whole.unlink(missing_ok=True)
    rebuilt = Trajectory.create(whole, header if written is None else read(path)[0])
    for record in committed:
        rebuilt.append(record)
    rebuilt.close()
    whole.replace(path)
