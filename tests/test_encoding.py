"""Prompts as token ids: tokenised once, shortened where too long, batched by length."""

from __future__ import annotations

import copy
import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BloomConfig, BloomForCausalLM

from zorl import encoding
from zorl.encoding import (
    ContextTokenizer,
    Encoded,
    Options,
    PromptEncoder,
    length_buckets,
    longest_input,
    pad_token_id,
    padded,
)
from zorl.prompts import Prompt

LENGTHS = st.lists(st.integers(1, 60), max_size=9)


def _cost(buckets, lengths, overhead):
    return sum(len(bucket) * max(lengths[i] for i in bucket) + overhead for bucket in buckets)


@given(LENGTHS, st.integers(1, 5), st.integers(0, 50))
def test_buckets_hold_every_prompt_once_and_keep_to_the_batch_size(lengths, batch_size, overhead):
    buckets = length_buckets(lengths, batch_size, overhead)
    assert sorted(itertools.chain(*buckets)) == list(range(len(lengths)))
    assert all(1 <= len(bucket) <= batch_size for bucket in buckets)
    assert [lengths[i] for bucket in buckets for i in bucket] == sorted(lengths, reverse=True)


@given(LENGTHS, st.integers(1, 5), st.integers(0, 50))
def test_buckets_are_the_cheapest_split(lengths, batch_size, overhead):
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    splits = []
    for cuts in itertools.product([False, True], repeat=max(0, len(lengths) - 1)):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut]
        split = [order[a:b] for a, b in itertools.pairwise([0, *ends, len(lengths)])] if lengths else []
        if all(len(bucket) <= batch_size for bucket in split):
            splits.append(_cost(split, lengths, overhead))
    assert _cost(length_buckets(lengths, batch_size, overhead), lengths, overhead) == min(splits)


@pytest.mark.parametrize(
    ("side", "tokens", "mask"),
    [
        ("right", [[1, 2, 3], [4, 9, 9]], [[1, 1, 1], [1, 0, 0]]),
        ("left", [[1, 2, 3], [9, 9, 4]], [[1, 1, 1], [0, 0, 1]]),
    ],
)
def test_padding_is_put_on_the_asked_side_and_masked(side, tokens, mask):
    ids, attention = padded([np.array([1, 2, 3]), np.array([4])], 9, side, torch.device("cpu"))
    assert ids.tolist() == tokens
    assert attention.tolist() == mask
    assert ids.dtype == attention.dtype == torch.int64


def test_options_that_begin_alike_share_an_input():
    options = Options.of([[1], [2, 3], [2, 4, 5], [6, 7], [2]])
    assert options.suffixes == ((2, 4), (6,))
    assert options.suffix_of == (0, 0, 0, 1, 0)
    assert options.longest == 3


def test_options_of_one_token_need_the_prompt_alone():
    assert Options.of([[5], [3], [4]]) == Options(((5,), (3,), (4,)), ((),), (0, 0, 0))


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=6))
def test_every_option_is_covered_by_its_suffix_and_no_suffix_is_to_spare(tokens):
    options = Options.of(tokens)
    for option, index in zip(options.tokens, options.suffix_of, strict=True):
        assert options.suffixes[index][: len(option) - 1] == option[:-1]
    assert set(options.suffixes) <= {option[:-1] for option in options.tokens}
    for a, b in itertools.permutations(options.suffixes, 2):
        assert b[: len(a)] != a


@pytest.mark.parametrize(("kind", "start"), [("gpt2", None), ("opt", "</s>"), ("llama", "<s>"), ("roberta", "<s>")])
def test_a_context_has_what_the_tokenizer_puts_in_front_and_not_what_it_puts_behind(parts, kind, start):
    tokenizer = parts(kind).tokenizer
    prompt = Prompt("{t}")
    rendered = [prompt.render({"t": text}) for text in ("it was great", "odd")]
    ids = ContextTokenizer(tokenizer, prompt).ids(rendered, [one.before for one in rendered])
    expected = [] if start is None else [tokenizer.convert_tokens_to_ids(start)]
    for one, text in zip(ids, ("it was great", "odd"), strict=True):
        assert one == expected + tokenizer(text, add_special_tokens=False)["input_ids"]


def test_an_empty_prompt_starts_with_the_tokenizers_start_token(parts):
    tokenizer = parts("gpt2").tokenizer
    prompt = Prompt("{t}")
    assert ContextTokenizer(tokenizer, prompt).ids([prompt.render({"t": ""})], [""]) == [[tokenizer.bos_token_id]]


