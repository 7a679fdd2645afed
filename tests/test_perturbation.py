"""Evaluating at θ + offset·z: equal to a model that was really moved, and θ is never written."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zorl.directions import Distribution, key
from zorl.kernels import kernel_for
from zorl.parameters import ParameterSet, select
from zorl.perturbation import Scratch
from zorl.probe import CENTRE, Point

KINDS = ("bert", "roberta", "gpt2", "opt", "llama", "qwen2")
PLUS, MINUS = Point(seed=3, offset=0.05), Point(seed=3, offset=-0.05)
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 5, 5, 0, 3]])


@pytest.fixture(params=["scratch alone", "small ones held"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models fit the bytes that are perturbed once an evaluation; both ways have to be right."""
    if request.param == "scratch alone":
        monkeypatch.setattr("zorl.perturbation.HELD_BYTES", 0)


@pytest.fixture
def scratch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zorl.perturbation.HELD_BYTES", 0)


def scratch_of(model: nn.Module, distribution: Distribution = "rademacher") -> Scratch:
    return Scratch(model, ParameterSet(select(model)), distribution)


def moved(model: nn.Module, point: Point, distribution: Distribution = "rademacher") -> nn.Module:
    """A copy whose own weights were really moved to the point."""
    other = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, tensor in ParameterSet(select(other)).items():
            out = torch.empty_like(tensor)
            kernel_for(tensor).perturb(tensor, key(point.seed, name), point.offset, distribution, out)
            tensor.copy_(out)
    return other


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().reshape(-1).clone().view(torch.uint8) for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = bits(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def assert_equal_to_a_moved_model(
    model: nn.Module, run: Callable[[Any], Tensor], distribution: Distribution = "rademacher"
) -> None:
    """At both sides and at θ, twice over: the first evaluation finds out what later ones rely on."""
    scratch, before = scratch_of(model, distribution), bits(model)
    with torch.no_grad():
        centre = run(copy.deepcopy(model).eval())
    for point in (PLUS, MINUS, CENTRE, PLUS, MINUS):
        found = scratch.evaluate(point, lambda: run(scratch.module))
        with torch.no_grad():
            expected = run(moved(model, point, distribution))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        if point.offset != 0.0:
            assert (found - centre).abs().max() > 1e-3  # a hundred times what rounding may do
    assert_untouched(model, before)


@pytest.fixture
def language_model(parts: Any) -> Callable[[str], Any]:
    return lambda kind: copy.deepcopy(parts(kind).model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_language_model_computes_as_if_it_were_moved(language_model: Any, kind: str, held: None):
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])

    def run(model: Any) -> Tensor:
        return model(input_ids=TOKENS, attention_mask=mask).logits[mask.bool()]

    assert_equal_to_a_moved_model(language_model(kind), run)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_gaussian_directions_too(language_model: Any, kind: str, held: None):
    assert_equal_to_a_moved_model(language_model(kind), lambda m: m(input_ids=TOKENS).logits, "gaussian")


