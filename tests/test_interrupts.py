"""Ctrl-C at any line leaves θ as it was before or after a step, never in between."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import zorl
from zorl.in_place import InPlace
from zorl.interrupts import terminated_as_interrupted, uninterrupted
from zorl.mezo import MeZO
from zorl.parameters import ParameterSet
from zorl.perturbation import Scratch
from zorl.probe import Point

PACKAGE = str(Path(zorl.__file__).parent)


class CtrlCAtLine:
    """Sends SIGINT when the n-th line of zorl's own code is reached."""

    def __init__(self, n: int) -> None:
        self.left = n
        self.where = ""

    def __enter__(self) -> CtrlCAtLine:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                signal.raise_signal(signal.SIGINT)
        return self._trace


def interrupt_at_every_line(prepare: Callable[[], tuple[Callable[[], Any], Callable[[str], None]]]) -> None:
    """`prepare` gives what to run and what to check afterwards; runs it anew for each line until one is not reached."""
    for n in range(1, 2000):
        run, check = prepare()
        interrupt = CtrlCAtLine(n)
        try:
            with interrupt:
                run()
        except KeyboardInterrupt:
            pass
        check(interrupt.where)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, interrupt.where
        if not interrupt.where:
            assert n > 20
            return
    raise AssertionError("the code under test has more lines than are tried")


def test_an_interrupt_waits_for_the_end_of_the_block():
    reached = []

    def block() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            reached.append("end")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert reached == ["end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_users_own_gets_the_interrupt_once():
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert received == []
        assert received == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_ignored_interrupt_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_blocks_may_be_nested():
    reached = []

    def blocks() -> None:
        with uninterrupted():
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
                reached.append("inner")
            reached.append("outer")

    with pytest.raises(KeyboardInterrupt):
        blocks()
    assert reached == ["inner", "outer"]


def test_an_interrupt_is_let_through_to_code_that_may_take_long():
    reached = []

    def block(early: bool) -> None:
        with uninterrupted() as interruptible:
            try:
                if early:
                    signal.raise_signal(signal.SIGINT)
                    reached.append("held back until")
                interruptible(lambda: (signal.raise_signal(signal.SIGINT), reached.append("never")))
            finally:
                signal.raise_signal(signal.SIGINT)
                reached.append("cleaned up")

    with pytest.raises(KeyboardInterrupt):
        block(early=False)
    assert reached == ["cleaned up"]
    with pytest.raises(KeyboardInterrupt):
        block(early=True)
    assert reached == ["cleaned up", "held back until", "cleaned up"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_in_the_block_is_not_lost_without_an_interrupt():
    with pytest.raises(ZeroDivisionError), uninterrupted():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_waits_as_ctrl_c_does_and_ends_what_ignores_ctrl_c() -> None:
    before, done = signal.getsignal(signal.SIGTERM), []

    def block() -> None:
        with terminated_as_interrupted(), uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            done.append("to the end of the block")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done
    assert signal.getsignal(signal.SIGTERM) is before
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), terminated_as_interrupted():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_leaves_signals_alone():
    seen = []

    def work() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupt_at_any_line_of_an_evaluation_in_place_restores_every_bit(dtype: torch.dtype):
    def prepare() -> tuple[Callable[[], Any], Callable[[str], None]]:
        a, b = torch.linspace(-1, 1, 50).to(dtype), torch.linspace(-2, 2, 7).to(dtype)
        in_place = InPlace(ParameterSet([("a", a), ("b", b)]), "rademacher", 0.01)
        before = a.clone(), b.clone()

        def check(where: str) -> None:
            assert torch.equal(a, before[0]), where
            assert torch.equal(b, before[1]), where

        return lambda: in_place.evaluate(Point(1, 0.01), lambda: None), check

    interrupt_at_every_line(prepare)


def test_an_interrupt_at_any_line_of_a_scratch_evaluation_leaves_the_model_usable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("zorl.perturbation.HELD_BYTES", 40)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    before = [p.detach().clone() for p in model.parameters()]
    tokens = torch.tensor([1, 2])

    def prepare() -> tuple[Callable[[], Any], Callable[[str], None]]:
        scratch = Scratch(model, ParameterSet(model.named_parameters()))
        expected = scratch.evaluate(Point(1, 0.1), lambda: scratch.module(tokens))

        def check(where: str) -> None:
            assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True)), where
            assert torch.equal(scratch.evaluate(Point(1, 0.1), lambda: scratch.module(tokens)), expected), where
            assert torch.equal(scratch.module(tokens), model(tokens)), where

        return lambda: scratch.evaluate(Point(1, -0.1), lambda: scratch.module(tokens)), check

    interrupt_at_every_line(prepare)


@pytest.mark.parametrize("steps_before", [0, 1])
def test_an_interrupt_at_any_line_of_a_step_leaves_the_log_and_the_weights_in_agreement(
    tmp_path: Path, steps_before: int
):
    """Whatever line it was: going on, and resuming from the log, give the weights of an uninterrupted run."""
    base = torch.linspace(-1, 1, 20)

    def start(w: torch.Tensor, path: Path | None) -> MeZO:
        return MeZO([("w", w)], lr=0.01, epsilon=0.01, update="normalized", trajectory=path)

    expected = base.clone()
    optimizer = start(expected, None)
    for _ in range(3):
        optimizer.step(lambda: expected.square().sum())

    runs = 0

    def prepare() -> tuple[Callable[[], Any], Callable[[str], None]]:
        nonlocal runs
        runs += 1
        path = tmp_path / str(runs) / "trajectory.zorl"
        w = base.clone()
        optimizer = start(w, path)

        def closure() -> torch.Tensor:
            return w.square().sum()

        for _ in range(steps_before):
            optimizer.step(closure)

        def check(where: str) -> None:
            while optimizer.steps < 3:
                optimizer.step(closure)
            optimizer.step()
            assert torch.equal(w, expected), where
            optimizer.close()
            resumed = base.clone()
            start(resumed, path).close()
            assert torch.equal(resumed, expected), where

        return lambda: optimizer.step(closure), check

    interrupt_at_every_line(prepare)
