"""Reads CSV, TSV, JSON Lines, JSON and Parquet files into Arrow tables, and says in which line a file is broken."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from zorl.wording import counted

EXTENSIONS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")  # each also with .gz behind it

Line = tuple[int, list[str]]  # 1-based number of the line a row ends in, and its fields


def extension(path: Path) -> str:
    """The extension that says what is in the file, in lower case and without `.gz`: `Train.TSV.gz` is a `.tsv`."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def read_table(path: Path, wanted: Sequence[str], names: Sequence[str]) -> tuple[pa.Table, list[str]]:
    """Reads one file.

    Every value of a CSV or TSV file is text. A CSV file may quote fields with double quotes; in a TSV file quotes are
    ordinary characters. Their first line is a header where it holds all `wanted` columns. Otherwise these must be
    positions, counted from 0, and no line is a header.

    Args:
        path: a file with one of `EXTENSIONS`.
        wanted: columns that the caller is going to use, by name or position.
        names: what those columns are called where they are given by position, one each. Other columns keep their
            position as their name.

    Returns:
        The table, and what each wanted column is called in it.

    Raises:
        FileNotFoundError: there is no such file; the message lists the closest names in its folder.
        ValueError: another extension, a damaged, empty or ragged file, or a column that it does not have. The message
            names the file and the line.
    """
    kind = extension(path)
    if kind not in EXTENSIONS:
        raise ValueError(f"{path}: cannot tell what is in a {kind!r} file; expected one of {', '.join(EXTENSIONS)}")
    if kind in (".csv", ".tsv"):
        return _delimited(path, list(delimited_lines(path)), wanted, names)
    content = _content(path)
    if kind == ".parquet":
        table = _parquet(path, content)
    else:
        table = _from_objects(path, list(_json_objects(path, _text(path, content), kind)))
    check_columns(str(path), wanted, table.column_names)
    return table, list(wanted)


def delimited_lines(path: Path) -> Iterator[Line]:
    """The lines of a CSV or TSV file that hold anything, headers included.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or empty.
    """
    text = _text(path, _content(path))
    return _csv_lines(path, text) if extension(path) == ".csv" else _tsv_lines(text)


def check_columns(source: str, wanted: Iterable[str], columns: Sequence[str]) -> None:
    """Raises ValueError where a wanted column is not among `columns`, with the closest name and a list of them."""
    for name in wanted:
        if name not in columns:
            listed = ", ".join(repr(_shortened(column)) for column in columns)
            raise ValueError(f"{source} has no column {name!r}{did_you_mean(name, columns)} (columns: {listed})")


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """`; did you mean 'label'?`, or nothing where no candidate comes close."""
    close = difflib.get_close_matches(name, list(candidates), n=3)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def _content(path: Path) -> bytes:
    if not path.exists():
        folder = path.absolute().parent
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no file {str(path)!r}: the folder {str(folder)!r} does not exist")
        raise FileNotFoundError(
            f"there is no file {str(path)!r}{did_you_mean(path.name, sorted(p.name for p in folder.iterdir()))}"
        )
    content = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a complete gzip file: {error}") from error
    if not content.strip():
        raise ValueError(f"{path} is empty")
    return content


