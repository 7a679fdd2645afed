"""Text files, which are to be UTF-8, with a byte-order mark or without."""

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
    """The text that a file's content is, line ends as they are; raises ValueError as `read_text` does."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise ValueError(f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from None
