"""The order in which rows become batches: reshuffled each epoch, with every label's share in every batch.

A metric of a whole batch, such as F1, is noisy where a rare label happens to be missing. Constant shares remove that part
of the noise from every probe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


class StratifiedSampler(Sampler[int]):
    """Yields every index once per epoch; consecutive batches of `batch_size` keep the proportions of the labels.

    A label with c of the N rows gets c·batch_size/N rows in each full batch, rounded down or up. What rounding leaves over is
    carried to the next batch: the labels furthest behind their share are rounded up (largest remainder), so a rare label is
    spread evenly over the epoch. A smaller last batch takes the rest. The choice of rows and their order within a batch
    are drawn anew each epoch. Without labels this is a plain shuffle.

    The order is a pure function of (seed, epoch) and uses no global random generator.

    Args:
        size: N, the number of rows.
        batch_size: rows per batch.
        labels: (N,) the label of each row, compared as `str(label)`; None for a plain shuffle.
        seed: not negative.

    Raises:
        ValueError: size, batch_size or seed is out of range, or the number of labels is not N.
    """

    def __init__(self, size: int, batch_size: int, labels: Sequence[object] | None = None, seed: int = 0) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if labels is not None and len(labels) != size:
            raise ValueError(f"expected a label for each of {size} rows, got {len(labels)} labels")
        self.size, self.batch_size, self.seed, self.epoch = size, batch_size, seed, 0
        names = np.array([""] * size if labels is None else [str(label) for label in labels])
        _, classes = np.unique(names, return_inverse=True)
        self._classes: NDArray[np.int64] = classes  # (N,) the label of each row, as a number

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration, initially 0. Data loaders call this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        shuffled = generator.permutation(self.size)
        sizes = np.bincount(self._classes)  # (K,) rows of each label
        # queues[k]: the shuffled rows of label k, of which the first taken[k] have been handed out.
        queues = np.split(shuffled[np.argsort(self._classes[shuffled], kind="stable")], np.cumsum(sizes)[:-1])
        taken = np.zeros_like(sizes)
        for end in range(self.batch_size, self.size + self.batch_size, self.batch_size):
            upto = self._shares(sizes, taken, end) if end < self.size else sizes
            batch = np.concatenate([queue[start:stop] for queue, start, stop in zip(queues, taken, upto, strict=True)])
            yield from generator.permutation(batch).tolist()
            taken = upto

    def _shares(self, sizes: NDArray[np.int64], taken: NDArray[np.int64], end: int) -> NDArray[np.int64]:
        """(K,) how many rows of each label are handed out once `end` rows are."""
        upto = taken + sizes * self.batch_size // self.size
        short = end - int(upto.sum())
        # How far each label is behind its exact share, in Nths of a row. Labels with whole shares cannot be rounded up.
        behind = np.where(
            sizes * self.batch_size % self.size > 0, sizes * end - upto * self.size, np.iinfo(np.int64).min
        )
        behind[upto >= sizes] = np.iinfo(np.int64).min
        upto[np.argsort(-behind.astype(np.float64), kind="stable")[:short]] += 1
        return upto
