"""Many points in one forward: equal to evaluating them one by one, for every kind of model, and never silently wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM

from zorl.directions import Distribution, key
from zorl.estimators import SPSA
from zorl.generation import Generation
from zorl.kernels import reference
from zorl.label_head import LabelHead
from zorl.parameters import ParameterSet, select
from zorl.perturbation import Scratch
from zorl.probe import CENTRE, Point
from zorl.prompts import Prompt
from zorl.scoring import LabelWords
from zorl.stacked_points import StackingError
from zorl.twin import Twin, twin_or_scratch

KINDS = ("bert", "roberta", "gpt2", "opt", "llama", "qwen2", "gpt_neox")
CAUSAL = KINDS[2:]
ROWS = [{"text": text} for text in ("the film", "an odd ending, and a great story", "it")]
WORDS = Prompt("{text} it was {mask}", {"bad": "terrible", "good": "great", "odd": "odd"})
SEVERAL = Prompt("{text} it was {mask}", {"bad": "a terrible plot", "good": "great"})
POINTS = [*SPSA().points((3, 8), 0.05), CENTRE]
each_rank = pytest.mark.parametrize("distribution", ["rank1", "rank4"])


def both(model: nn.Module, distribution: Distribution = "rank1") -> tuple[Scratch, Twin]:
    parameters = ParameterSet(select(model))
    return Scratch(model, parameters, distribution), Twin(model, parameters, distribution)


@pytest.fixture
def language_model(parts: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda kind: copy.deepcopy(parts(kind).model)


@pytest.mark.parametrize("kind", KINDS)
@each_rank
def test_label_scores_are_those_of_one_point_after_the_other(
    language_model: Any, parts: Any, kind: str, distribution: Distribution
) -> None:
    model, tokenizer = language_model(kind), parts(kind).tokenizer
    before = copy.deepcopy(model.state_dict())
    alone, together = (LabelWords(e, tokenizer, WORDS) for e in both(model, distribution))
    expected, found = alone.scores(ROWS, POINTS), together.scores(ROWS, POINTS)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 0.01
    # The projected gradients, in fp32, to rounding.
    for a, b in zip(*(_projected(scores) for scores in (expected[:4], found[:4])), strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=5e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def _projected(scores: Tensor) -> list[float]:
    from zorl.probe import Scores

    return SPSA().project(Scores(scores[:, :, 0].double()), 2, 0.05)


@pytest.mark.parametrize("kind", CAUSAL)
def test_options_of_several_tokens_too(language_model: Any, parts: Any, kind: str) -> None:
    alone, together = (LabelWords(e, parts(kind).tokenizer, SEVERAL) for e in both(language_model(kind)))
    torch.testing.assert_close(together.scores(ROWS, POINTS), alone.scores(ROWS, POINTS), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_label_head_reads_the_states_of_each_point(language_model: Any, parts: Any, kind: str) -> None:
    weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).tolist()
    prompt = replace(WORDS, label_head=LabelHead((0.1, 0.2, 0.3), tuple(map(tuple, weight))))
    alone, together = (LabelWords(e, parts(kind).tokenizer, prompt) for e in both(language_model(kind)))
    torch.testing.assert_close(together.scores(ROWS, POINTS), alone.scores(ROWS, POINTS), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("greedy", [True, False])
def test_generated_texts_are_those_of_one_point_after_the_other(
    language_model: Any, parts: Any, kind: str, greedy: bool
) -> None:
    """Prompts of different lengths, so padded at the left; with sampling, the noise is the same at all points."""
    tokenizer = parts(kind).tokenizer
    settings: dict[str, Any] = {"max_new_tokens": 10, "greedy": greedy}
    alone, together = (Generation(e, tokenizer, Prompt("{text}"), **settings) for e in both(language_model(kind)))
    expected = alone.answers(ROWS, POINTS, noise_seed=5)
    assert together.answers(ROWS, POINTS, noise_seed=5) == expected
    assert expected[0] != expected[1]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_beam_search_too(language_model: Any, kind: str) -> None:
    model = language_model(kind)
    scratch, twin = both(model)
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    options: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}

    def forward(evaluator: Any, copies: int) -> list[Tensor]:
        batch = tokens.repeat(copies, 1)
        output = evaluator.module.generate(batch, attention_mask=torch.ones_like(batch), **options)
        return list(F.pad(output, (0, 11 - output.shape[1])).view(copies, 2, 11))

    expected = scratch.evaluate_all(POINTS, lambda n: forward(scratch, n))
    found = twin.evaluate_all(POINTS, lambda n: forward(twin, n))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["lora", "prefix"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
def test_adapters_are_tuned_in_one_forward_too(language_model: Any, parts: Any, config: Any) -> None:
    model = get_peft_model(language_model("gpt2"), config)
    tokenizer = parts("gpt2").tokenizer
    evaluators = both(model)
    alone, together = (LabelWords(e, tokenizer, WORDS) for e in evaluators)
    expected = alone.scores(ROWS, POINTS)
    torch.testing.assert_close(together.scores(ROWS, POINTS), expected, atol=1e-4, rtol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 1e-5
    texts = [Generation(e, tokenizer, Prompt("{text}"), max_new_tokens=6, greedy=True) for e in evaluators]
    assert texts[1].answers(ROWS, POINTS) == texts[0].answers(ROWS, POINTS)


@pytest.mark.parametrize("patterns", ["*bias", "*ln*", "*wte*", "*c_attn.weight"])
def test_a_part_of_the_parameters_can_be_tuned(language_model: Any, parts: Any, patterns: str) -> None:
    model = language_model("gpt2")
    parameters = ParameterSet(select(model, patterns))
    alone, together = (
        LabelWords(e(model, parameters, "rank1"), parts("gpt2").tokenizer, WORDS) for e in (Scratch, Twin)
    )
    expected = alone.scores(ROWS, POINTS)
    torch.testing.assert_close(together.scores(ROWS, POINTS), expected, atol=1e-4, rtol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_within_its_own_rounding(language_model: Any, parts: Any, dtype: torch.dtype) -> None:
    alone, together = (LabelWords(e, parts("llama").tokenizer, WORDS) for e in both(language_model("llama").to(dtype)))
    torch.testing.assert_close(together.scores(ROWS, POINTS), alone.scores(ROWS, POINTS), atol=0.3, rtol=0.05)


def test_small_batches_of_many_points_are_the_same(language_model: Any, parts: Any) -> None:
    _, twin = both(language_model("bert"))
    one = LabelWords(twin, parts("bert").tokenizer, WORDS, batch_size=1).scores(ROWS, POINTS)
    all_at_once = LabelWords(twin, parts("bert").tokenizer, WORDS, batch_size=64).scores(ROWS, POINTS)
    torch.testing.assert_close(one, all_at_once, atol=1e-5, rtol=1e-5)


def test_write_protected_weights_are_enough_and_the_model_answers_meanwhile(language_model: Any, parts: Any) -> None:
    """No parameter is written: not even one that is shared read-only memory."""
    model = language_model("llama").eval()
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model(tokens).logits
    twin = Twin(model, ParameterSet(select(model)))
    versions = {name: p._version for name, p in model.named_parameters()}
    seen: list[Tensor] = []

    def forward(copies: int) -> list[Tensor]:
        result = twin.module(tokens.repeat(copies, 1)).logits
        seen.append(model(tokens).logits)  # another caller, in the middle of an evaluation
        return list(result.unsqueeze(1))

    plus, minus = twin.evaluate_all([Point(1, 0.1), Point(1, -0.1)], forward)
    assert torch.equal(seen[0], before)
    assert not torch.allclose(plus, minus)
    assert {name: p._version for name, p in model.named_parameters()} == versions


def test_an_error_in_the_middle_leaves_the_replica_as_it_was(language_model: Any) -> None:
    _, twin = both(language_model("gpt2"))
    parameters = dict(twin.module.named_parameters())

    def fails(copies: int) -> list[None]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        twin.evaluate_all([Point(1, 0.1)], fails)
    assert all(p is parameters[name] for name, p in twin.module.named_parameters())


class Odd(nn.Module):
    """Uses its weight as no language model does."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.gain = nn.Parameter(torch.ones(4))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight if self.gain is not None else x)


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: x @ w,
        lambda x, w: F.linear(x, w.T),
        lambda x, w: x * w.sum(),
        lambda x, w: x + w[0],
        lambda x, w: x * w,
        lambda x, w: x + w.detach().mean(),
        lambda x, w: x * w.chunk(2)[0][0],
        lambda x, w: torch.add(x, w, alpha=2),
        lambda x, w: torch.addmm(x[0], x[0], w, alpha=2),
    ],
)
def test_any_other_use_of_a_tuned_parameter_is_refused(use: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Odd(use)
    twin = Twin(model, ParameterSet([("weight", model.weight)]))
    with pytest.raises(StackingError, match="'weight'.*at several points at once; use evaluation='scratch'"):
        twin.evaluate_all(
            [Point(0, 0.1), Point(0, -0.1)], lambda n: list(twin.module(torch.ones(2 * n, 4, 4)).chunk(n))
        )


def test_activations_without_the_stacked_rows_are_refused() -> None:
    model = nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 2))
    twin = Twin(model, ParameterSet(model.named_parameters()))
    x = torch.ones(4, 3, 4)
    assert len(twin.evaluate_all([Point(0, 0.1), Point(0, -0.1)], lambda n: list(twin.module(x).chunk(n)))) == 2
    lost = nn.Sequential(nn.Linear(4, 4))
    twin = Twin(lost, ParameterSet(lost.named_parameters()))
    with pytest.raises(StackingError, match=r"shape \(1, 3, 4\) does not run over the 1 stacked rows"):
        twin.evaluate_all([Point(0, 0.1), Point(0, -0.1)], lambda n: [twin.module(torch.ones(1, 3, 4))] * n)