def _words(rendered):
    """A tokenizer for these tests: a token for each word, its length."""
    return [Encoded(np.array([len(word) for word in one.before.split(" ")], dtype=np.int32), 0) for one in rendered]


def test_a_prompt_is_tokenised_once():
    seen = []

    def tokenise(rendered):
        seen.extend(one.before for one in rendered)
        return _words(rendered)

    encode = PromptEncoder(Prompt("{t}"), tokenise, max_length=9, keep="end", vocabulary=99)
    rows = [{"t": "a b", "label": 1}, {"t": "c", "label": 2}, {"t": "a b", "label": 3}]
    assert [one.ids.tolist() for one in encode(rows)] == [[1, 1], [1], [1, 1]]
    encode(rows[::-1])
    encode([{"t": "d"}, *rows])
    assert seen == ["a b", "c", "d"]


def test_the_memory_of_prompts_is_bounded(monkeypatch):
    monkeypatch.setattr(encoding, "CACHED_PROMPTS", 3)
    encode = PromptEncoder(Prompt("{t}"), _words, max_length=9, keep="end", vocabulary=99)
    rows = [{"t": "x" * i} for i in range(1, 9)]
    for _ in range(2):
        assert [one.ids.tolist() for one in encode(rows)] == [[i] for i in range(1, 9)]
        assert len(encode._cache) == 3


@pytest.mark.parametrize(("keep", "expected"), [("start", [5, 1, 2, 3]), ("end", [5, 2, 3, 4])])
def test_a_long_row_is_cut_to_the_most_that_fits(keep, expected):
    encode = PromptEncoder(Prompt("Text: {t}"), _words, max_length=4, keep=keep, vocabulary=99)
    assert encode([{"t": "a bb ccc dddd"}])[0].ids.tolist() == expected


def test_the_longest_value_is_cut_first():
    tokenised = []

    def tokenise(rendered):
        tokenised.append(rendered[0].before)
        return _words(rendered)

    encode = PromptEncoder(Prompt("{a} | {b}"), tokenise, max_length=5, keep="start", vocabulary=99)
    encoded = encode([{"a": "aa", "b": "b b b b b b"}])[0]
    assert encoded.ids.tolist() == [2, 1, 1, 1, 1]
    assert "aa | b b b" in tokenised


def test_a_template_that_is_too_long_by_itself_is_refused():
    encode = PromptEncoder(Prompt("a b c {t}"), _words, max_length=3, keep="end", vocabulary=99)
    with pytest.raises(ValueError, match=r"the template 'a b c \{t\}' alone takes 4 tokens, and there is room for 3"):
        encode([{"t": "d"}])


def test_a_tokenizer_of_another_model_is_noticed():
    encode = PromptEncoder(Prompt("{t}"), _words, max_length=9, keep="end", vocabulary=4)
    encode([{"t": "abc"}])
    for _ in range(2):  # it is not remembered, either
        with pytest.raises(ValueError, match="the token 4, and the model's vocabulary has 4 tokens"):
            encode([{"t": "abcd"}])


@pytest.mark.parametrize(("kind", "tokens"), [("bert", 96), ("roberta", 94), ("gpt2", 96), ("opt", 96), ("llama", 96)])
def test_the_longest_input_is_one_that_the_model_reads(parts, kind, tokens):
    part = parts(kind)
    assert longest_input(part.model, part.tokenizer) == tokens
    ids = torch.full((1, tokens), 7)
    assert part.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.isfinite().all()


def test_a_model_that_numbers_no_positions_reads_any_length(parts):
    model = BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=1))
    assert longest_input(model, parts("llama").tokenizer) == sys.maxsize


def test_a_tokenizer_without_padding_pads_with_another_token(parts):
    assert pad_token_id(parts("gpt2").tokenizer) == parts("gpt2").tokenizer.eos_token_id
    assert pad_token_id(parts("opt").tokenizer) == parts("opt").tokenizer.pad_token_id


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{% for message in messages %}", "Unexpected end of template"),
        ("{{ nowhere.text }}", "'nowhere' is undefined"),
    ],
)
def test_a_conversation_that_the_chat_template_refuses_is_a_sentence(parts, template, message):
    tokenizer = copy.deepcopy(parts("qwen2").tokenizer)
    tokenizer.chat_template = template
    prompt = Prompt("{text}", system="be odd")
    with pytest.raises(ValueError, match=f"the chat template refuses this conversation: .*{message}"):
        ContextTokenizer(tokenizer, prompt).text(prompt.render({"text": "fine"}))
