"""Reward functions with TRL's signature, turned into checked numbers.

A reward function is called as `f(prompts=, completions=, completion_ids=, **columns, trainer_state=, log_extra=,
log_metric=)` and returns one number per completion (None: not applicable), or a single number for the whole batch, which
is how set-level metrics, such as F1, are written. Higher is better.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import numbers
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zorl import processes
from zorl.background_loop import BackgroundLoop
from zorl.reward_models import RewardModel
from zorl.suggestions import did_you_mean
from zorl.wording import counted

RewardFunction = Callable[..., Any]
# TRL passes every column of the data set to the function except these, which it passes under other names.
_NOT_PASSED = frozenset({"prompt", "completion", "completion_ids"})


class RewardError(ValueError):
    """A reward function raised, or returned something that is not a reward. The message names the function."""


@dataclass(frozen=True, slots=True)
class RewardValues:
    """The rewards of one batch of completions.

    Attributes:
        names: one per function.
        values: float32, shape `(functions, prompts)`, or `(functions, 1)` if set-level. NaN: not applicable.
        total: the weighted sum over functions, float32, shape `(prompts,)`, or `(1,)` if set-level. A function that
            abstained on a sample is left out of that sample's sum; NaN where all did.
        set_level: some function scored the batch as a whole; the values of the others are then means over the samples
            on which they did not abstain.
        extras: columns logged with `log_extra`; where processes share the work, in the first of them alone.
        metrics: numbers logged with `log_metric`, in the order of the calls.
    """

    names: tuple[str, ...]
    values: Tensor
    total: Tensor
    set_level: bool
    extras: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """Mean value of each function by name, over the samples it applies to; NaN if it applies to none."""
        return dict(zip(self.names, self.values.nanmean(dim=1).tolist(), strict=True))


def stack_totals(results: Sequence[RewardValues]) -> Tensor:
    """Totals of one batch's rewards at several points, shape `(points, prompts)`, or `(points, 1)` if any is set-level.

    A function may score the set at one point and abstain on every sample at another; the shape then follows the former.
    """
    if any(result.set_level for result in results):
        return torch.stack([result.total if result.set_level else result.total.nanmean(0, True) for result in results])
    return torch.stack([result.total for result in results])


class RewardFunctions:
    """One or several reward functions and their weights.

    Args:
        funcs: a callable with TRL's signature (synchronous or async), a `num_labels=1` sequence-classification model
            (its name, path or module), or a list of these.
        weights: one per function; 1 by default.
        processing_classes: tokenizers of the reward models, one per function (None for callables), or a single one.

    Raises:
        TypeError: a function is neither callable nor a model.
        ValueError: no function, wrong number of weights or processing classes, a weight that is not finite.
    """

    def __init__(
        self,
        funcs: RewardFunction | str | Path | nn.Module | Sequence[RewardFunction | str | Path | nn.Module],
        weights: Sequence[float] | None = None,
        processing_classes: Any = None,
    ) -> None:
        items = list(funcs) if isinstance(funcs, list | tuple) else [funcs]
        if not items:
            raise ValueError("reward_funcs is empty; give at least one reward function")
        tokenizers = list(processing_classes) if isinstance(processing_classes, list | tuple) else [processing_classes]
        if processing_classes is None:
            tokenizers = [None] * len(items)
        if len(tokenizers) != len(items):
            raise ValueError(f"{len(tokenizers)} reward processing classes for {len(items)} reward functions")
        self.weights = torch.ones(len(items)) if weights is None else torch.tensor([float(w) for w in weights])
        if len(self.weights) != len(items):
            raise ValueError(f"{len(self.weights)} reward weights for {len(items)} reward functions")
        if not self.weights.isfinite().all():
            raise ValueError(f"reward weights must be finite, got {self.weights.tolist()}")
        self.funcs: tuple[RewardFunction, ...] = tuple(
            _callable(item, tokenizer, i) for i, (item, tokenizer) in enumerate(zip(items, tokenizers, strict=True))
        )
        self.names = _unique([_name(func) for func in self.funcs])
        self._parameters = [_parameters(func) for func in self.funcs]
        self._loop = BackgroundLoop()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[list[int]],
        columns: Mapping[str, list[Any]],
        label_names: list[str] | None = None,
        trainer_state: Any = None,
    ) -> RewardValues:
        """Scores a batch.

        Args:
            prompts: strings or conversations.
            completions: one per prompt: a string, or a conversation's new messages.
            completion_ids: their tokens.
            columns: the other columns of these rows, one value per row.
            label_names: the task's full set of label names, if the prompt has label words.
            trainer_state: `transformers.TrainerState`.

        Raises:
            RewardError: a function raised, returned something that is not a reward, or asks for a column that is missing.
            ValueError: there is nothing to score, or a column has the name of another keyword argument.
        """
        if not len(completions):
            raise ValueError("there are no completions to score")
        extras: dict[str, list[Any]] = {}
        metrics: dict[str, list[float]] = {}
        keywords: dict[str, Any] = {
            "prompts": list(prompts),
            "completions": list(completions),
            "completion_ids": list(completion_ids),
            "trainer_state": trainer_state,
            "log_extra": lambda column, values: extras.setdefault(column, []).extend(values),
            "log_metric": lambda name, value: metrics.setdefault(name, []).append(float(value)),
        }
        if label_names is not None:
            keywords["label_names"] = list(label_names)
        if clash := sorted(keywords.keys() & columns.keys() - _NOT_PASSED):
            raise ValueError(f"data set column {clash[0]!r} has the name of an argument of reward functions; rename it")
        keywords |= {name: column for name, column in columns.items() if name not in _NOT_PASSED}

        def ask() -> dict[str, Any]:
            outputs = self._outputs(keywords, columns)
            found = [_values(name, out, len(completions)) for name, out in zip(self.names, outputs, strict=True)]
            return {"rows": [row.tolist() for row in found], "metrics": metrics}

        answer = processes.first(ask)  # a function may cost money, or give another answer when it is called again
        rows, metrics = [torch.tensor(row) for row in answer["rows"]], answer["metrics"]
        set_level = any(row.ndim == 0 for row in rows)
        if set_level:
            rows = [row.nanmean(dim=0, keepdim=True) if row.ndim else row[None] for row in rows]
        values = torch.stack(rows)  # (functions, prompts) or (functions, 1)
        total = (values * self.weights[:, None]).nansum(dim=0)
        total[values.isnan().all(dim=0)] = math.nan
        if total.isinf().any():  # its two sides could not be compared
            raise RewardError(
                f"the weighted sum of the rewards {', '.join(map(repr, self.names))} is {total[total.isinf()][0].item()}: it "
                "must be finite in float32; make them or their weights smaller"
            )
        return RewardValues(self.names, values, total, set_level, extras, metrics)

    def _outputs(self, keywords: dict[str, Any], columns: Mapping[str, list[Any]]) -> list[Any]:
        """What each function returns; async ones run together, after the others."""
        accepted = [
            _accepted(name, parameters, keywords, columns)
            for name, parameters in zip(self.names, self._parameters, strict=True)
        ]
        outputs: list[Any] = []
        try:
            for name, func, arguments in zip(self.names, self.funcs, accepted, strict=True):
                try:
                    output = func(**arguments)
                    outputs.append(list(output) if isinstance(output, Iterator) else output)
                except Exception as error:
                    raise _failure(name, error, keywords) from error
        except BaseException:
            for output in outputs:
                if inspect.iscoroutine(output):
                    output.close()
            raise
        pending = {i: output for i, output in enumerate(outputs) if inspect.isawaitable(output)}
        if pending:
            for i, result in zip(pending, self._loop.run(_gather(pending.values())), strict=True):
                if isinstance(result, Exception):
                    raise _failure(self.names[i], result, keywords) from result
                outputs[i] = result
        return outputs


def _callable(item: Any, processing_class: Any, index: int) -> RewardFunction:
    if isinstance(item, str | Path | nn.Module):
        return RewardModel(item, processing_class)
    if inspect.isclass(item) or not callable(item):
        raise TypeError(f"reward_funcs[{index}] must be a function or a reward model, got {item!r}")
    return item


def _name(func: RewardFunction) -> str:
    while isinstance(func, functools.partial):
        func = func.func
    return str(getattr(func, "__name__", type(func).__name__))


def _unique(names: list[str]) -> tuple[str, ...]:
    """Names are keys of the log, so a repeated one gets a number: f1, f1_2."""
    seen = [names[:i].count(name) for i, name in enumerate(names)]
    return tuple(f"{name}_{count + 1}" if count else name for name, count in zip(names, seen, strict=True))


def _parameters(func: RewardFunction) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(func).parameters.values())
    except (TypeError, ValueError):  # a builtin that hides its signature: give it everything, as TRL does
        return [inspect.Parameter("keywords", inspect.Parameter.VAR_KEYWORD)]


def _accepted(
    name: str, parameters: list[inspect.Parameter], keywords: dict[str, Any], columns: Mapping[str, list[Any]]
) -> dict[str, Any]:
    """The keyword arguments that the function takes."""
    for parameter in parameters:
        by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if by_name and parameter.default is parameter.empty and parameter.name not in keywords:
            raise RewardError(
                f"reward function {name!r} needs a column {parameter.name!r}, which the data set does not have"
                f"{did_you_mean(parameter.name, columns)} (columns: {', '.join(map(repr, columns)) or 'none'})"
            )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return keywords
    names = {parameter.name for parameter in parameters}
    return {key: value for key, value in keywords.items() if key in names}


async def _gather(awaitables: Iterable[Awaitable[Any]]) -> list[Any]:
    """Results in order, with exceptions among them, so that none is left running when another fails."""
    return await asyncio.gather(*awaitables, return_exceptions=True)


def _failure(name: str, error: Exception, keywords: dict[str, Any]) -> RewardError:
    step = getattr(keywords["trainer_state"], "global_step", None)
    when = "" if step is None else f" at step {step}"
    first = repr(keywords["prompts"][0])
    return RewardError(
        f"reward function {name!r} raised {type(error).__name__}{when}, on a batch of {len(keywords['completions'])} "
        f"that begins with prompt {first if len(first) <= 80 else first[:77] + '…'}: {error}"
    )


def _values(name: str, output: Any, count: int) -> Tensor:
    """Checked rewards as float32: shape `(count,)`, or `()` for a single number. NaN stands for None."""
    expected = f"expected a list of {count} numbers, or one number for the whole batch"
    if isinstance(output, Tensor | np.ndarray):
        if output.ndim > 1:
            raise RewardError(f"reward function {name!r} returned an array of shape {tuple(output.shape)}; {expected}")
        output = _read(name, output.tolist, expected)
    if output is None:
        raise RewardError(f"reward function {name!r} returned None ({expected}); does it lack a return statement?")
    if isinstance(output, numbers.Real | np.bool_):
        return torch.tensor(_number(name, output, "for the batch"))
    if isinstance(output, str | bytes | Mapping | Set) or not isinstance(output, Iterable):
        raise RewardError(f"reward function {name!r} returned {_short(output)}; {expected}")
    items = _read(name, lambda: list(output), expected)
    if len(items) != count:
        found = f"{counted(len(items), 'reward', 'rewards')} for {counted(count, 'completion', 'completions')}"
        raise RewardError(f"reward function {name!r} returned {found}; {expected}")
    return torch.tensor([math.nan if v is None else _number(name, v, f"for sample {i}") for i, v in enumerate(items)])


def _read(name: str, values: Callable[[], Any], expected: str) -> Any:
    """What a tensor or a sequence of the user's own holds."""
    try:
        return values()
    except Exception as error:  # a tensor without storage, an iteration that fails: anything
        raise RewardError(f"what reward function {name!r} returned cannot be read: {error!r}; {expected}") from error


def _number(name: str, value: Any, where: str) -> float:
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = _read(name, value.item, "expected a number or None")
    if not isinstance(value, numbers.Real | np.bool_):
        raise RewardError(f"reward function {name!r} returned {_short(value)} {where}; expected a number or None")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except Exception as error:  # of a number class of the user's own
        raise RewardError(f"reward function {name!r} returned {_short(value)} {where}: {error!r}") from error
    if math.isnan(number):
        raise RewardError(f"reward function {name!r} returned NaN {where}; return None where it is not applicable")
    if not math.isfinite(number) or abs(number) > torch.finfo(torch.float32).max:
        raise RewardError(f"reward function {name!r} returned {number} {where}; a reward must be finite in float32")
    return number


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        text = "(which cannot be shown)"
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '…'}"
