"""Reads flags and a YAML file into the fields of dataclasses.

transformers' `HfArgumentParser` makes a flag of every field.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser

from zorl.apps.commands import Command
from zorl.suggestions import did_you_mean
from zorl.text_files import read_text

Built = TypeVar("Built")
CONFIG = "config"
_PATHS = ("model", "trajectory", "output_dir", "output", "plot")


def parse(command: Command, argv: Sequence[str]) -> dict[str, Any]:
    """The values that were given, by name of the field: those of flags win over those in the `--config` file.

    Raises:
        ValueError: a flag or key is unknown, or a value has the wrong type.
    """
    parser = _Parser(command.types(), prog=f"zorl {command.name}", add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{CONFIG}")
    given = vars(parser.known(argv))
    file = given.pop(CONFIG, None)
    if file is not None:
        given = {**_read(Path(file), parser, given), **given}
    # A shell expands ~ only where it begins a word: not in --model=~/m, and not in a file.
    return given | {name: str(Path(given[name]).expanduser()) for name in _PATHS if given.get(name, "").startswith("~")}


def build(kind: type[Built], values: Mapping[str, Any]) -> Built:
    """An instance of a dataclass from those values that are its fields; other fields keep their defaults."""
    return kind(**{f.name: values[f.name] for f in fields(kind) if f.init and f.name in values})  # type: ignore[arg-type]


class _Parser(HfArgumentParser):
    """Raises errors instead of exiting, and suggests the flag that an unknown one resembles."""

    @property
    def names(self) -> list[str]:
        """The names of all fields."""
        return [f.name for kind in self.dataclass_types for f in fields(kind) if f.init]

    def add_argument(self, *flags: Any, **options: Any) -> argparse.Action:
        # Flags that are not given are left out: a default would look like a given value and hide that of the YAML file.
        return super().add_argument(*flags, **{**options, "default": argparse.SUPPRESS})

    def known(self, argv: Sequence[str]) -> argparse.Namespace:
        namespace, rest = self.parse_known_args(list(argv))
        if rest:
            flag = next((word for word in rest if word.startswith("-")), rest[0])
            name = flag.split("=")[0]
            if not name.startswith("-"):
                raise ValueError(f"unexpected argument {name!r}: values follow a flag, quoted where they hold spaces")
            flags = [f"--{known}" for known in self.names]
            meant = did_you_mean(f"--{name.strip('-').replace('-', '_')}", flags, most=1)
            raise ValueError(f"unknown flag {name}{meant}")
        return namespace

    def error(self, message: str) -> NoReturn:
        # "argument --max_steps/--max-steps: invalid int value: 'x'"
        raise ValueError(re.sub(r"^argument (--\w+)(/--[\w-]+)*", r"\1", message))


class _Texts(yaml.BaseLoader):
    """Reads every scalar as text, because YAML's own types turn the label "no" into False, and what is absent as None; refuses
    duplicate keys.
    """

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        absent = node.style is None and node.value in ("", "null", "~")  # without quotes
        return None if absent else super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} occurs twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read(path: Path, parser: _Parser, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a YAML file, without those in `given`."""
    try:
        content = yaml.load(read_text(path), Loader=_Texts) or {}
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected lines such as 'model: facebook/opt-125m', found a {type(content).__name__}")
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in parser.names:
            raise ValueError(f"{path}: unknown key {key!r}{did_you_mean(key, parser.names)}")
        if key in given or value in (None, [], {}):
            continue
        if isinstance(value, dict) and key == "label_words":
            values[key] = value
            continue
        items = value if isinstance(value, list) else [value]
        words = [item if isinstance(item, str) else json.dumps(item) for item in items]
        try:
            values |= vars(parser.known([f"--{key}={words[0]}"] if len(words) == 1 else [f"--{key}", *words]))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return values
