"""Generated text: the same as the model's own, whatever the batch, with noise that both sides share."""

from __future__ import annotations

import copy
import logging
import math
import re
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, T5Config, T5ForConditionalGeneration

from zorl.generation import Generation, GumbelNoise, gumbel
from zorl.parameters import ParameterSet
from zorl.perturbation import Scratch
from zorl.probe import CENTRE, Point
from zorl.prompts import Answer, Prompt

CAUSAL = ("gpt2", "opt", "llama", "qwen2")
PROMPT = Prompt("{text}")
ROWS = [
    {"text": text}
    for text in (
        "the film",
        "the answer was good, the answer was bad, the answer was odd, and",
        "who wrote the book? nobody knows who wrote the book:",
        'it {said} "{mask}" \\n {} {0} 100%',
        "naïve café — 東京 🎬\u200d🎥 é̄",
    )
]


def policy(part, prompt=PROMPT, **options):
    return Generation(part.evaluator, part.tokenizer, prompt, **{"max_new_tokens": 6, **options})


def with_model(part, model):
    return type(part)(model, Scratch(model, ParameterSet(model.named_parameters())), part.tokenizer)


def greedy_reference(part, text, steps):
    """The likeliest token, again and again, by full forwards without a cache."""
    ids = part.tokenizer(text)["input_ids"]
    new = []
    for _ in range(steps):
        with torch.no_grad():
            logits = part.model(input_ids=torch.tensor([[*ids, *new]])).logits[0, -1]
        new.append(int(logits.argmax()))
        if new[-1] == part.tokenizer.eos_token_id:
            break
    return new


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_greedy_text_is_the_likeliest_token_again_and_again(parts, kind, batch_size):
    part = parts(kind)
    (answers,) = policy(part, greedy=True, batch_size=batch_size).answers(ROWS, [CENTRE])
    for row, answer in zip(ROWS, answers, strict=True):
        assert answer.completion_ids == greedy_reference(part, row["text"], 6)
        assert answer.completion == part.tokenizer.decode(answer.completion_ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", CAUSAL)
def test_sampled_text_does_not_depend_on_the_batch(parts, kind):
    part = parts(kind)
    (together,) = policy(part).answers(ROWS, [CENTRE], noise_seed=5)
    (reversed_,) = policy(part, batch_size=2).answers(ROWS[::-1], [CENTRE], noise_seed=5)
    alone = [policy(part).answers([row], [CENTRE], noise_seed=5)[0][0] for row in ROWS]
    assert together == reversed_[::-1] == alone
    assert len({tuple(answer.completion_ids) for answer in together}) == len(ROWS)


def test_sampled_text_depends_on_the_noise_seed_and_is_repeated_by_it(parts):
    generation = policy(parts("llama"))
    first, second, again = (generation.answers(ROWS, [CENTRE], noise_seed=seed) for seed in (1, 2, 1))
    assert first == again
    assert first != second


def test_sampling_leaves_the_global_random_state_alone(parts):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    policy(parts("gpt2")).answers(ROWS, [CENTRE])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_both_sides_see_the_same_noise(parts, kind):
    """Where the two sides are the same model, they say the same; and a small step changes few answers."""
    generation = policy(parts(kind))
    plus, minus, centre = generation.answers(ROWS, [Point(1, 0.0), Point(2, 0.0), CENTRE], noise_seed=9)
    assert plus == minus == centre
    near, other = generation.answers(ROWS, [Point(1, 1e-6)], noise_seed=9)[0], generation.answers(ROWS, [CENTRE])[0]
    assert near == centre
    assert other != centre


def test_a_point_generates_as_the_moved_model_does(parts):
    part = parts("opt")
    moved = copy.deepcopy(part.model)
    point = Point(3, 0.1)
    parameters = ParameterSet(moved.named_parameters())
    with torch.no_grad():
        for name, tensor in parameters.items():
            z = part.evaluator.evaluate(point, lambda name=name: _parameter(part.evaluator.module, name))
            tensor.copy_(z)
    expected = policy(with_model(part, moved)).answers(ROWS, [CENTRE], noise_seed=4)
    assert policy(part).answers(ROWS, [point], noise_seed=4) == expected
    assert policy(part).answers(ROWS, [CENTRE], noise_seed=4) != expected


def _parameter(module, name):
    owner, _, attribute = name.rpartition(".")
    return getattr(module.get_submodule(owner), attribute).clone()


def test_every_call_fills_a_cache_of_its_own(parts, monkeypatch):
    part = parts("llama")
    started_empty = []
    forward = part.evaluator.module.forward

    def spy(*args, **kwargs):
        cache = kwargs["past_key_values"]
        if kwargs["input_ids"].shape[1] > 1:
            started_empty.append((id(cache), isinstance(cache, DynamicCache) and cache.get_seq_length() == 0))
            kept.append(cache)  # so that its id is not used again
        return forward(*args, **kwargs)

    kept: list[DynamicCache] = []
    monkeypatch.setattr(part.evaluator.module, "forward", spy)
    policy(part, batch_size=3, greedy=True).answers(ROWS, [Point(1, 0.1), Point(1, -0.1)])
    assert len(started_empty) == len({key for key, _ in started_empty}) == 4
    assert all(empty for _, empty in started_empty)


# --- noise -----------------------------------------------------------------------------------------------------------


def test_noise_depends_on_seed_prompt_position_and_token_alone():
    scores = torch.zeros(2, 50)
    short, padded = GumbelNoise([[7, 8], [9]], 1, width=2), GumbelNoise([[9], [1, 2, 3]], 1, width=3)
    first = short(torch.zeros(2, 2), scores)
    assert torch.equal(first[1], padded(torch.zeros(2, 3), scores)[0])
    for other in (
        first[0],
        short(torch.zeros(2, 3), scores)[1],
        GumbelNoise([[9]], 2, width=2)(torch.zeros(1, 2), scores[:1])[0],
        GumbelNoise([[9, 9]], 1, width=2)(torch.zeros(1, 2), scores[:1])[0],
    ):
        assert not torch.isclose(other, first[1]).any()


@given(st.integers(-(1 << 31), (1 << 31) - 1), st.integers(-(1 << 31), (1 << 31) - 1))
def test_noise_is_finite_under_any_key(first, second):
    noise = gumbel(torch.tensor([[first, second]], dtype=torch.int32), 1000)
    assert noise.min() > -2.82
    assert noise.max() < 16.65


def test_noise_has_the_moments_of_gumbels_distribution():
    keys = torch.arange(400, dtype=torch.int32).view(200, 2)  # neighbouring keys, as a poor hash would mind
    noise = gumbel(keys, 5000).double()
    euler = 0.5772156649
    assert noise.mean() == pytest.approx(euler, abs=5 * math.pi / math.sqrt(6e6))
    assert noise.var() == pytest.approx(math.pi**2 / 6, rel=0.01)
    quantiles = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99], dtype=torch.float64)
    expected = -(-quantiles.log()).log()
    found = (noise.flatten()[:, None] <= expected).double().mean(0)
    torch.testing.assert_close(found, quantiles, atol=2e-3, rtol=0)
    rows = torch.corrcoef(noise)  # (200, 200)
    assert (rows - torch.eye(200)).abs().max() < 6 / math.sqrt(5000)


