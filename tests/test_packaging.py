"""What is installed under which name, what importing it loads, and who may import whom."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import zorl

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"zorl": "zorl", "zorl.rewards": "rewards", "zorl.apps": "apps"}  # package: where it lies
LAYERS = ["zorl", "zorl.rewards", "zorl.apps"]  # each may import itself and those before it


def modules() -> list[tuple[str, Path]]:
    """(installed name, file) of every module; packages are named without `__init__`."""
    found = []
    for package, folder in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *file.relative_to(ROOT / folder).with_suffix("").parts]
            found.append((".".join(parts).removesuffix(".__init__"), file))
    return found


def layer(module: str) -> int:
    """The layer of a module of ours."""
    return max(i for i, name in enumerate(LAYERS) if f"{module}.".startswith(f"{name}."))


def imported(file: Path, package: str) -> set[str]:
    """Full names of all that a file imports, anywhere in it: `import a.b` is a.b, `from a import b` is a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names.update({base, *(f"{base}.{alias.name}" for alias in node.names)})
    return names


def run(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_zorl_loads_no_user_interface_and_no_library_that_only_rewards_or_apps_need() -> None:
    heavy = "{'gradio', 'trl', 'sklearn', 'matplotlib', 'transformers'}"
    assert run(f"import sys, zorl; print(sorted({heavy} & sys.modules.keys()))") == "[]"


def test_the_optimizer_alone_loads_no_trainer() -> None:
    heavy = "{'gradio', 'trl', 'sklearn', 'matplotlib', 'transformers.trainer', 'datasets'}"
    assert run(f"import sys; from zorl import MeZO; print(sorted({heavy} & sys.modules.keys()))") == "[]"


def test_everything_that_zorl_exports_is_there() -> None:
    for name in zorl.__all__:
        assert getattr(zorl, name) is not None
    with pytest.raises(AttributeError, match="module 'zorl' has no attribute 'Mezo'"):
        zorl.Mezo  # noqa: B018


@pytest.mark.parametrize(("module", "file"), modules(), ids=[name for name, _ in modules()])
def test_imports_never_run_upward(module: str, file: Path) -> None:
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for name in imported(file, package):
        top = name.partition(".")[0]
        if top == "zorl":
            assert layer(name) <= layer(module), f"{module} imports {name}"
        assert top not in ("rewards", "apps", "tests"), f"{module} imports {name} by its bare name"
        assert top != "gradio" or module.startswith("zorl.apps"), f"{module} imports gradio"


def test_the_check_of_imports_sees_every_way_to_import(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("import a.b\ndef f():\n    from .. import c\n    from .d import e\n    from zorl import apps\n")
    seen = imported(file, "zorl.kernels")
    assert {"a.b", "zorl.c", "zorl.kernels.d", "zorl.kernels.d.e", "zorl.apps"} <= seen
    assert [layer(name) for name in ("zorl.appster", "zorl.apps.cli", "zorl.rewards", "zorl")] == [0, 2, 1, 0]


def test_every_folder_with_modules_is_installed() -> None:
    packages = {module if file.name == "__init__.py" else module.rpartition(".")[0] for module, file in modules()}
    assert packages == set(PROJECT["tool"]["setuptools"]["packages"])
    assert PROJECT["tool"]["setuptools"]["package-dir"] == FOLDERS


def test_the_command_and_the_type_marker_are_installed() -> None:
    (command,) = entry_points(group="console_scripts", name="zorl")
    assert command.value == "zorl.apps.cli:main"
    assert callable(command.load())
    assert (files("zorl") / "py.typed").is_file()


def test_the_version_is_the_same_everywhere() -> None:
    newest = re.search(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert zorl.__version__ == PROJECT["project"]["version"] == newest[1]


def test_every_dependency_is_capped_and_pinned_within_its_cap() -> None:
    project = PROJECT["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in pairs}
    for requirement in map(Requirement, project["dependencies"]):
        assert any(part.operator == "<" for part in requirement.specifier), f"{requirement} has no cap"
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        if requirement.name not in ("zorl", "setuptools"):
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(tmp_path: Path) -> None:
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = "import setuptools.build_meta as build; build.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    unpacked = [path for path in (tmp_path / "installed").rglob("*") if path.is_file()]
    installed = {path.relative_to(tmp_path / "installed").as_posix() for path in unpacked}
    expected = {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in installed if ".dist-info/" not in name} == expected
    assert f"zorl-{zorl.__version__}.dist-info/licenses/LICENSE" in installed


def test_every_module_can_be_imported() -> None:
    for name, _ in modules():
        if name == "zorl.kernels.cuda" and importlib.util.find_spec("triton") is None:
            continue  # Triton comes with torch's builds for CUDA alone
        assert importlib.import_module(name) is not None
