"""What users and disks may hand over, at random: it is read as it is, or refused with one sentence, and never misread."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from zorl import MeZO, MeZOConfig, Prompt
from zorl.apps.command_line import parse
from zorl.apps.commands import TRAIN
from zorl.data import load_rows
from zorl.reward_functions import RewardError, RewardFunctions
from zorl.run_folder import RunFolder
from zorl.schedules import Directions
from zorl.trajectory import Record, Trajectory, TrajectoryError, read

few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Surrogates, controls, combining marks, right-to-left marks and what is beyond the basic plane included.
texts = st.text(st.characters(exclude_categories=()), max_size=30)
odd_numbers = st.one_of(
    st.floats(), st.integers(-(2**70), 2**70), st.sampled_from([0, -1, 1e-320, 1e308, None, "x", "", []])
)


def attempt(error: type[Exception], action: Callable[[], Any]) -> tuple[Any, str | None]:
    """What an action gives, and None; or None, and the sentence that the command line shows where it is refused."""
    try:
        return action(), None
    except error as refused:
        said = " ".join(str(refused).split())
    assert 10 < len(said) < 1200, said
    return None, said


# --- trajectories -----------------------------------------------------------------------------------------------------

TARGET = torch.linspace(-1, 1, 7)


def tuned(path: Path | None, steps: int) -> tuple[torch.Tensor, MeZO]:
    """The weights after so many steps in all of a run that goes on where the file ends."""
    w = torch.zeros(7)
    optimizer = MeZO([("w", w)], lr=0.1, n_spsa="1-3/20", trajectory=path)
    while optimizer.steps < steps:
        optimizer.step(lambda: (w - TARGET).square().sum())
    optimizer.close()
    return w, optimizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[Record], torch.Tensor]:
    """The file of a run of 40 steps, its records, and the weights at its end."""
    path = tmp_path_factory.mktemp("run") / "trajectory.zorl"
    w, _ = tuned(path, 40)
    return path.read_bytes(), read(path)[1], w


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """What can befall a file: bits flip; a part is lost, doubled, moved or overwritten; the end is cut off or grows."""
    kind = draw(st.sampled_from(["bits", "lost", "doubled", "moved", "zeros", "cut", "grown"]))
    a, b, size = draw(st.floats(0, 1)), draw(st.floats(0, 1)), draw(st.integers(1, 300))
    bits = draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), min_size=1, max_size=6, unique=True))
    tail = draw(st.binary(min_size=1, max_size=100))

    def damage(data: bytes) -> bytes:
        i, j = int(a * (len(data) - 1)), int(b * (len(data) - 1))
        part, rest = data[i : i + size], data[:i] + data[i + size :]
        if kind == "bits":
            flipped = bytearray(data)
            for where, bit in bits:
                flipped[int(where * (len(data) - 1))] ^= 1 << bit
            return bytes(flipped)
        return {
            "lost": rest, "doubled": data[:j] + part + data[j:], "moved": rest[:j] + part + rest[j:],
            "zeros": data[:i] + bytes(len(part)) + data[i + size :], "cut": data[:i], "grown": data + tail,
        }[kind]  # fmt: skip

    return damage


@given(damages())
@settings(few, max_examples=300)
def test_a_damaged_trajectory_is_refused_or_gives_the_steps_that_were_taken(
    run: tuple[bytes, list[Record], torch.Tensor], tmp_path: Path, damage: Callable[[bytes], bytes]
):
    intact, records, _ = run
    data = damage(intact)
    path = tmp_path / "trajectory.zorl"
    path.write_bytes(data)
    found, refused = attempt(TrajectoryError, lambda: read(path)[1])
    if refused is not None:
        assert str(path) in refused
        assert data != intact
        return
    assert list(map(bytes, found)) == list(map(bytes, records[: len(found)]))
    assert intact.startswith(data), "what is read without complaint is the file, or what it was at an earlier step"


@given(damages())
@settings(few, max_examples=60)
def test_a_damaged_run_is_refused_or_continues_to_the_bits_of_the_undamaged_one(
    run: tuple[bytes, list[Record], torch.Tensor], tmp_path: Path, damage: Callable[[bytes], bytes]
):
    intact, _, end = run
    path = tmp_path / "trajectory.zorl"
    data = damage(intact)
    path.write_bytes(data)
    continued, refused = attempt(TrajectoryError, lambda: tuned(path, 40))
    if refused is not None:
        assert str(path) in refused
        assert path.read_bytes() == data, "a file that is refused is left as it is"
        return
    w, optimizer = continued
    assert torch.equal(w, end)
    assert path.read_bytes() == intact
    assert optimizer.truncated or intact.startswith(data), "it is said when steps are done again"


def test_a_header_that_another_zlib_packed_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import zlib

    packed = zlib.compress
    path = tmp_path / "trajectory.zorl"
    with monkeypatch.context() as other:
        other.setattr("zorl.trajectory.zlib.compress", lambda data, level: packed(data, 0))
        tuned(path, 20)
    w, optimizer = tuned(path, 40)
    assert optimizer.truncated is None
    assert len(read(path)[1]) == 40
    assert torch.equal(w, tuned(None, 40)[0])


@given(damages())
@few
def test_damaged_first_values_are_refused_and_leave_the_weights(
    run: tuple[bytes, list[Record], torch.Tensor], tmp_path: Path, damage: Callable[[bytes], bytes]
):
    folder = RunFolder(tmp_path)
    first = {"w": torch.linspace(0, 1, 64)}
    save_file(first, folder.init)
    folder.trajectory.unlink(missing_ok=True)
    digest = folder.keep_init(first, list(first))
    Trajectory.create(folder.trajectory, {"schema": 1, "n_spsa": "1", "init_sha256": digest}).close()
    intact = folder.init.read_bytes()
    data = damage(intact)
    folder.init.write_bytes(data)
    weights = {"w": torch.zeros(64)}
    kept, refused = attempt(TrajectoryError, lambda: folder.keep_init(weights, []))
    if refused is not None:
        assert "init.safetensors" in refused
        assert not weights["w"].any()
        assert data != intact
        return
    assert kept == digest
    assert torch.equal(weights["w"], first["w"])


@given(damages())
@few
def test_damaged_settings_of_a_run_are_refused_by_name_or_are_json(tmp_path: Path, damage: Callable[[bytes], bytes]):
    folder = RunFolder(tmp_path)
    folder.write_settings({"prompt": {"template": "{text} It was {mask}."}, "label": "großartig", "step": 300})
    folder.settings.write_bytes(damage(folder.settings.read_bytes()))
    _, refused = attempt(ValueError, folder.read_settings)
    assert refused is None or "zorl.json is damaged" in refused


# --- settings ---------------------------------------------------------------------------------------------------------

NUMBERS = (
    "learning_rate", "epsilon", "beta1", "beta2", "moment_window", "informative_target", "temperature", "top_p", "top_k",
    "max_length", "max_completion_length", "lora_rank", "lora_alpha", "prefix_tokens", "block_scales_every", "seed",
    "forward_batch_size", "calibration_rows", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "logging_steps", "eval_steps", "save_steps",
)  # fmt: skip


@given(st.sampled_from(NUMBERS), odd_numbers)
@settings(few, max_examples=400)
def test_a_number_out_of_its_range_is_refused_by_its_name(tmp_path: Path, name: str, value: Any):
    config, refused = attempt(ValueError, lambda: MeZOConfig(output_dir=str(tmp_path), **{name: value}))
    if refused is not None:
        assert name in refused
        return
    kept = getattr(config, name)
    assert kept is None or isinstance(kept, str) or math.isfinite(kept), "what is accepted is a number to compute with"


@given(st.one_of(texts, st.from_regex(r"\s*\d+(-\d+/\d+)?\s*"), st.integers()), st.integers(0, 10**9))
@few
def test_a_schedule_is_refused_or_asks_for_directions_at_every_step(value: Any, step: int):
    planned, refused = attempt(ValueError, lambda: Directions.parse(value))
    if refused is not None:
        assert "n_spsa" in refused
        return
    assert min(planned.start, planned.end) <= planned.at(step) <= max(planned.start, planned.end)
    assert Directions.parse(str(planned)).at(step) == planned.at(step)


yaml_values = st.recursive(
    st.one_of(texts, st.integers(), st.floats(), st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
keys = st.one_of(
    st.sampled_from(["max_steps", "learning_rate", "prompt", "reward", "label_words", "eval_steps", "fp16"]), texts
)
DEEP = "[" * 1100 + "]" * 1100  # more than Python's stack holds
files = st.one_of(
    st.dictionaries(keys, yaml_values, max_size=3).map(lambda values: yaml.safe_dump(values, allow_unicode=True)),
    texts,
    st.sampled_from(
        [
            DEEP,
            f"max_steps: {DEEP}",
            "reward: &a [*a]",
            "label_words: &a {b: *a}",
            "? [a]\n: b",
            "max_steps: *x",
            "a: b: c",
        ]
    ),
).map(lambda text: text.encode("utf-8", "surrogatepass"))


@given(st.one_of(files, st.binary(max_size=40)))
@settings(few, max_examples=100)
def test_a_yaml_file_is_read_or_refused_by_its_name(tmp_path: Path, content: bytes):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    values, refused = attempt(ValueError, lambda: parse(TRAIN, ["--config", str(path)]))
    assert isinstance(values, dict) if refused is None else str(path) in refused


# --- data -------------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.one_of(texts, st.integers(-(2**80), 2**80), st.floats(), st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=5,
)
objects = st.fixed_dictionaries({"text": json_values, "label": json_values}, optional={"other": json_values})
json_lines = st.lists(objects, min_size=1, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
HARD = [
    f'{{"text": "a", "label": {DEEP}}}', f'{{"text": "a", "label": {"9" * 5000}}}', '{"text": "\\ud83d", "label": 1}',
    '{"text": "a", "\\udc00": 1, "label": 1}', f'{{"text": "a", "label": {"[" * 200 + "]" * 200}}}', '{"text": {}, "label": {}}',
]  # fmt: skip


@given(
    st.sampled_from(["csv", "tsv", "json", "jsonl", "parquet", "csv.gz", "jsonl.gz"]),
    st.one_of(
        json_lines,
        st.binary(max_size=60),
        texts.map(lambda t: t.encode("utf-8", "surrogatepass")),
        st.sampled_from(HARD).map(str.encode),
    ),
)
@settings(few, max_examples=250)
def test_a_data_set_is_read_or_refused_by_its_name(tmp_path: Path, suffix: str, content: bytes):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(content)
    rows, refused = attempt(ValueError, lambda: load_rows(path, text_column="text", label_column="label"))
    if refused is not None:
        assert str(path) in refused
        return
    for row in rows.dataset:
        assert row["text"] is not None
        json.dumps(row, ensure_ascii=False, default=str).encode()  # any tokenizer can read it


@given(st.lists(objects, min_size=1, max_size=4))
@few
def test_rows_that_are_read_are_the_rows_of_the_file(tmp_path: Path, values: list[dict[str, Any]]):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, values)), encoding="utf-8")
    found, refused = attempt(
        ValueError, lambda: load_rows(path, text_column="text", label_column="label").dataset.to_list()
    )
    if refused is not None:
        return
    for name in ("text", "label"):
        for row, value in zip(found, values, strict=True):
            if isinstance(value[name], str | bool):
                assert row[name] == value[name]


def test_a_field_of_a_csv_file_may_be_a_book(tmp_path: Path):
    book = "It was the best of times. " * 10_000
    path = tmp_path / "books.csv"
    path.write_text(f'text,label\n"{book}",1\n', encoding="utf-8")
    assert load_rows(path, text_column="text").dataset[0]["text"] == book


# --- prompts ----------------------------------------------------------------------------------------------------------


def encodes(text: str) -> bool:
    with contextlib.suppress(UnicodeEncodeError):
        return bool(text.encode()) or True
    return False


@given(
    texts, st.one_of(st.none(), st.dictionaries(texts, st.one_of(texts, st.none(), st.integers()), max_size=3), texts)
)
@settings(few, max_examples=150)
def test_a_prompt_is_refused_or_renders_around_any_text(template: str, words: Any):
    prompt, refused = attempt(ValueError, lambda: Prompt(template, words))
    if refused is not None:
        return
    rendered = prompt.render(dict.fromkeys(prompt.fields, "x"))
    assert encodes(rendered.before + rendered.after)
    assert Prompt.from_dict(json.loads(json.dumps(prompt.to_dict()))) == prompt


@given(texts, texts, st.sampled_from(["bert", "gpt2", "llama", "qwen2"]))
@settings(few, max_examples=150)
def test_any_text_reaches_the_tokenizer_or_its_column_is_named(
    parts: Callable[[str], Any], text: str, word: str, kind: str
):
    tokenizer = parts(kind).tokenizer
    words = {"bad": "terrible", "good": word}
    rendered, refused = attempt(ValueError, lambda: Prompt("{text} It was {mask}.", words).render({"text": text}))
    if refused is not None:
        assert "'text'" in refused or "label word" in refused
        assert not (encodes(text) and encodes(word) and word.strip() not in ("", "terrible"))
        return
    assert isinstance(tokenizer(rendered.before + rendered.after)["input_ids"], list)


# --- rewards ----------------------------------------------------------------------------------------------------------


class Fails:
    """An object whose every use is an error."""

    def _fail(self, *arguments: Any) -> Any:
        raise ZeroDivisionError("not to be used")

    __iter__ = __repr__ = __len__ = __bool__ = __float__ = _fail


class FailingFloat(float):
    """A number that cannot be had as one."""

    def __float__(self) -> float:
        raise ZeroDivisionError("not to be used")


items = st.one_of(
    st.floats(),
    st.integers(-(10**50), 10**50),
    st.none(),
    st.booleans(),
    texts,
    st.complex_numbers(),
    st.decimals(),
    st.fractions(),
    st.builds(Fails),
    st.builds(FailingFloat, st.floats()),
    st.floats(width=16).map(np.float16),
    st.floats().map(torch.tensor),
    st.just(torch.ones((), device="meta")),
)
outputs = st.one_of(
    items,
    st.lists(items, max_size=4),
    st.lists(st.floats(allow_nan=False, width=32), min_size=3, max_size=3),
    st.lists(items, max_size=4).map(iter),
    st.lists(st.floats(), min_size=3, max_size=3).map(np.array),
    st.sampled_from(
        [
            torch.ones(3, device="meta"),
            torch.ones(3).to_sparse(),
            torch.ones(3, 1),
            np.array(["2020"], "M8[Y]"),
            b"abc",
            range(3),
        ]
    ),
    st.dictionaries(texts, items, max_size=3),
)


@given(outputs, st.one_of(st.none(), st.floats(-1e38, 1e38)))
@settings(few, max_examples=300)
def test_what_a_reward_returns_is_refused_by_its_name_or_gives_numbers_to_compare(output: Any, weight: float | None):
    def mine(completions: list[str], **columns: Any) -> Any:
        return output

    rewards = RewardFunctions(mine, None if weight is None else [weight])
    values, refused = attempt(RewardError, lambda: rewards(["p"] * 3, ["a", "b", "c"], [[1]] * 3, {}))
    if refused is not None:
        assert "'mine'" in refused
        return
    assert values.values.dtype == values.total.dtype == torch.float32
    assert values.values.shape in ((1, 3), (1, 1))
    assert not values.total.isinf().any(), "an infinite total compares with nothing"
    assert torch.equal(values.total.isnan(), values.values[0].isnan()), "none abstains but those that were told to"