def test_models_that_cannot_be_stacked_are_refused() -> None:
    experts = MixtralForCausalLM(
        MixtralConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                      num_key_value_heads=1, num_local_experts=2)
    )  # fmt: skip
    with pytest.raises(StackingError, match="mixture of experts"):
        Twin(experts, ParameterSet(select(experts)))
    recurrent = nn.LSTM(4, 4)
    with pytest.raises(StackingError, match="LSTM"):
        Twin(recurrent, ParameterSet(recurrent.named_parameters()))
    linear = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'rank1', not 'rademacher'"):
        Twin(linear, ParameterSet(linear.named_parameters()), "rademacher")


@each_rank
def test_the_factors_multiply_to_the_direction(distribution: Distribution) -> None:
    r, stream = {"rank1": 1, "rank4": 4}[distribution], key(5, "w")
    z = reference.sample(torch.arange(6 * 11), stream, distribution, width=11).view(6, 11)
    u = reference.factors(torch.arange(6), stream, r, columns=False)
    v = reference.factors(torch.arange(11), stream, r, columns=True)
    assert torch.equal(z, u @ v.T / r**0.5)
    assert torch.linalg.matrix_rank(z) <= r


@each_rank
def test_low_rank_directions_have_the_identity_for_their_second_moment(distribution: Distribution) -> None:
    n = 4000
    z = torch.stack([reference.sample(torch.arange(12), key(seed, "w"), distribution, width=4) for seed in range(n)])
    assert torch.allclose(z.T @ z / n, torch.eye(12), atol=6 * n**-0.5)
    assert z.mean(dim=0).abs().max() < 5 * n**-0.5


