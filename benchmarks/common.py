"""What all benchmarks write down: the machine, and the spread over seeds."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence

MASKED_MODEL = (
    "The masked model's encoder starts from sentence-transformers/all-MiniLM-L6-v2; it was trained further, with a head for "
    "masked words, mostly on unlabelled film reviews (SST-2's sentences are from film reviews too). It is not published, and "
    "with another model the figures will differ."
)


def machine() -> str:
    """The processor, its cores, the GPU if there is one, and torch's version."""
    import torch  # slow; a benchmark that only starts others does not need it until then

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation; the mean alone of a single value, and a dash for none."""
    if not values:
        return "—"
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean
