"""A command that did only a part of its work."""

from __future__ import annotations


class PartialResult(ValueError):  # noqa: N818
    """Part of the work failed. The message says which part, and the exit status is that of an error.

    Args:
        message: what failed, and what to do.
        output: what the command prints about the rest.
    """

    def __init__(self, message: str, output: str) -> None:
        super().__init__(message)
        self.output = output