@pytest.mark.parametrize("kind", ["llama", "opt", "bert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_perturbed_to_the_nearest_number(
    language_model: Any, kind: str, dtype: torch.dtype, held: None
):
    model = language_model(kind).to(dtype)
    scratch = scratch_of(model)
    with torch.no_grad():
        expected = moved(model, PLUS)(input_ids=TOKENS).logits
    found = scratch.evaluate(PLUS, lambda: scratch.module(input_ids=TOKENS).logits)
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.02, atol=0.05)
    assert found.dtype == dtype


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_generation_reads_the_moved_weights(language_model: Any, kind: str, held: None):
    model = language_model(kind)
    model.generation_config.eos_token_id = None
    scratch = scratch_of(model)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    found = scratch.evaluate(PLUS, lambda: scratch.module.generate(TOKENS, **options))
    assert torch.equal(found, moved(model, PLUS).generate(TOKENS, **options))
    assert not torch.equal(found, scratch.evaluate(CENTRE, lambda: scratch.module.generate(TOKENS, **options)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("point", [PLUS, CENTRE], ids=["plus", "centre"])
def test_the_head_computes_the_asked_rows_in_their_order(language_model: Any, kind: str, point: Point, held: None):
    model, rows = language_model(kind), torch.tensor([17, 4, 4, 30])
    scratch, before = scratch_of(model), bits(model)
    for _ in range(2):
        found = scratch.evaluate(point, lambda: scratch.module(input_ids=TOKENS).logits, head_rows=rows)
        with torch.no_grad():
            expected = moved(model, point)(input_ids=TOKENS).logits[..., rows]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert_untouched(model, before)


def test_a_frozen_head_computes_the_asked_rows(language_model: Any, held: None):
    model, rows = language_model("llama"), torch.tensor([17, 4])
    model.lm_head.requires_grad_(False)
    scratch = scratch_of(model)
    found = scratch.evaluate(PLUS, lambda: scratch.module(input_ids=TOKENS).logits, head_rows=rows)
    with torch.no_grad():
        expected = moved(model, PLUS)(input_ids=TOKENS).logits[..., rows]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_empty_evaluations_leave_every_bit(language_model: Any, kind: str, dtype: torch.dtype, held: None):
    model = language_model(kind).to(dtype)
    scratch, before = scratch_of(model), bits(model)
    tokens = TOKENS[:1, :2]
    for i in range(1000):
        point = Point(seed=i // 2, offset=1e-2 * (-1) ** i)
        if i % 10 == 0:
            scratch.evaluate(point, lambda: scratch.module(input_ids=tokens))
        else:
            scratch.evaluate(point, lambda: None)
    assert_untouched(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("where", ["wte", "h.1.mlp.c_proj", "h.0.ln_1", "ln_f"])
def test_whatever_is_raised_in_a_forward_leaves_the_model_usable(
    language_model: Any, error: type[BaseException], where: str, held: None
):
    model = language_model("gpt2")
    scratch, before = scratch_of(model), bits(model)
    expected = scratch.evaluate(PLUS, lambda: scratch.module(input_ids=TOKENS).logits)
    armed = True

    def fail(*_: Any) -> None:
        if armed:
            raise error("on purpose")

    handle = scratch.module.transformer.get_submodule(where).register_forward_hook(fail)
    for point in (PLUS, CENTRE):
        with pytest.raises(error, match="on purpose"):
            scratch.evaluate(point, lambda: scratch.module(input_ids=TOKENS))
    armed = False
    assert_untouched(model, before)
    shared = dict(model.named_parameters())
    for name, parameter in scratch.module.named_parameters():
        assert parameter is shared[name]
    handle.remove()
    assert torch.equal(scratch.evaluate(PLUS, lambda: scratch.module(input_ids=TOKENS).logits), expected)


def test_an_error_that_the_model_itself_catches_does_no_harm(held: None):
    class Fragile(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise ValueError("too fragile")

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.fragile = nn.Parameter(torch.ones(4)), Fragile(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with contextlib.suppress(ValueError):
                x = self.fragile(x)
            return x * self.scale

    class Robust(nn.Module):
        """Reads a weight again after a module that failed within the one that has it."""

        def __init__(self) -> None:
            super().__init__()
            self.outer, self.last = Outer(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.outer(x)) + self.outer.scale + self.outer.fragile.bias

    assert_equal_to_a_moved_model(Robust(), lambda m: m(torch.ones(2, 4)))


def test_modules_whose_weights_a_parent_reads_are_perturbed_too(held: None):
    """nn.MultiheadAttention never calls its out_proj."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attention(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    assert_equal_to_a_moved_model(Attention(), lambda m: m(torch.randn(2, 5, 8, generator=torch.manual_seed(1))))


def test_a_transformer_encoder_on_its_fast_path_is_perturbed(held: None):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert_equal_to_a_moved_model(model, lambda m: m(torch.randn(2, 5, 8, generator=torch.manual_seed(1))))


class ReadsTheTable(nn.Module):
    """A language model with a tied head as many write it: the table is looked up, and read without a call."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(12, 8), nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.embed(tokens))) @ self.embed.weight.T


def test_a_weight_that_is_used_by_its_module_and_read_by_a_parent_is_perturbed_in_both_places(held: None):
    torch.manual_seed(0)
    assert_equal_to_a_moved_model(ReadsTheTable(), lambda m: m(torch.tensor([1, 2, 11, 0])))


def test_a_weight_that_only_a_later_forward_reads_directly_is_perturbed_there(scratch_alone: None):
    torch.manual_seed(0)
    model = ReadsTheTable()
    scratch = scratch_of(model)
    tokens = torch.tensor([1, 2, 3])
    scratch.evaluate(PLUS, lambda: scratch.module.embed(tokens))
    found = scratch.evaluate(PLUS, lambda: scratch.module(tokens))
    torch.testing.assert_close(found, moved(model, PLUS)(tokens).detach())


def test_asking_a_weight_for_its_dtype_or_shape_is_not_reading_it(scratch_alone: None):
    class Polite(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Polite(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            w = self.inner.weight
            return self.inner(x.to(w.dtype).to(w.device)[:, : w.shape[1]][:, : w.size(0)])

    model = Casts()
    scratch = scratch_of(model)
    calls = []
    scratch.evaluate(PLUS, lambda: calls.append(scratch.module(torch.ones(1, 4))))
    assert len(calls) == 1  # a second would mean that the weight was kept for the whole forward


@pytest.mark.parametrize("parametrize", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
def test_a_weight_that_is_computed_from_parameters_follows_them(parametrize: Any, held: None):
    torch.manual_seed(0)
    model = nn.Sequential(parametrize(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 2))
    assert_equal_to_a_moved_model(model, lambda m: m(torch.ones(1, 6)))


def test_a_hook_of_the_model_that_reads_a_parameter_before_its_module_runs_is_seen(held: None):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw, self.scale = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
            self.register_forward_pre_hook(lambda module, args: setattr(module, "weight", module.raw * module.scale))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + self.scale

    assert_equal_to_a_moved_model(nn.Sequential(Scaled(), nn.Linear(4, 2)), lambda m: m(torch.ones(1, 4)))


class Prefix(nn.Module):
    """Returns its own parameter, as prompt tuning does."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.weight, self.shape = nn.Parameter(torch.full((3, 4), 0.5)), shape

    def forward(self) -> Any:
        view = self.weight[:2]
        return {"tensor": self.weight, "view": view, "tuple": (1, [view]), "dict": {"x": self.weight}}[self.shape]


@pytest.mark.parametrize("shape", ["tensor", "view", "tuple", "dict"])
def test_a_module_may_return_its_own_parameter(shape: str, held: None):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Prefix(shape), Prefix(shape)

        def forward(self) -> Tensor:
            a, b = self.a(), self.b()  # b's values are made where a's were
            pick = {"tuple": lambda t: t[1][0], "dict": lambda t: t["x"]}.get(shape, lambda t: t)
            return pick(a)[0] + 10 * pick(b)[0]

    assert_equal_to_a_moved_model(Two(), lambda m: m())


def test_what_a_forward_returns_survives_the_next_one(held: None):
    model = nn.Sequential(Prefix("tensor"))
    scratch = scratch_of(model)
    plus = scratch.evaluate(PLUS, lambda: scratch.module[0]())
    kept = plus.clone()
    minus = scratch.evaluate(MINUS, lambda: scratch.module[0]())
    assert torch.equal(plus, kept)
    assert not torch.equal(minus, plus)


def test_tied_weights_share_one_direction(held: None):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) - self.b(x)

    model = Tied()
    scratch = scratch_of(model)
    for point in (PLUS, MINUS, PLUS):
        assert not scratch.evaluate(point, lambda: scratch.module(torch.ones(1, 4))).any()


def test_modules_that_run_inside_others_keep_their_parameters_apart(held: None):
    class Nested(nn.Module):
        """Uses its weight before and after its child runs, and calls itself."""

        def __init__(self, depth: int) -> None:
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
            self.child = Nested(depth - 1) if depth else nn.Linear(4, 4)

        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            before = F.linear(x, self.weight)
            inner = self.child(before * self.scale)
            out = F.linear(inner, self.weight) * self.scale
            return self(out, again=False) if again and isinstance(self.child, Nested) else out

    torch.manual_seed(0)
    assert_equal_to_a_moved_model(Nested(2), lambda m: m(torch.ones(1, 4)))


def test_frozen_parameters_are_used_as_they_are(held: None):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    scratch = scratch_of(model)
    assert set(scratch.parameters) == {"1.weight", "1.bias"}
    x = torch.ones(1, 4)
    hidden = scratch.evaluate(PLUS, lambda: scratch.module[0](x))
    assert torch.equal(hidden, model[0](x))
    assert_equal_to_a_moved_model(model, lambda m: m(x))


def test_an_embedding_is_looked_up_as_by_torch(held: None):
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.padded, self.normed = nn.Embedding(9, 4, padding_idx=2), nn.Embedding(9, 4, max_norm=1.0)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.padded(tokens) * 2 + self.padded(input=tokens.flip(0))

    model = Lookup()
    for tokens in (
        torch.tensor([[0, 2], [2, 8]]),
        torch.tensor([5]),
        torch.tensor(3),
        torch.tensor([1, 1], dtype=torch.int32),
    ):
        assert_equal_to_a_moved_model(model, lambda m, tokens=tokens: m(tokens.view(-1, 1)))
    scratch = scratch_of(model)
    for bad in (9, -1):
        with pytest.raises(IndexError):
            scratch.evaluate(PLUS, lambda bad=bad: scratch.module(torch.tensor([[bad]])))
    assert model.padded.padding_idx == 2
    assert scratch.module.padded.padding_idx == 2


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks transformers for it
def test_a_lora_adapter_alone_is_perturbed(language_model: Any, held: None):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(language_model("llama"), LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
    scratch = scratch_of(model)
    assert all("lora_" in name for name in scratch.parameters)
    assert_equal_to_a_moved_model(model, lambda m: m(input_ids=TOKENS).logits)


def test_another_thread_runs_the_plain_model_meanwhile(language_model: Any, scratch_alone: None):
    model = language_model("gpt2")
    model.train()
    scratch = scratch_of(model)
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(input_ids=TOKENS).logits
    model.eval()
    seen: list[Tensor] = []
    stop = threading.Event()

    def serve() -> None:
        with torch.no_grad():
            while not stop.is_set():
                seen.append(model(input_ids=TOKENS).logits)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        while len(seen) < 30:
            scratch.evaluate(PLUS, lambda: scratch.module(input_ids=TOKENS))
    finally:
        stop.set()
        thread.join()
    assert all(torch.equal(logits, expected) for logits in seen)


def test_the_model_is_neither_hooked_nor_switched_to_eval_mode(language_model: Any):
    model = language_model("gpt2")
    model.train()
    scratch = scratch_of(model)
    scratch.evaluate(PLUS, lambda: scratch.module(input_ids=TOKENS))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any(module.training for module in scratch.module.modules())


def test_an_update_of_the_model_is_seen_at_once(held: None):
    model = nn.Linear(3, 3)
    scratch, x = scratch_of(model), torch.ones(1, 3)
    scratch.evaluate(PLUS, lambda: scratch.module(x))
    with torch.no_grad():
        model.weight.add_(1.0)
    torch.testing.assert_close(scratch.evaluate(PLUS, lambda: scratch.module(x)), moved(model, PLUS)(x).detach())


def test_nothing_is_recorded_for_a_backward_pass(held: None):
    model = nn.Linear(3, 3)
    scratch = scratch_of(model)
    assert not scratch.evaluate(PLUS, lambda: scratch.module(torch.ones(1, 3))).requires_grad
    assert not scratch.evaluate(CENTRE, lambda: scratch.module(torch.ones(1, 3))).requires_grad


def test_a_recurrent_layer_is_refused_with_a_way_out():
    with pytest.raises(TypeError, match=r"LSTM cannot be perturbed module by module; use zorl\.MeZO with a closure"):
        scratch_of(nn.Sequential(nn.LSTM(2, 2)))


def test_memory_stays_far_below_a_second_model(scratch_alone: None):
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(20)])
    scratch = scratch_of(model)
    scratch.evaluate(PLUS, lambda: scratch.module(torch.ones(1, 64)))
    used = sum(buffer.numel() for buffer in scratch._buffers.values())
    assert used <= scratch.parameters.numel / 20