def _mix(x):
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
    return x


@given(st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 32) - 1), st.integers(0, 300_000))
def test_noise_is_the_documented_hash(first, second, token):
    u = ((_mix((_mix(token ^ first) + second) & 0xFFFFFFFF) >> 9) + 0.5) / (1 << 23)
    keys = torch.tensor([[first, second]]).int()  # the upper half wraps to negative numbers
    assert gumbel(keys, token + 1)[0, token].item() == pytest.approx(-math.log(-math.log(u)), rel=1e-4, abs=1e-5)


def test_noise_of_many_rows_is_that_of_each(monkeypatch):
    prompts = [[i] for i in range(9)]
    whole = GumbelNoise(prompts, 3, width=1)(torch.zeros(9, 1), torch.zeros(9, 40))
    monkeypatch.setattr("zorl.generation._BLOCK", 100)
    assert torch.equal(whole, GumbelNoise(prompts, 3, width=1)(torch.zeros(9, 1), torch.zeros(9, 40)))


def test_samples_have_the_frequencies_of_the_softmax():
    """Pearson's chi-square of 20,000 samples with 7 degrees of freedom: 24.3 has probability 0.001."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, 0.0, -1.0, -2.0, -3.0])
    n = 20_000
    noise = GumbelNoise([[i] for i in range(n)], 11, width=4)
    chosen = noise(torch.zeros(n, 4), logits.expand(n, -1)).argmax(-1)
    expected = logits.softmax(0) * n
    chi_square = ((chosen.bincount(minlength=8) - expected).square() / expected).sum()
    assert chi_square < 24.3


def _first_tokens(part, n=400, **options):
    """First tokens sampled after one prompt under n seeds, and the logits they come from."""
    generation = policy(part, max_new_tokens=1, **options)
    ids = torch.tensor([part.tokenizer("the film")["input_ids"]])
    with torch.no_grad():
        logits = part.model(input_ids=ids).logits[0, -1].double()
    rows = [{"text": "the film"}]
    found = [generation.answers(rows, [CENTRE], noise_seed=seed)[0][0].completion_ids[0] for seed in range(n)]
    return torch.tensor(found), logits


def test_generated_tokens_have_the_models_probabilities_at_the_temperature(parts):
    found, logits = _first_tokens(parts("gpt2"), temperature=0.5, top_k=8)
    likely, tokens = logits.topk(8)
    expected = (likely / 0.5).softmax(0) * 400
    counts = (found[:, None] == tokens).sum(0)
    assert counts.sum() == 400
    assert expected.min() > 5  # as the approximation by a chi-square with 7 degrees of freedom needs
    assert ((counts - expected).square() / expected).sum() < 24.3


def test_top_k_and_top_p_bound_what_is_sampled(parts):
    found, logits = _first_tokens(parts("gpt2"), n=100, top_k=3, temperature=5.0)
    assert set(found.tolist()) == set(logits.topk(3).indices.tolist())
    probabilities, order = logits.softmax(0).sort(descending=True)
    nucleus = order[: int((probabilities.cumsum(0) < 0.5).sum()) + 1]
    found, _ = _first_tokens(parts("gpt2"), n=100, top_p=0.5)
    assert set(found.tolist()) <= set(nucleus.tolist())
    assert len(set(found.tolist())) > 1


# --- what an answer is -----------------------------------------------------------------------------------------------


def _stopping_at(part, tokens):
    model = copy.deepcopy(part.model)
    model.generation_config.eos_token_id = tokens
    return with_model(part, model)


def test_an_answer_ends_with_the_token_that_stops_it(parts):
    part = parts("gpt2")
    (free,) = policy(part, greedy=True, max_new_tokens=12).answers(ROWS, [CENTRE])
    stop = free[0].completion_ids[2]
    (stopped,) = policy(_stopping_at(part, stop), greedy=True, max_new_tokens=12).answers(ROWS, [CENTRE])
    for before, after in zip(free, stopped, strict=True):
        ids = before.completion_ids
        assert after.completion_ids == (ids[: ids.index(stop) + 1] if stop in ids else ids)
    assert len(stopped[0].completion_ids) <= 3


def test_all_of_a_models_stop_tokens_stop_it(parts):
    part = parts("qwen2")
    (free,) = policy(part, greedy=True, max_new_tokens=8).answers(ROWS[:2], [CENTRE])
    stops = [answer.completion_ids[1] for answer in free]
    (stopped,) = policy(_stopping_at(part, stops), greedy=True, max_new_tokens=8).answers(ROWS[:2], [CENTRE])
    for answer in stopped:
        assert len(answer.completion_ids) <= 2
        assert answer.completion_ids[-1] in stops


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("batch_size", [1, 32])
def test_an_answer_ends_before_the_stop_string(parts, kind, batch_size):
    part = parts(kind)
    points = [Point(1, 0.2), Point(1, -0.2)]
    free = policy(part, greedy=True, max_new_tokens=12).answers(ROWS, points)
    said = [answer.completion for of_point in free for answer in of_point]
    # Part of a token, and one that may span several. No tokenizer decodes an unfinished character as what it becomes.
    for pattern in ("[a-z]", "[a-z][^\ufffd]{2}"):
        stop = next(found[0] for text in said if (found := re.search(f"(?<=..){pattern}", text)))
        stopped = policy(part, greedy=True, max_new_tokens=12, stop=stop, batch_size=batch_size).answers(ROWS, points)
        for before, after in zip(chain(*free), chain(*stopped), strict=True):
            ids = after.completion_ids
            assert after.completion == before.completion.partition(stop)[0]
            assert ids == before.completion_ids[: len(ids)]
            if stop in before.completion:
                assert stop in part.tokenizer.decode(ids, skip_special_tokens=True)
                assert stop not in part.tokenizer.decode(ids[:-1], skip_special_tokens=True)
            else:
                assert ids == before.completion_ids


def test_a_special_token_may_be_the_stop_string(parts):
    part = parts("qwen2")
    (free,) = policy(part, greedy=True, max_new_tokens=12).answers(ROWS[:1], [CENTRE])
    tokenizer = copy.deepcopy(part.tokenizer)
    word = tokenizer.convert_ids_to_tokens(free[0].completion_ids[2])
    tokenizer.add_special_tokens({"extra_special_tokens": [word]})
    generation = Generation(part.evaluator, tokenizer, PROMPT, max_new_tokens=12, greedy=True, stop=word)
    (stopped,) = generation.answers(ROWS[:1], [CENTRE])
    assert stopped[0].completion_ids == free[0].completion_ids[:3]
    assert stopped[0].completion == part.tokenizer.decode(free[0].completion_ids[:2])


def test_generation_ends_once_every_row_has_the_stop_string(parts, monkeypatch):
    part = parts("gpt2")
    (free,) = policy(part, greedy=True, max_new_tokens=12).answers(ROWS[:1], [CENTRE])
    forwards = []
    handle = part.evaluator.module.register_forward_pre_hook(lambda *args: forwards.append(1))
    try:
        stop = free[0].completion[:1]
        policy(part, greedy=True, max_new_tokens=12, stop=stop).answers(ROWS[:1], [CENTRE])
    finally:
        handle.remove()
    assert len(forwards) == 1


def test_a_stop_string_that_begins_in_the_prompt_does_not_count(parts):
    part = parts("gpt2")
    (free,) = policy(part, greedy=True, max_new_tokens=12).answers(ROWS[:1], [CENTRE])
    stop = ROWS[0]["text"][-1:] + free[0].completion[:1]
    assert stop not in free[0].completion
    assert policy(part, greedy=True, max_new_tokens=12, stop=stop).answers(ROWS[:1], [CENTRE]) == [free]


def test_special_tokens_are_not_text(parts):
    part = parts("qwen2")
    model = copy.deepcopy(part.model)
    end = part.tokenizer.eos_token_id
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[end] = 1.0  # the hidden state's sum may have either sign
        model.model.norm.weight.copy_(torch.ones(32))
    part = with_model(part, model)
    answers = policy(part, max_new_tokens=30).answers(ROWS, [CENTRE])[0]
    assert any(answer.completion_ids[-1] == end for answer in answers)
    assert all("<|end|>" not in answer.completion for answer in answers)
    assert all(end not in answer.completion_ids[:-1] for answer in answers)


def test_conversations_are_answered_with_messages(parts):
    part = parts("qwen2")
    messages = [{"role": "user", "content": "the film"}]
    ((spoken,),) = policy(part, Prompt("{prompt}")).answers([{"prompt": messages}], [CENTRE])
    ((written,),) = policy(part, Prompt("{text}", chat=True)).answers([{"text": "the film"}], [CENTRE])
    assert isinstance(written.completion, str)
    assert spoken == Answer([{"role": "assistant", "content": written.completion}], written.completion_ids)
    text = "<|user|>\nthe film<|end|>\n<|assistant|>\n"
    assert policy(part).answers([{"text": text}], [CENTRE]) == [[written]]


def test_a_long_prompt_leaves_room_for_the_answer(parts):
    part = parts("opt")
    inputs = []
    handle = part.evaluator.module.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    generation = policy(part, Prompt("Review: {text} It"), greedy=True, max_length=20)
    try:
        ((answer,),) = generation.answers([{"text": "the film was odd " * 60}], [CENTRE])
    finally:
        handle.remove()
    assert 11 <= len(inputs[0]) <= 14
    prompt = part.tokenizer.decode(inputs[0], skip_special_tokens=True)
    assert prompt.startswith("Review: ")
    assert prompt.endswith("film was odd  It")
    assert answer.completion_ids == greedy_reference(part, prompt, 6)


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_prompt_longer_than_the_model_reads_is_cut_without_being_asked(parts, kind):
    ((answer,),) = policy(parts(kind)).answers([{"text": "the film was odd " * 60}], [CENTRE])
    assert 1 <= len(answer.completion_ids) <= 6


@pytest.mark.parametrize("limit", [{"max_length": 7}, {"max_new_tokens": 2}, {}])
def test_the_models_own_sampling_settings_neither_interfere_nor_warn(parts, caplog, monkeypatch, limit):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    part = parts("llama")
    model = copy.deepcopy(part.model)
    model.generation_config.update(do_sample=True, temperature=0.3, top_k=2, top_p=0.4, num_beams=3, **limit)
    generation = policy(with_model(part, model))
    caplog.clear()
    found = generation.answers(ROWS, [CENTRE])
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert found == policy(part).answers(ROWS, [CENTRE])


def test_the_tokenizers_padding_side_does_not_matter(parts):
    part = parts("opt")
    results = []
    for side in ("left", "right"):
        tokenizer = copy.deepcopy(part.tokenizer)
        tokenizer.padding_side = side
        results.append(Generation(part.evaluator, tokenizer, PROMPT, max_new_tokens=4).answers(ROWS, [CENTRE]))
    assert results[0] == results[1]


def test_no_rows_are_answered_with_nothing(parts):
    assert policy(parts("gpt2")).answers([], [CENTRE, CENTRE]) == [[], []]
    assert policy(parts("gpt2")).answers(ROWS, []) == []


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("greedy", [True, False])
def test_nan_logits_are_no_text(parts, greedy):
    part = parts("gpt2")
    model = copy.deepcopy(part.model)
    broken = with_model(part, model)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="logits are NaN while it generates"):
        policy(broken, greedy=greedy).answers(ROWS, [CENTRE])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"top_k": 0}, "top_k must be at least 1, not 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], not 0.0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], not 1.5"),
        ({"temperature": 0.0}, "temperature must be positive, not 0.0; for the most likely tokens set greedy=True"),
        ({"temperature": float("nan")}, "temperature must be positive, not nan"),
        ({"stop": ""}, "stop must not be empty"),
        ({"max_new_tokens": 96}, "max_new_tokens=96 leaves no room for a prompt in 96 tokens"),
        ({"max_length": 6}, "max_new_tokens=6 leaves no room for a prompt in 6 tokens"),
    ],
)
def test_arguments_out_of_range_are_named(parts, options, message):
    with pytest.raises(ValueError, match=message):
        policy(parts("gpt2"), **options)


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt("{text} {mask}", {0: "bad", 1: "good"}),
        Prompt("{text} {mask}", options="choices"),
        Prompt("{text}", classes=("bad", "good")),
    ],
    ids=["label words", "options", "classes"],
)
def test_a_prompt_with_answers_to_choose_from_is_not_for_text(parts, prompt: Prompt):
    with pytest.raises(
        ValueError, match="has label_words, options or classes to choose from; generated text needs none"
    ):
        policy(parts("gpt2"), prompt)


def test_models_that_do_not_generate_are_refused(parts):
    with pytest.raises(TypeError, match="which BertForMaskedLM is not"):
        policy(parts("bert"))
    model = T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2))
    with pytest.raises(TypeError, match="which T5ForConditionalGeneration is not"):
        policy(with_model(parts("gpt2"), model))