def _text(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise ValueError(f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from None


def _csv_lines(path: Path, text: str) -> Iterator[Line]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    usual = csv.field_size_limit(max(len(text), 1))  # a field may be a book; the usual limit is 131,072 characters
    try:
        return iter([(reader.line_num, fields) for fields in reader if fields])
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV: {error}") from None
    finally:
        csv.field_size_limit(usual)


def _tsv_lines(text: str) -> Iterator[Line]:
    # Not str.splitlines: it also splits at form feeds and Unicode line separators, which occur within texts.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip("\r"):
            yield number, line.removesuffix("\r").split("\t")


def _delimited(
    path: Path, lines: list[Line], wanted: Sequence[str], names: Sequence[str]
) -> tuple[pa.Table, list[str]]:
    if not lines:
        raise ValueError(f"{path} is empty")
    head = lines[0][1]
    if all(_is_header(head, name) for name in wanted):
        header, found, lines = list(head), list(wanted), lines[1:]
        for position, name in enumerate(header):
            if name in header[:position]:
                raise ValueError(f"{path}, line 1: the header names the column {name!r} twice")
    elif all(name.isdecimal() for name in wanted):
        header, found = [str(position) for position in range(len(head))], list(names)
        for name, called in zip(wanted, names, strict=True):
            if int(name) >= len(header):
                raise ValueError(f"{path} has no column {name}: its {len(header)} columns are 0 to {len(header) - 1}")
            header[int(name)] = called
    else:
        try:
            check_columns(f"{path}", wanted, head)
        except ValueError as error:
            other = _other_separator(head, wanted)
            hint = ". If the first line is no header, give positions: 0 is the first column"
            if other is not None:
                usual = "commas" if extension(path) == ".csv" else "tabs"
                hint = f"; the file seems to be separated by {other!r}: save it with {usual}"
            raise ValueError(f"{error}{hint}") from None
    for number, fields in lines:
        if len(fields) != len(header):
            size = counted(len(fields), "field", "fields")
            raise ValueError(f"{path}, line {number}: {size}, but the first line has {len(header)}")
    if not lines:
        raise ValueError(f"{path} has a header but no rows")
    columns = zip(*(fields for _, fields in lines), strict=True)
    return pa.table({name: pa.array(values, pa.string()) for name, values in zip(header, columns, strict=True)}), found


def _other_separator(head: Sequence[str], wanted: Sequence[str]) -> str | None:
    """What separates the wanted names in a first line that was read as one field; None where nothing does."""
    for separator in (";", ",", "\t", "|") if len(head) == 1 else ():
        if {*wanted} <= {name.strip(' "') for name in head[0].split(separator)}:
            return separator
    return None


def _is_header(head: Sequence[str], name: str) -> bool:
    """Whether a first line names this column. A number does so in its own place alone: elsewhere it is a value."""
    if name.isdecimal() and int(name) < len(head):
        return head[int(name)] == name
    return name in head


def _json_objects(path: Path, text: str, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`line 3`, object) of each line, or (`item 3`, object) where a .json file holds one array, or one object."""
    first = text.lstrip().split("\n", 1)[0]
    if kind == ".json" and (first.startswith("[") or not _is_json(first)):
        whole = _json(path, text)
        items = [
            (f"item {number}", item) for number, item in enumerate(whole if isinstance(whole, list) else [whole], 1)
        ]
    else:
        items = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                items.append((f"line {number}", _json(path, line, number)))
    for where, item in items:
        if not isinstance(item, dict):
            raise ValueError(
                f'{path}, {where}: expected an object such as {{"text": "…"}}, got {_shortened(repr(item))}'
            )
        yield where, item


def _json(path: Path, text: str, line: int | None = None) -> Any:
    """The value of a text: of this line of the file, or of the whole."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}" if line is None else f"line {line}"
        column = "" if line is None else f" (column {error.colno})"
        raise ValueError(f"{path}, {where}: not JSON: {error.msg}{column}") from None
    except (RecursionError, ValueError) as error:  # lists in lists without end, or a number of thousands of digits
        raise ValueError(f"{path}{'' if line is None else f', line {line}'}: cannot be read: {error}") from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _from_objects(path: Path, objects: list[tuple[str, dict[str, Any]]]) -> pa.Table:
    if not objects:
        raise ValueError(f"{path} holds no rows")
    columns = {}
    for where, item in objects:
        _check_characters(path, where, item)
    for name in dict.fromkeys(name for _, item in objects for name in item):
        values = [item.get(name) for _, item in objects]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, OverflowError) as error:
            held = [(where, item[name]) for where, item in objects if item.get(name) is not None]
            first_where, first = held[0]
            for where, value in held:
                if type(value) is not type(first):
                    raise ValueError(
                        f"{path}, {where}: column {name!r} holds {_shortened(repr(value))} ({type(value).__name__}), "
                        f"but {_shortened(repr(first))} ({type(first).__name__}) in {first_where}; one column, one type"
                    ) from None
            raise ValueError(f"{path}: column {name!r} cannot be stored: {error}") from None
    return pa.table(columns)


def _check_characters(path: Path, where: str, item: dict[str, Any]) -> None:
    try:
        json.dumps(item, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):x}"
        raise ValueError(
            f"{path}, {where}: {half} is half a character (a surrogate without its pair), which no tokenizer reads; take it out"
        ) from None


def _parquet(path: Path, content: bytes) -> pa.Table:
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from None
    if not table.num_rows:
        raise ValueError(f"{path} holds no rows")
    return table


def _shortened(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
