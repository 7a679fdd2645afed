"""The cells of a comparison in several processes at once (`zorl compare --jobs`).

Here only the standard library is loaded, so that a process is prepared before it loads torch.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from io import StringIO
from multiprocessing import active_children, get_context, parent_process
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zorl.apps.compare_cells import Cell, Comparison

_GPUS = "CUDA_VISIBLE_DEVICES"
_comparison: Comparison  # of such a process


def in_processes(argv: Sequence[str], cells: Sequence[Cell], jobs: int) -> Generator[tuple[Cell, str | None]]:
    """Runs the cells, at most `jobs` at once, and yields each with the reason why it failed, if it did.

    Cells that are running when the iterator is closed are cut short; a later call continues them.

    Args:
        argv: the arguments of `zorl compare`.

    Raises:
        ValueError: a process was killed.
        OSError: as for `Comparison.run`.
    """
    context = get_context("spawn")  # a fork would share torch's threads and the GPU
    jobs = min(jobs, len(cells))
    pool = ProcessPoolExecutor(jobs, context, _begin, (list(argv), jobs, context.Value("i", 0), _gpus()))
    try:
        todo = {pool.submit(_run, cell): cell for cell in cells}
        for done in as_completed(todo):
            yield todo[done], done.result()
    except BrokenProcessPool as error:
        raise ValueError(
            f"a process that ran a cell was killed, as systems do when memory runs out (--jobs {jobs}); finished cells are "
            "kept, and the same command with fewer --jobs continues"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active_children():
            process.terminate()


def _gpus() -> list[str]:
    """The GPUs to spread processes over, in CUDA's own terms."""
    if _GPUS in os.environ:
        return [name for name in os.environ[_GPUS].split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _begin(argv: list[str], jobs: int, begun: Any, gpus: Sequence[str]) -> None:
    """Prepares a process.

    Args:
        begun: the number of processes that have come so far, shared by all of them.
    """
    global _comparison
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one, which ends it
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    with begun.get_lock():
        number, begun.value = begun.value, begun.value + 1
    if gpus:
        os.environ[_GPUS] = gpus[number % len(gpus)]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    os.environ["TQDM_DISABLE"] = "1"  # one bar is enough

    from zorl.apps.cli import hush

    hush()
    from transformers.utils import logging

    from zorl.apps.compare_cells import Comparison

    logging.disable_progress_bar()
    _comparison = Comparison(argv)


def _end_with_the_first() -> None:
    """Ends this process when the one that started it is gone, even if it was killed."""
    first = parent_process()
    assert first is not None
    first.join()
    os._exit(1)


def _run(cell: Cell) -> str | None:
    with redirect_stderr(StringIO()):  # how the rows are drawn, which the first process has said
        _comparison.problem(cell.seed)
    return _comparison.run(cell)