def test_biases_alone_survive_a_batch_of_one_row(language_model: Any, parts: Any) -> None:
    """What is kept for the other forwards of an evaluation is not added to."""
    model = language_model("gpt2")
    parameters = ParameterSet(select(model, "*.bias"))
    alone, together = (
        LabelWords(e(model, parameters, "rank1"), parts("gpt2").tokenizer, WORDS, batch_size=len(POINTS))
        for e in (Scratch, Twin)
    )
    torch.testing.assert_close(together.scores(ROWS, POINTS), alone.scores(ROWS, POINTS), atol=1e-4, rtol=1e-4)


def test_a_frozen_head_with_a_bias_is_left_alone(language_model: Any, parts: Any) -> None:
    model = language_model("bert")
    before = copy.deepcopy(model.state_dict())
    twin = Twin(model, ParameterSet(select(model, "*attention.self*")))
    words = LabelWords(twin, parts("bert").tokenizer, WORDS, batch_size=1)
    plain = LabelWords(Scratch(model, twin.parameters), parts("bert").tokenizer, WORDS, batch_size=64)
    torch.testing.assert_close(words.scores(ROWS, [CENTRE]), plain.scores(ROWS, [CENTRE]), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
def test_a_head_with_an_adapter_gives_the_asked_rows(language_model: Any) -> None:
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    scratch, twin = both(get_peft_model(language_model("llama"), config))
    tokens, rows = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([17, 4, 4])

    def forward(evaluator: Any, copies: int) -> list[Tensor]:
        return list(evaluator.module(input_ids=tokens.repeat(copies, 1)).logits.chunk(copies))

    expected = scratch.evaluate_all(POINTS, lambda n: forward(scratch, n), head_rows=rows)
    found = twin.evaluate_all(POINTS, lambda n: forward(twin, n), head_rows=rows)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert found[0].shape == (2, 3, 3)


def test_weights_that_were_converted_are_read_anew(language_model: Any, parts: Any) -> None:
    model = language_model("llama")
    words = LabelWords(Twin(model, ParameterSet(select(model))), parts("llama").tokenizer, WORDS)
    before = words.scores(ROWS, [Point(1, 0.05)])
    model.double().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    after = words.scores(ROWS, [Point(1, 0.05)])
    expected = LabelWords(Scratch(model, ParameterSet(select(model)), "rank1"), parts("llama").tokenizer, WORDS)
    torch.testing.assert_close(after, expected.scores(ROWS, [Point(1, 0.05)]), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)


class Relative(nn.Module):
    """Looks up what belongs to pairs of positions, not to rows, as models with relative positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.pairs = nn.Embedding(20, 4), nn.Embedding(8, 4)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        t = input_ids.shape[1]
        pairs = self.pairs((torch.arange(t)[:, None] - torch.arange(t)).clamp(0, 7))
        return self.tokens(input_ids) + pairs.mean(dim=1)


def test_a_look_up_that_does_not_run_over_rows_is_refused_even_where_the_sizes_agree() -> None:
    model = Relative()
    twin = Twin(model, ParameterSet(model.named_parameters()))
    with pytest.raises(StackingError, match=r"\(6, 6\) do not run over the 4 stacked rows"):
        twin.evaluate_all(
            POINTS[:2], lambda n: list(twin.module(input_ids=torch.ones(4, 6, dtype=torch.long)).chunk(n))
        )


def test_auto_takes_the_path_that_the_model_allows(language_model: Any) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, T5Config, T5ForConditionalGeneration

    gemma = Gemma2ForCausalLM(
        Gemma2Config(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                     num_key_value_heads=1, head_dim=8)
    )  # fmt: skip
    assert isinstance(twin_or_scratch(gemma, ParameterSet(select(gemma)), "rank1"), Scratch)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    assert isinstance(twin_or_scratch(t5, ParameterSet(select(t5)), "rank1"), Scratch)
    llama = language_model("llama")
    assert isinstance(twin_or_scratch(llama, ParameterSet(select(llama)), "rank1"), Twin)
    assert isinstance(twin_or_scratch(llama, ParameterSet(select(llama)), "rademacher"), Scratch)
