"""Several processes that tune one model: each computes a share, and all take the same step.

An update of θ is a few numbers and a seed, so processes only exchange each row's scores, the tokens of its answers, or a
reward. The number of bytes depends on the batch, never on the model's size. Every process holds all of θ, sees the whole batch
and makes every update itself; weights are never sent. `torch.distributed` carries the bytes, with gloo between CPUs and NCCL
between GPUs; `accelerate launch` and `torchrun` start the processes.

In a single process everything here is a plain call. Tensors are sent as safetensors and values as JSON: what another process
sends is data, never code.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")

PULSE = 60.0  # seconds between the first process's signs of life, well within any backend's timeout
_STILL_AT_WORK = -1  # in place of a length

exchanged_bytes = 0  # sent by this process to the others so far
_alone = 0  # positive inside work that one process does for all


class ProcessError(ConnectionError):
    """Another process failed, left the run, or computed something different."""


def count() -> int:
    """The number of processes that share the work: 1 unless `torch.distributed` was set up."""
    return dist.get_world_size() if not _alone and dist.is_available() and dist.is_initialized() else 1


def index() -> int:
    """The number of this process, from 0. The first one writes files and asks rewards and judges."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def share(items: Sequence[T], work: Callable[[Sequence[T]], Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Divides the items among the processes, in runs of about the same length, and gives all of them every result.

    Args:
        items: the same in all processes.
        work: returns tensors by name for its items; may be called with no items.

    Returns:
        The tensors of each share, in the order of the items. In one process, a single share.

    Raises:
        ProcessError: another process failed in its share, or is gone.
    """
    total, mine = count(), index()
    if total == 1:
        return [dict(work(items))]
    bounds = [len(items) * i // total for i in range(total + 1)]
    failure: Exception | None = None
    try:
        tensors = {
            name: t.detach().cpu().contiguous() for name, t in work(items[bounds[mine] : bounds[mine + 1]]).items()
        }
        payload = save(tensors)
    except Exception as error:  # the others wait for an answer
        failure, payload = error, save({"": _utf8(f"{type(error).__name__}: {error}")})
    parts = [load(part) for part in _gather(payload)]
    if failure is not None:
        raise failure
    for i, part in enumerate(parts):
        if "" in part:
            raise ProcessError(f"process {i} of {total} failed: {bytes(part[''].tolist()).decode()}")
    return parts


def first(work: Callable[[], Any]) -> Any:
    """Calls `work` in the first process only, and gives all processes its result.

    It may take any time, for example when people judge: the others are told every minute that it is still at work.

    Args:
        work: returns JSON values. Functions of this module that it calls run in the first process alone.

    Raises:
        ProcessError: the first process failed or is gone. The first process raises the error itself.
    """
    global _alone
    if count() == 1:
        return work()
    failure: Exception | None = None
    payload = b""
    if index() == 0:
        _alone += 1
        try:
            with _pulse():
                payload = json.dumps({"value": work()}).encode()
        except Exception as error:
            failure, payload = error, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode()
        finally:
            _alone -= 1
    if isinstance(failure, ProcessError):
        raise failure  # there is nobody left to tell
    answer = json.loads(_broadcast(payload))
    if failure is not None:
        raise failure
    if "error" in answer:
        raise ProcessError(f"the first process failed: {answer['error']}")
    return answer["value"]


@contextmanager
def first_goes_ahead() -> Iterator[None]:
    """The first process does the block before the others begin it.

    Raises:
        ProcessError: the first process failed in the block and has ended.
    """
    if index() > 0:
        _meet()
    yield
    if index() == 0:
        _meet()


def agree(what: str, value: Any) -> None:
    """Checks that all processes hold the same JSON value.

    Raises:
        ProcessError: they do not. The message says who holds what; for a mapping, under the first key that differs.
    """
    if count() == 1:
        return
    found = [json.loads(part) for part in _gather(json.dumps(value).encode())]
    if all(other == found[0] for other in found):
        return
    if isinstance(value, Mapping):
        key = next(key for other in found for key in (found[0] | other) if other.get(key) != found[0].get(key))
        what, found = f"{what}, under {key!r}", [other.get(key) for other in found]
    held = ", ".join(f"process {i} has {str(other)[:60]}" for i, other in enumerate(found))
    raise ProcessError(f"the processes differ in {what}: {held}")


def leave() -> None:
    """Waits for the others and destroys the process group, whose threads may abort an interpreter that exits with it."""
    if dist.is_available() and dist.is_initialized():
        _meet()
        dist.destroy_process_group()


def _meet() -> None:
    """Waits until all processes are here."""
    if count() > 1:
        with _lost_contact():
            dist.barrier()


def _gather(payload: bytes) -> list[bytes]:
    """The bytes of each process, in order."""
    global exchanged_bytes
    total, device = count(), _device()
    with _lost_contact():
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(total)]
        dist.all_gather(sizes, torch.tensor([len(payload)], dtype=torch.int64, device=device))
        lengths = [int(size) for size in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
        padded[: len(payload)] = _bytes(payload)
        parts = [torch.empty_like(padded) for _ in range(total)]
        dist.all_gather(parts, padded)
    exchanged_bytes += 8 + len(padded)
    return [part[:length].cpu().numpy().tobytes() for part, length in zip(parts, lengths, strict=True)]


def _broadcast(payload: bytes) -> bytes:
    """The first process's bytes."""
    global exchanged_bytes
    device = _device()
    with _lost_contact():
        size = torch.tensor([len(payload)], dtype=torch.int64, device=device)
        dist.broadcast(size, src=0)
        while int(size) == _STILL_AT_WORK:
            dist.broadcast(size, src=0)
        data = _bytes(payload).to(device) if index() == 0 else torch.empty(int(size), dtype=torch.uint8, device=device)
        dist.broadcast(data, src=0)
    if index() == 0:
        exchanged_bytes += 8 + len(payload)
    return data.cpu().numpy().tobytes()


@contextmanager
def _pulse() -> Iterator[None]:
    """Keeps telling the others that this process is at work in the block.

    Raises:
        ProcessError: they are gone. The block is interrupted as by Ctrl-C; if it ignores that, the error is raised at its end.
    """
    done, lost, device = threading.Event(), list[ProcessError](), _device()

    def beat() -> None:
        global exchanged_bytes
        while not done.wait(PULSE):
            try:
                with _lost_contact():
                    dist.broadcast(torch.tensor([_STILL_AT_WORK], dtype=torch.int64, device=device), src=0)
                exchanged_bytes += 8
            except ProcessError as error:
                lost.append(error)
                os.kill(os.getpid(), signal.SIGINT)  # unlike _thread.interrupt_main, this wakes a sleeping call
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if lost:
            raise lost[0] from None
        raise
    finally:
        done.set()
        thread.join()
    if lost:
        raise lost[0]


def _device() -> torch.device:
    """The device on which the backend expects the bytes."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


@contextmanager
def _lost_contact() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            f"process {index()} of {dist.get_world_size()} lost contact with the others: one of them has ended, and its own "
            f"message says why. The run can be continued, with any number of processes ({str(error).splitlines()[0]})"
        ) from error


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _utf8(text: str) -> Tensor:
    return _bytes(text.encode())
