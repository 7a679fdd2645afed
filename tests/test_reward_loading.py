"""Rewards by name, as the command line takes them."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest

from zorl.rewards import accuracy, exact_match, f1, load_reward
from zorl.rewards.loading import SHIPPED

FILE = """
from dataclasses import dataclass

@dataclass
class Within:
    limit: int

    def __call__(self, completions, **columns):
        return [float(len(c) <= self.limit) for c in completions]

def short(completions, **columns):
    return [-len(c) for c in completions]

within_three = Within(3)
NUMBER = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my rewards.py"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize("name", ["accuracy", "f1", "balanced_accuracy", "matthews"])
def test_shipped_classification_rewards_load_by_name(name):
    reward = load_reward(name)
    assert reward == SHIPPED[name]()
    value = reward(completions=["a", "b"], label=["a", "b"])
    assert value == ([1.0, 1.0] if name == "accuracy" else 1.0)


@pytest.mark.parametrize("name", ["exact_match", "squad_f1"])
def test_shipped_text_rewards_load_by_name(name):
    assert load_reward(name)(completions=["x", "y"], answers=["x", "z"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("f1:average=weighted", f1("weighted")),
        ("f1:pos_label=1", f1(pos_label=1)),
        ("f1:pos_label=a:b", f1(pos_label="a:b")),
        ("f1: average = micro , column = gold", f1("micro", "gold")),
        ("accuracy:column=gold", accuracy("gold")),
        ("accuracy:", accuracy()),
    ],
)
def test_options_follow_a_colon(name, expected):
    assert load_reward(name) == expected


def test_the_callers_column_is_the_default_of_shipped_rewards():
    assert load_reward("f1", column="gold") == f1(column="gold")
    assert load_reward("exact_match", column="gold") == exact_match("gold")
    assert load_reward("f1:column=truth", column="gold") == f1(column="truth")


def test_a_function_of_a_package():
    from trl.rewards import think_format_reward

    assert load_reward("trl.rewards:think_format_reward", column="gold") is think_format_reward


def test_a_function_of_a_file_leaves_the_path_alone(file, monkeypatch):
    before = list(sys.path)
    short = load_reward(f"{file}:short")
    assert short(completions=["one", "three"]) == [-3, -5]
    assert sys.path == before
    monkeypatch.chdir(file.parent)
    assert load_reward("my rewards.py:short") is short  # the same file by another path is run once
    assert pickle.loads(pickle.dumps(short)) is short


def test_a_callable_object_of_a_file(file):
    assert load_reward(f"{file}:within_three")(completions=["one", "three"]) == [1.0, 0.0]


def test_files_of_one_name_do_not_mix(tmp_path):
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text(f"def reward(**columns):\n    return {value}\n")
    assert [load_reward(f"{tmp_path}/{folder}/same.py:reward")() for folder in "ab"] == [1, 2]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise OSError('licence server')\n", "OSError: licence server"),
        ("def reward(**columns)\n    return 1\n", r"SyntaxError: expected ':' \(broken\.py, line 1\)"),
        ("limit = unknown\n", "NameError: name 'unknown' is not defined"),
        ("import not_installed_anywhere\n", "ModuleNotFoundError: No module named 'not_installed_anywhere'"),
    ],
)
def test_a_file_that_cannot_be_run_says_why_and_can_be_repaired(tmp_path, code, message):
    path = tmp_path / "broken.py"
    path.write_text(code)
    with pytest.raises(ValueError, match=f"'{path}' cannot be run: {message}") as raised:
        load_reward(f"{path}:reward")
    assert type(raised.value.__cause__).__name__ == message.partition(":")[0]
    path.write_text("def reward(**columns):\n    return 0.25\n")
    assert load_reward(f"{path}:reward")() == 0.25


@pytest.mark.parametrize("name", ["package.of_mine", "json.of_mine"])
def test_a_module_that_is_not_there(name):
    with pytest.raises(ValueError, match=rf"there is no module '{name}'.*path/file.py:function"):
        load_reward(f"{name}:reward")


def test_a_module_that_misses_another_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "zorl_test_needs.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        load_reward("zorl_test_needs:reward")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "macro_f1",
            r"unknown reward 'macro_f1'; did you mean 'f1'\? \(zorl ships accuracy, f1, .*squad_f1, classifier\)",
        ),
        ("trl.rewards.think_format_reward", "unknown reward .*package.module:function"),
        ("", "unknown reward ''"),
        ("f1:averege=macro", r"'f1' has no option 'averege=macro'; did you mean 'average'\? \(it takes average=…"),
        ("f1:weighted", "'f1' has no option 'weighted'"),
        ("f1:average=all", "average must be one of"),
        ("acuracy:column=gold", "unknown reward 'acuracy'; did you mean 'accuracy'"),
        ("classifier", "needs an option: classifier:model=…"),
        ("classifier:model=./no/such,label=good", "cannot load './no/such'"),
        (
            "classifier:model=m,batch_size=many",
            "option 'batch_size' of reward 'classifier' must be a whole number, got 'many'",
        ),
        ("classifier:model=m,include_prompt=yes", "must be true or false, got 'yes'"),
        ("no/such.py:reward", "there is no file 'no/such.py'"),
        ("trl.rewards:", "incomplete"),
        (":reward", "incomplete"),
    ],
)
def test_names_that_mean_nothing_get_a_sentence(name, message):
    with pytest.raises(ValueError, match=message):
        load_reward(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shrot", r"has no 'shrot'; did you mean 'short'\? \(its functions: .*short"),
        ("NUMBER", "'NUMBER' of .* is of type int; expected a function"),
        ("Within", "'Within' of .* is of type type; expected a function"),
    ],
)
def test_what_a_file_does_not_hold_gets_a_sentence(file, name, message):
    with pytest.raises(ValueError, match=message):
        load_reward(f"{file}:{name}")
