"""Real tokenizers and models, tiny and random: made here, so that no test needs a file or a network."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import string
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from zorl.directions import Distribution, key
from zorl.kernels import kernel_for
from zorl.parameters import ParameterSet
from zorl.perturbation import Scratch
from zorl.probe import Point
from zorl.rewards.judgment_store import JudgmentStore, NewPair, StoredProbe, StoredStep

torch.set_num_threads(1)  # all is tiny here: a second thread costs more than it saves, much more on a busy machine
CORPUS = [
    "the film was great . it was terrible . a great story , a terrible plot and an odd ending",
    "Review: I liked it. Was it great? It was terrible! The answer was good, the answer was bad.",
    "positive or negative, good or bad, great or terrible, yes or no: what was it like to watch?",
    "question: who wrote the book? answer: nobody knows who wrote the book, it was very odd.",
    "The user asked and the assistant said: Great! Terrible. Good. Bad. Yes. No. Maybe not.",
    "good\nbad\ngood or bad\nbad or good",
] * 4
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CAUSAL = ("gpt2", "opt", "llama", "qwen2")
MASKED = ("bert", "roberta")


@dataclass(frozen=True)
class Parts:
    """What a policy is built from."""

    model: Any
    evaluator: Scratch
    tokenizer: PreTrainedTokenizerFast


class PretendTuner:
    """What `zorl judge`'s child process does in the store, with texts in place of a model.

    Attributes:
        texts: (prompt, the answer of the + side, that of the − side), in turns.
        per_step: pairs a probe.
    """

    def __init__(self, store: Path, texts: list[tuple[str, str, str]], per_step: int = 2) -> None:
        self.path = store
        self.store = JudgmentStore(store)
        self.texts = texts
        self.per_step = per_step
        self.ahead: list[StoredProbe] = []
        self.takes = 0

    def work(self) -> None:
        """Makes the step whose verdicts are in, answers requests, and keeps two probes in the queue."""
        for request, kind, payload in self.store.pending_requests():
            self.store.answer_request(request, self._answer(kind, payload))
        while self.ahead and self.store.decided(self.ahead[0].id):
            self._commit(self.ahead.pop(0))
        while len(self.ahead) < 2:
            self.ahead.append(self._ask())
        self.store.set_tuner("waiting", "for verdicts")

    def _ask(self) -> StoredProbe:
        pairs = [NewPair(0, row, *self._text(self.takes * self.per_step + row)) for row in range(self.per_step)]
        step = self.takes
        self.takes += 1
        return self.store.add_probe(pairs, key=f"take {step}", step=step, made_at=step, epsilon=0.01, seeds=(step,))

    def _commit(self, probe: StoredProbe) -> None:
        self.store.close_probe(probe.id)
        self.store.commit_step(
            StoredStep(probe.step, probe.id, 0.01, probe.seeds, (1.0,), (0.5,), {"drift": 0.01 * (probe.step + 1)})
        )
        self.store.add_comparisons([NewPair(0, 0, *self._text(probe.step))], step=probe.step + 1)

    def _text(self, i: int) -> tuple[str, str, str]:
        return self.texts[i % len(self.texts)]

    def _answer(self, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
        if kind == "try" and payload["prompt"] != "nothing":
            return {"start": f"{payload['prompt']} as it was", "current": "<b>as it is</b>", "step": self.takes - 2}
        if kind == "rewind":
            return {"step": payload["step"]}
        if kind == "export_model":
            with zipfile.ZipFile(self.path.with_name("model-step1.zip"), "w") as archive:
                archive.writestr("config.json", "{}")
            return {"path": str(archive.filename)}
        return {"error": f"{kind} cannot be done"}


class PostgresServer:
    """A PostgreSQL server of the tests' own, on a Unix socket in a temporary folder, which asks for a password.

    Raises:
        AssertionError: it did not start; its log says why.
    """

    PASSWORD = "s3cret/of@zorl"
    IN_A_URL = "s3cret%2Fof%40zorl"

    def __init__(self, binaries: Path) -> None:
        # Not below pytest's folder: that is closed to other users, and a server does not run as root.
        self.folder = Path(tempfile.mkdtemp(prefix="zorl-pg-"))
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._user = {"user": "postgres", "group": "postgres", "extra_groups": []}
            shutil.chown(self.folder, "postgres", "postgres")
        (self.folder / "password").write_text(self.PASSWORD)
        (self.folder / "password").chmod(0o644)
        self._numbers = itertools.count()
        self._binaries = binaries
        made = subprocess.run(
            [
                binaries / "initdb", "--pgdata", self.folder / "data", "--username", "zorl", "--auth", "scram-sha-256",
                "--pwfile", self.folder / "password", "--encoding", "UTF8", "--locale", "C", "--no-sync",
            ],
            capture_output=True, text=True, cwd=self.folder, **self._user,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        self.start()

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        # fsync serves those whose machine loses power; the tests do not.
        options = {"unix_socket_directories": self.folder, "listen_addresses": "", "fsync": "off"}
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._binaries / "postgres", "-D", self.folder / "data",
                    *(word for name, value in options.items() for word in ("-c", f"{name}={value}")),
                ],
                stdout=log, stderr=log, cwd=self.folder, **self._user,
            )  # fmt: skip
        deadline = time.monotonic() + 30
        ready = [self._binaries / "pg_isready", "--quiet", "--host", self.folder]
        while subprocess.run(ready, check=False).returncode:
            assert self._process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.05)

    def crash(self) -> None:
        """Stops it at once; what it has not written by now is in its log of transactions, or gone."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(30)

    def url(self, database: str, password: str | None = IN_A_URL) -> str:
        """Of a database, with the password as a URL takes it."""
        user = "zorl" if password is None else f"zorl:{password}"
        return f"postgresql://{user}@/{database}?host={self.folder}"

    def new_database(self, options: str = "") -> str:
        """The URL of an empty database."""
        name = f"judgments_{next(self._numbers)}"
        self.run(f"CREATE DATABASE {name} {options}")
        return self.url(name)

    def run(self, statement: str, database: str = "postgres") -> list[Any]:
        """What a statement gives."""
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return [] if cursor.description is None else cursor.fetchall()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A server, where Debian's package `postgresql` and psycopg are installed."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'psycopg[binary]'")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found:
        pytest.skip("no PostgreSQL server here: apt-get install postgresql")
    server = PostgresServer(found[-1].parent)
    yield server
    server.crash()
    shutil.rmtree(server.folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_at(request: pytest.FixtureRequest, tmp_path: Path) -> str | Path:
    """Where a judgment store can be made: a file, then a database on a server."""
    if request.param == "sqlite":
        return tmp_path / "judgments.sqlite"
    return str(request.getfixturevalue("postgres").new_database())


class Quadratic:
    """L(θ) = ½ (Qᵀθ)ᵀ diag(λ) (Qᵀθ) + bᵀθ, with random orthonormal Q: float64 sums, as an evaluator would see them."""

    def __init__(self, eigenvalues: Sequence[float], distribution: Distribution, dimension: int = 400) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = (dimension // 20, 20)
        self.eigenvalues = torch.tensor(eigenvalues, dtype=torch.float64)
        noise = torch.randn(dimension, len(eigenvalues), generator=generator, dtype=torch.float64)
        self.basis = torch.linalg.qr(noise)[0]
        self.linear = torch.randn(dimension, generator=generator, dtype=torch.float64)
        self.parameters = ParameterSet({"w": torch.randn(shape, generator=generator) * 0.1}.items())
        self.distribution = distribution
        self.asked = 0

    def losses(self, points: Sequence[Point]) -> Tensor:
        self.asked += len(points)
        return torch.tensor([self.at(point) for point in points], dtype=torch.float64)

    def at(self, point: Point) -> float:
        theta, moved = self.parameters["w"], torch.empty_like(self.parameters["w"])
        kernel_for(theta).perturb(theta, key(point.seed, "w"), point.offset, self.distribution, moved)
        flat = moved.double().flatten()
        inside = self.basis.T @ flat
        return (0.5 * inside @ (self.eigenvalues * inside) + self.linear @ flat).item()

    @property
    def gradient(self) -> Tensor:
        flat = self.parameters["w"].double().flatten()
        return self.basis @ (self.eigenvalues * (self.basis.T @ flat)) + self.linear


@pytest.fixture(scope="session")
def quadratic() -> type[Quadratic]:
    """The class: `quadratic(eigenvalues, distribution, dimension)`."""
    return Quadratic


@pytest.fixture(scope="session")
def pretend_tuner() -> type[PretendTuner]:
    """The class: `pretend_tuner(store, texts)`."""
    return PretendTuner


@pytest.fixture(scope="session")
def parts() -> Callable[[str], Parts]:
    """Model, evaluator and tokenizer by kind: bert, roberta, gpt2, opt, llama, qwen2, gpt_neox. Shared: do not change them."""
    return make_parts


@pytest.fixture
def base(parts: Callable[[str], Any], tmp_path: Path) -> Callable[[str], str]:
    """The path of a saved tiny model with its tokenizer."""

    def save(kind: str) -> str:
        path = tmp_path / f"base-{kind}"
        if not path.exists():
            parts(kind).model.save_pretrained(path)
            parts(kind).tokenizer.save_pretrained(path)
        return str(path)

    return save


@pytest.fixture
def make(base: Callable[[str], str], tmp_path: Path) -> Callable[..., Any]:
    """A MeZOTrainer with short settings; keywords are its own, `settings` those of MeZOConfig."""
    from tiny_runs import PROMPT, TRAIN  # slow, and most tests need no trainer

    from zorl import MeZOConfig, MeZOTrainer

    def trainer(
        folder: str = "out", *, kind: str = "bert", settings: dict[str, Any] | None = None, **options: Any
    ) -> Any:
        config = MeZOConfig(
            output_dir=str(tmp_path / folder),
            **{
                "max_steps": 6,
                "per_device_train_batch_size": 8,
                "logging_steps": 2,
                "save_strategy": "no",
                "disable_tqdm": True,
                "calibration": "none",
                **(settings or {}),
            },
        )
        objective = {} if options.keys() & {"reward_funcs", "loss", "judge"} else {"loss": "cross_entropy"}
        defaults = {"model": base(kind), "args": config, "train_dataset": TRAIN, "prompt": PROMPT}
        return MeZOTrainer(**{**defaults, **objective, **options})

    return trainer


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models as small as these are faster without a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def make_parts(kind: str) -> Parts:
    tokenizer = _tokenizer(kind)
    model = _model(kind, tokenizer)
    return Parts(model, Scratch(model, ParameterSet(model.named_parameters())), tokenizer)


def _tokenizer(kind: str) -> PreTrainedTokenizerFast:
    if kind == "bert":
        return _wordpiece()
    if kind == "llama":
        return _metaspace()
    return _byte_level(kind)


def _byte_level(kind: str) -> PreTrainedTokenizerFast:
    named = {
        "roberta": {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
        "opt": {"bos_token": "</s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "</s>"},
        "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
        "gpt_neox": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
        "qwen2": {"eos_token": "<|end|>", "pad_token": "<|end|>"},
    }[kind]
    first = ["<s>", "<pad>", "</s>", "<unk>"] if kind in ("roberta", "opt") else sorted({*named.values()})
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    chat = ["<|system|>", "<|user|>", "<|assistant|>"] if kind == "qwen2" else []
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=440, special_tokens=[*first, *chat], initial_alphabet=alphabet, show_progress=False
        ),
    )
    if kind in ("roberta", "opt"):
        start = named["bos_token"]
        template = f"{start} $A </s>" if kind == "roberta" else f"{start} $A"
        ids = [(token, tokenizer.token_to_id(token)) for token in {start, "</s>"}]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    if kind == "roberta":
        named = {**named, "mask_token": AddedToken("<mask>", lstrip=True, special=True)}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    if kind == "qwen2":
        wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _wordpiece() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for line in CORPUS for word in re.findall(r"\w+|[^\w\s]", line.lower())})
    letters = [*string.ascii_lowercase, *string.digits, *(f"##{letter}" for letter in string.ascii_lowercase)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*special, *words, *letters]))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    ids = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _metaspace() -> PreTrainedTokenizerFast:
    """Like SentencePiece: spaces are a part of tokens, and one is put in front of a text. No pad token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _model(kind: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    torch.manual_seed(0)
    wide = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 96,
        "initializer_range": 0.3,  # logits that differ: at 0.02 all answers are alike
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**wide, intermediate_size=48)).eval()
    if kind == "roberta":
        return RobertaForMaskedLM(RobertaConfig(**wide, intermediate_size=48)).eval()
    if kind == "opt":
        width = wide.pop("initializer_range")
        return OPTForCausalLM(OPTConfig(**wide, init_std=width, ffn_dim=48, word_embed_proj_dim=32)).eval()
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**wide)).eval()
    if kind == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**wide, intermediate_size=48)).eval()
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**wide, intermediate_size=48, num_key_value_heads=2)).eval()
    return Qwen2ForCausalLM(Qwen2Config(**wide, intermediate_size=48, num_key_value_heads=2)).eval()
