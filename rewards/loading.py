"""Reward functions and judges by name, as the command line takes them.

    f1                               a reward that zorl ships
    f1:average=weighted,column=gold  the same with options
    package.module:name              a function of an installed package, or of the PYTHONPATH
    path/to/file.py:name             a function of a file, which is run

A judge is one of

    human                            people, by way of a judgment store
    reward:NAME                      any of the above; the answer with the higher reward wins
    classifier:MODEL,label=good      a classifier's opinion on one label (a model with one logit needs none)
    model:MODEL                      a language model that reads both answers
    path/to/file.py:name             a function that is a judge itself, or package.module:name

Nothing here changes sys.path.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from zorl.reward_functions import RewardFunction
from zorl.rewards.classification import accuracy, balanced_accuracy, f1, matthews
from zorl.rewards.classifier import classifier
from zorl.rewards.text import exact_match, squad_f1
from zorl.suggestions import did_you_mean

if TYPE_CHECKING:
    from zorl.judge_objective import Judge

SHIPPED: dict[str, Callable[..., RewardFunction]] = {
    "accuracy": accuracy,
    "f1": f1,
    "balanced_accuracy": balanced_accuracy,
    "matthews": matthews,
    "exact_match": exact_match,
    "squad_f1": squad_f1,
    "classifier": classifier,
}
_JUDGES = ("reward", "classifier", "model")
_KNOWN_JUDGES = "a judge is human, reward:NAME, classifier:MODEL, model:MODEL, or your own as path/file.py:function"


def load_reward(name: str, *, column: str | None = None) -> RewardFunction:
    """The reward function that a name on the command line stands for.

    Args:
        name: a shipped reward, with options or without, `package.module:name`, or `path/file.py:name`.
        column: the data set's column where shipped rewards find the truth, unless their options say otherwise.

    Raises:
        ValueError: there is no such reward, module, file or function, a file cannot be run, or an option is unknown. An error
            inside the user's module is raised as it is.
    """
    shipped, _, options = name.partition(":")
    if shipped in SHIPPED:
        return _shipped(shipped, options, column)
    _, colon, tail = name.rpartition(":")
    if not colon:
        own = "name your own as package.module:function or path/file.py:function"
        raise ValueError(f"{_unknown_reward(name)}; {own}")
    if "=" in tail:
        raise ValueError(_unknown_reward(shipped))
    return load_function(name)


def load_judge(name: str, *, column: str | None = None, judgments: str | Path | None = None) -> Judge:
    """The judge that a name on the command line stands for.

    Args:
        name: human, reward:NAME, classifier:MODEL, model:MODEL, or a function of your own.
        column: the data set's column where shipped rewards find the truth.
        judgments: the judgment store of `human`, a file or a URL; a file is created if it is not there.

    Raises:
        ValueError: there is no such judge, its file cannot be run, its model cannot be loaded, `human` is given no store, or
            another judge is given one.
        OSError: there is no such language model.
    """
    if name == "human":
        if judgments is None:
            raise ValueError("the judge 'human' needs a file to meet people in: --judgments FILE.sqlite")
        from zorl.rewards.human import HumanJudge

        return HumanJudge(judgments)
    if judgments is not None:
        raise ValueError(f"--judgments is where people judge, and the judge is {name!r}; leave it out, or use 'human'")
    kind, colon, rest = name.partition(":")
    if kind not in _JUDGES:
        if not colon:
            raise ValueError(f"unknown judge {name!r}{did_you_mean(kind, ['human', *_JUDGES])} ({_KNOWN_JUDGES})")
        return load_function(name, "judge")
    if not rest:
        raise ValueError(f"the judge {name!r} is incomplete; {_KNOWN_JUDGES}")
    from zorl.rewards.judges import ClassifierJudge, LanguageModelJudge, RewardJudge

    if kind == "reward":
        return RewardJudge(load_reward(rest, column=column))
    if kind == "model":
        return LanguageModelJudge(rest)
    model, comma, option = rest.partition(",")
    key, _, label = option.partition("=")
    if comma and (key != "label" or not label):
        raise ValueError(f"the judge 'classifier' has no option {option!r}; it takes label=…")
    return ClassifierJudge(model, label or None)


def load_function(name: str, what: str = "reward") -> Callable[..., Any]:
    """The function or callable object that a name stands for.

    Args:
        name: `package.module:name` or `path/file.py:name`.
        what: its purpose, for messages.

    Raises:
        ValueError: the name is incomplete, there is no such module, file or function, or the file cannot be run.
    """
    head, _, tail = name.rpartition(":")
    if not head or not tail:
        raise ValueError(f"{what} {name!r} is incomplete; expected package.module:function or path/file.py:function")
    module = load_file(Path(head)) if head.endswith(".py") else _from_package(head)
    return _member(module, tail, head)


def _shipped(name: str, options: str, column: str | None) -> RewardFunction:
    factory = SHIPPED[name]
    known = inspect.signature(factory).parameters
    arguments: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        key, equals, value = (part.strip() for part in option.partition("="))
        if key not in known or not equals:
            raise ValueError(
                f"reward {name!r} has no option {option!r}{did_you_mean(key, known)} (it takes {'=…, '.join(known)}=…)"
            )
        arguments[key] = _parsed(value, known[key].default, f"option {key!r} of reward {name!r}")
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in arguments:
            raise ValueError(f"reward {name!r} needs an option: {name}:{key}=…")
    if column is not None and "column" in known:
        arguments.setdefault("column", column)
    return factory(**arguments)


def _unknown_reward(name: str) -> str:
    return f"unknown reward {name!r}{did_you_mean(name, SHIPPED)} (zorl ships {', '.join(SHIPPED)})"


def _parsed(value: str, default: Any, what: str) -> str | int | bool:
    """An option's value, in the type of its default."""
    if isinstance(default, bool):
        if value not in ("true", "false"):
            raise ValueError(f"{what} must be true or false, got {value!r}")
        return value == "true"
    if isinstance(default, int):
        if not value.isdecimal():
            raise ValueError(f"{what} must be a whole number, got {value!r}")
        return int(value)
    return value


def _from_package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # the module is there, but fails to import another
        raise ValueError(
            f"there is no module {name!r} (no {error.name!r}); is the package installed? A file is given with its path "
            f"and ending, as in path/file.py:function"
        ) from error


def load_file(path: Path) -> ModuleType:
    """A Python file as a module. It is run once per process.

    Raises:
        ValueError: there is no such file, or it raises an error, which is then the cause.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r} to load")
    path = path.resolve()
    # The module must be registered by name, for its functions to be pickled and its dataclasses to work. The hash keeps
    # files of the same name apart.
    name = f"zorl_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{str(path)!r} cannot be loaded as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception):
            raise ValueError(f"{str(path)!r} cannot be run: {type(error).__name__}: {error}") from error
        raise
    return module


def _member(module: ModuleType, name: str, source: str) -> RewardFunction:
    functions = [
        key for key, value in vars(module).items() if callable(value) and not inspect.isclass(value) and key[0] != "_"
    ]
    member = getattr(module, name, None)
    if member is None:
        found = ", ".join(functions) or "none"
        raise ValueError(f"{source!r} has no {name!r}{did_you_mean(name, functions)} (its functions: {found})")
    if inspect.isclass(member) or not callable(member):
        raise ValueError(
            f"{name!r} of {source!r} is of type {type(member).__name__}; expected a function or callable object"
        )
    return member
