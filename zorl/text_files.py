"""Text files, which must be UTF-8, with or without a byte-order mark."""

from __future__ import annotations

from pathlib import Path


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8; the message names the file, the line and the byte.
    """
    return decoded(path, path.read_bytes()).replace("\r\n", "\n")


def decoded(path: Path, content: bytes) -> str:
    """A file's content as text, with its line ends unchanged; raises ValueError as `read_text` does."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise ValueError(f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from None
