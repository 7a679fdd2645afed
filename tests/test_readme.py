"""The README: its tree is the tree, its blocks are code, and its figures come from a benchmark."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks whose fence names this language ("" for none)."""
    return [
        text
        for fence, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.M)
        if fence == language
    ]


def test_the_tree_lists_every_module_of_the_engine_and_nothing_else() -> None:
    (tree,) = (block for block in blocks("") if block.startswith("zorl/"))
    engine = tree.split("rewards/", 1)[0].splitlines()[1:]
    listed = {line.split()[0] for line in engine if line.strip()}
    found = {path.name for path in (ROOT / "zorl").glob("*.py")} | {"baselines/", "kernels/", "tasks/"}
    assert listed == found - {"__init__.py"}
    assert all(len(line.split(maxsplit=1)) == 2 for line in tree.splitlines() if line.strip())


@pytest.mark.parametrize("block", blocks("python"))
def test_every_python_block_parses_and_imports_what_exists(block: str) -> None:
    tree = ast.parse(re.sub(r", \.\.\.\)", ")", block))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("zorl"):
            module = __import__(node.module, fromlist=[alias.name for alias in node.names])
            assert all(getattr(module, alias.name) is not None for alias in node.names)


def test_the_files_that_the_readme_links_to_exist() -> None:
    links = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert links
    assert [target for target in links if not (ROOT / target).exists()] == []
