"""From the log to θ: what a committed step does to the weights, live and in replay alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from zorl.directions import Step
from zorl.epsilon import Epsilon
from zorl.in_place import InPlace
from zorl.moments import Averaging, Moments, Move
from zorl.parameters import ParameterSet
from zorl.schedules import Directions
from zorl.trajectory import Record, check_parameters, direction_seed


class Updater:
    """Applies committed steps to θ, in order and each once. A live run is a replay that is fed a step at a time.

    Args:
        header: of the run's trajectory (see `zorl.MeZO.header`).
        parameters: with the base weights.
        in_place: the grid of a run that a closure drives; None: there is none.
    """

    def __init__(self, header: Mapping[str, Any], parameters: ParameterSet, in_place: InPlace | None = None) -> None:
        self.steps = 0
        self._header, self._parameters, self._in_place = header, parameters, in_place
        self._moments: Moments | None = None
        if "moments" in header:
            directions = Directions.parse(header["n_spsa"])
            one = directions.start == directions.end == 1 and header["distribution"] in ("rademacher", "rank1")
            self._moments = Moments(
                Averaging.of_header(header), parameters, header["distribution"], unit_squares=one,
                target=parameters if in_place is None else in_place,
            )  # fmt: skip

    def apply(self, records: Sequence[Record]) -> None:
        """θ after these steps, which follow on those applied before."""
        if self._moments is not None:
            self._moments.apply(self._moves(records))
        elif self._in_place is not None:
            self._in_place.add(steps_of(self._header, records, self.steps))
        else:
            self._parameters.add(steps_of(self._header, records, self.steps), self._header["distribution"])
        self.steps += len(records)

    def _moves(self, records: Sequence[Record]) -> list[Move]:
        """A step without any opinion says nothing of the gradient: it is left out, and moves nothing."""
        moves = []
        for step, record in enumerate(records, self.steps):
            answered = sum(not math.isnan(g) for g in record.projected)
            if answered:
                steps = steps_of(self._header, [record], step)
                gradient = [0.0 if math.isnan(g) else g / answered for g in record.projected]
                moves.append(Move(steps, [Step(s.seed, g) for s, g in zip(steps, gradient, strict=True)]))
        return moves


def replay(header: Mapping[str, Any], records: Sequence[Record], parameters: ParameterSet) -> None:
    """Applies the steps to `parameters`, which hold the base weights: afterwards they are the trained ones, bit for bit.

    Raises:
        TrajectoryError: the parameters are not the ones that the trajectory was recorded with.
    """
    check_parameters(header, parameters)
    in_place = None
    if header["in_place"]:  # tuned by a closure, on a grid
        reach = Epsilon(header["epsilon"], parameters.dtypes).largest
        in_place = InPlace(parameters, header["distribution"], reach)
    Updater(header, parameters, in_place).apply(records)


def steps_of(header: Mapping[str, Any], records: Sequence[Record], first: int = 0) -> list[Step]:
    """The directions and coefficients of records that start at step `first`, in the order in which they were applied."""
    return [
        Step(direction_seed(header["seed"], step, i), c)
        for step, record in enumerate(records, first)
        for i, c in enumerate(record.coefficients)
    ]
