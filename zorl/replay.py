"""From the log to θ: what a committed step does to the weights, in live runs and replays alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from zorl.block_scales import LARGEST, measures, normalized, parameter_norms, rescales
from zorl.directions import Step
from zorl.epsilon import Epsilon
from zorl.in_place import InPlace
from zorl.moments import Averaging, Moments, Move
from zorl.parameters import ParameterSet
from zorl.schedules import Directions
from zorl.trajectory import Record, check_parameters, direction_seed


class Updater:
    """Applies committed steps to θ, in order and each once. A live run is a replay that is fed one step at a time.

    Args:
        header: the header of the run's trajectory (see `zorl.MeZO.header`).
        parameters: the tuned parameters, holding the base weights.
        in_place: the grid of a run that a closure drives; None for other runs.
    """

    def __init__(self, header: Mapping[str, Any], parameters: ParameterSet, in_place: InPlace | None = None) -> None:
        self.steps = 0
        self._header, self._parameters, self._in_place = header, parameters, in_place
        self._scales: dict[str, float] | None = None
        self._scaled_at = -1
        self._moments: Moments | None = None
        if "moments" in header:
            directions = Directions.parse(header["n_spsa"])
            one = directions.start == directions.end == 1 and header["distribution"] in ("rademacher", "rank1")
            self._moments = Moments(
                Averaging.of_header(header), parameters, header["distribution"],
                unit_squares=one and "block_scales" not in header, target=parameters if in_place is None else in_place,
            )  # fmt: skip

    @property
    def scales(self) -> Mapping[str, float] | None:
        """d of the next step, by parameter; None if blocks are not scaled (see `zorl.block_scales`)."""
        if rescales(self._header, self.steps) and self._scaled_at != self.steps:
            self._scales, self._scaled_at = parameter_norms(self._parameters), self.steps
        return self._scales

    def apply(self, records: Sequence[Record]) -> None:
        """Moves θ by these steps, which follow those applied before."""
        if self._moments is None and "block_scales" not in self._header:  # only Σ cᵢzᵢ
            self._add(steps_of(self._header, records, self.steps))
            self.steps += len(records)
            return
        moves: list[Move] = []
        for record in records:
            if measures(self._header, self.steps):
                norms = dict(zip(self._parameters, map(abs, record.projected), strict=True))
                self._scales = normalized(norms, self._parameters)
            else:
                if rescales(self._header, self.steps):  # from the parameters as all earlier steps have left them
                    self._write(moves)
                    moves = []
                moves.append(self._move(record))
            self.steps += 1
        self._write(moves)

    def _write(self, moves: Sequence[Move]) -> None:
        if self._moments is not None:
            self._moments.apply([move for move in moves if move.gradient])
        else:
            self._add([step for move in moves for step in move.steps])

    def _add(self, steps: Sequence[Step]) -> None:
        if self._in_place is not None:
            self._in_place.add(steps)
        else:
            self._parameters.add(steps, self._header["distribution"])

    def _move(self, record: Record) -> Move:
        """What a record does. A record without any opinion says nothing about the gradient, so averages leave it out."""
        scales = self.scales
        steps = steps_of(self._header, [record], self.steps)
        if scales is not None and self._header["estimator"] == "variance_spsa":
            steps = [replace(step, scales=scales) for step in steps]
        answered = sum(not math.isnan(g) for g in record.projected) if self._moments is not None else 0
        if not answered:
            return Move(steps, [])
        gradient = [0.0 if math.isnan(g) else g / answered for g in record.projected]
        return Move(steps, [replace(step, coefficient=g) for step, g in zip(steps, gradient, strict=True)])


def grid_of(header: Mapping[str, Any], parameters: ParameterSet) -> InPlace:
    """The grid of a run that a closure drives, with room for its farthest points. It snaps the parameters to the grid."""
    reach = Epsilon(header["epsilon"], parameters.dtypes).largest
    return InPlace(parameters, header["distribution"], reach * (LARGEST if "block_scales" in header else 1.0))


def replay(header: Mapping[str, Any], records: Sequence[Record], parameters: ParameterSet) -> None:
    """Applies the steps to `parameters`, which hold the base weights: afterwards they are the trained ones, bit for bit.

    Raises:
        TrajectoryError: the parameters are not the ones that the trajectory was recorded with.
    """
    check_parameters(header, parameters)
    in_place = grid_of(header, parameters) if header["in_place"] else None
    Updater(header, parameters, in_place).apply(records)


def steps_of(header: Mapping[str, Any], records: Sequence[Record], first: int = 0) -> list[Step]:
    """The directions and coefficients of records that start at step `first`, in the order in which they were applied."""
    return [
        Step(direction_seed(header["seed"], step, i), c)
        for step, record in enumerate(records, first)
        for i, c in enumerate(record.coefficients)
    ]
