"""Label-word scores against the model's own full forward, one row at a time."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertModel,
    DebertaConfig,
    DebertaV2Config,
    GPT2LMHeadModel,
    MobileBertConfig,
    MobileBertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutput

from zorl.directions import Step
from zorl.label_head import LabelHead
from zorl.parameters import ParameterSet
from zorl.perturbation import Scratch
from zorl.probe import CENTRE, Point
from zorl.prompts import Prompt
from zorl.scoring import LabelWords

MASKED = ("bert", "roberta")
CAUSAL = ("gpt2", "opt", "llama", "qwen2")
PROMPT = Prompt("{text} it was {mask}.", {"negative": "terrible", "positive": "great", "neither": "odd"})
LONG_WORDS = Prompt("{text} it was {mask}.", {0: "terrible", 1: "unbelievable", 2: "great", 3: "unwatchable"})
ROWS = [
    {"text": text}
    for text in (
        "the film",
        "the answer was good, the answer was bad, the answer was odd, and",
        "I liked",
        "",
        "who wrote the book? nobody knows who wrote the book:",
        'it {said} "{mask}" \\n {} {0} 100%',
        "naïve café — 東京 🎬\u200d🎥 \u0000\ufeff é̄",
        "the film [MASK] was <mask>",
    )
]


def policy(part, prompt=PROMPT, **options):
    return LabelWords(part.evaluator, part.tokenizer, prompt, **options)


def full_logits(part, ids):
    """Logits of one unpadded input, shape `(T, vocabulary)`."""
    with torch.no_grad():
        logits = part.model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=int)).logits[0]
    return logits[-len(ids) :]  # without the virtual tokens of prompt tuning


def masked_reference(part, text, tokens):
    """`text` holds the tokenizer's mask token; the last one in it is ours."""
    ids = part.tokenizer(text)["input_ids"]
    position = max(i for i, token in enumerate(ids) if token == part.tokenizer.mask_token_id)
    return full_logits(part, ids)[position, tokens].log_softmax(0)


def causal_reference(part, context, options, mean=False):
    """Teacher forcing: each option's log-likelihood, read from an input of its own."""
    totals = []
    for option in options:
        log_probabilities = full_logits(part, [*context, *option]).log_softmax(-1)
        steps = [log_probabilities[len(context) - 1 + i, token] for i, token in enumerate(option)]
        totals.append(torch.stack(steps).sum() / (len(option) if mean else 1))
    return torch.stack(totals).log_softmax(0)


def ids_behind(part, text):
    """Tokens of a continuation that begins with a space."""
    plain = part.tokenizer("a", add_special_tokens=False)["input_ids"]
    both = part.tokenizer("a" + text, add_special_tokens=False)["input_ids"]
    assert both[: len(plain)] == plain
    return both[len(plain) :]


@pytest.mark.parametrize("kind", MASKED)
def test_a_masked_model_is_read_at_its_mask(parts, kind):
    part = parts(kind)
    tokens = [ids_behind(part, " " + word)[0] for word in ("terrible", "great", "odd")]
    scores = policy(part).scores(ROWS, [CENTRE])
    assert scores.shape == (1, len(ROWS), 3)
    for row, score in zip(ROWS, scores[0], strict=True):
        expected = masked_reference(part, f"{row['text']} it was {part.tokenizer.mask_token}.", tokens)
        torch.testing.assert_close(score, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_causal_model_is_read_at_the_end_of_the_context(parts, kind):
    part = parts(kind)
    options = [ids_behind(part, " " + word) for word in ("terrible", "great", "odd")]
    assert all(len(option) == 1 for option in options)
    scores = policy(part).scores(ROWS, [CENTRE])
    for row, score in zip(ROWS, scores[0], strict=True):
        context = part.tokenizer(f"{row['text']} it was")["input_ids"]
        expected = causal_reference(part, context, options)
        torch.testing.assert_close(score, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("mean", [False, True])
def test_words_of_several_tokens_are_scored_by_their_log_likelihood(parts, kind, mean):
    part = parts(kind)
    options = [ids_behind(part, " " + word) for word in ("terrible", "unbelievable", "great", "unwatchable")]
    assert sorted(len(option) > 1 for option in options) == [False, False, True, True]
    scores = policy(part, LONG_WORDS, average_tokens=mean).scores(ROWS, [CENTRE])
    for row, score in zip(ROWS, scores[0], strict=True):
        context = part.tokenizer(f"{row['text']} it was")["input_ids"]
        torch.testing.assert_close(score, causal_reference(part, context, options, mean), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", [*MASKED, *CAUSAL])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_row_scores_the_same_in_any_batch(parts, kind, batch_size):
    part = parts(kind)
    prompt = PROMPT if kind in MASKED else LONG_WORDS
    together = policy(part, prompt, batch_size=batch_size).scores(ROWS, [CENTRE])[0]
    alone = torch.cat([policy(part, prompt).scores([row], [CENTRE])[0] for row in ROWS])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_the_tokenizers_padding_side_does_not_matter(parts, kind):
    part = parts(kind)
    results = []
    for side in ("left", "right"):
        tokenizer = copy.deepcopy(part.tokenizer)
        tokenizer.padding_side = tokenizer.truncation_side = side
        results.append(LabelWords(part.evaluator, tokenizer, PROMPT).scores(ROWS, [CENTRE]))
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", [*MASKED, *CAUSAL])
def test_scores_at_a_point_are_those_of_the_moved_model(parts, kind):
    part = parts(kind)
    prompt = PROMPT if kind in MASKED else LONG_WORDS
    points = [Point(3, 1e-2), Point(3, -1e-2), CENTRE]
    scores = policy(part, prompt).scores(ROWS, points)
    for point, found in zip(points, scores, strict=True):
        moved = copy.deepcopy(part.model)
        parameters = ParameterSet(moved.named_parameters())
        parameters.add([Step(point.seed, point.offset)], "rademacher")
        expected = LabelWords(Scratch(moved, parameters), part.tokenizer, prompt).scores(ROWS, [CENTRE])[0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(scores[0], scores[1], atol=1e-3)


@pytest.mark.parametrize("kind", ["bert", "opt"])
def test_the_order_and_number_of_points_do_not_matter(parts, kind):
    points = [Point(1, 1e-2), Point(1, -1e-2), CENTRE]
    forward = policy(parts(kind)).scores(ROWS, points)
    backward = policy(parts(kind)).scores(ROWS, points[::-1])
    assert torch.equal(forward, backward.flip(0))
    assert torch.equal(forward[1:2], policy(parts(kind)).scores(ROWS, points[1:2]))


@pytest.mark.parametrize(("kind", "width"), [(k, 3) for k in (*MASKED, *CAUSAL)])
def test_the_head_sees_only_the_positions_and_rows_that_are_needed(parts, kind, width):
    part = parts(kind)
    module = part.evaluator.module
    shapes = []
    handle = module.get_output_embeddings().register_forward_hook(lambda m, i, out: shapes.append(tuple(out.shape)))
    try:
        policy(part).scores(ROWS[:3], [Point(1, 1e-2)])
    finally:
        handle.remove()
    assert sum(rows for rows, *_ in shapes) == 3
    assert {shape[1:] for shape in shapes} == {(1, width)}


def test_words_that_begin_alike_share_an_input(parts):
    part = parts("qwen2")
    shapes = []
    handle = part.evaluator.module.register_forward_hook(lambda m, i, out: shapes.append(tuple(out.logits.shape)))
    try:
        policy(part, LONG_WORDS).scores(ROWS[:1], [CENTRE])
    finally:
        handle.remove()
    steps = max(len(ids_behind(part, " " + word)) for word in LONG_WORDS.label_words.values())
    assert shapes == [
        (2, steps, len(part.tokenizer))
    ]  # the two long words; the short ones are read from the same inputs


def test_hooks_are_gone_after_a_forward_that_fails(parts):
    part = parts("gpt2")
    module = copy.deepcopy(part.model)
    words = LabelWords(Scratch(module, ParameterSet(module.named_parameters())), part.tokenizer, PROMPT)
    head = words.evaluator.module.get_output_embeddings()
    before = len(head._forward_pre_hooks)

    def fail(*args):
        raise KeyboardInterrupt

    handle = head.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        words.scores(ROWS, [CENTRE])
    handle.remove()
    assert len(head._forward_pre_hooks) == before
    assert torch.equal(words.scores(ROWS, [CENTRE]), policy(part).scores(ROWS, [CENTRE]))


def test_a_head_that_never_calls_the_output_embedding_is_read_all_the_same(parts):
    tokenizer = parts("bert").tokenizer
    torch.manual_seed(0)
    model = MobileBertForMaskedLM(
        MobileBertConfig(
            vocab_size=len(tokenizer), hidden_size=32, embedding_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, intra_bottleneck_size=16, initializer_range=0.3,
        )
    ).eval()  # fmt: skip
    part = type(parts("bert"))(model, Scratch(model, ParameterSet(model.named_parameters())), tokenizer)
    tokens = [ids_behind(part, " " + word)[0] for word in ("terrible", "great", "odd")]
    scores = policy(part).scores(ROWS, [CENTRE])
    for row, score in zip(ROWS, scores[0], strict=True):
        expected = masked_reference(part, f"{row['text']} it was [MASK].", tokens)
        torch.testing.assert_close(score, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [DebertaConfig, DebertaV2Config])
def test_a_head_whose_output_embedding_is_another_layer_is_read_in_full(parts, config):
    """DeBERTa with `legacy=False` calls its hidden-to-hidden layer so."""
    tokenizer = parts("bert").tokenizer
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(
        config(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            initializer_range=0.3, legacy=False,
        )
    ).eval()  # fmt: skip
    assert model.get_output_embeddings().weight.shape == (32, 32)
    part = type(parts("bert"))(model, Scratch(model, ParameterSet(model.named_parameters())), tokenizer)
    tokens = [ids_behind(part, " " + word)[0] for word in ("terrible", "great", "odd")]
    moved, centre = policy(part).scores(ROWS, [Point(3, 0.05), CENTRE])
    for row, score in zip(ROWS, centre, strict=True):
        expected = masked_reference(part, f"{row['text']} it was [MASK].", tokens)
        torch.testing.assert_close(score, expected, atol=1e-5, rtol=1e-5)
    assert (moved - centre).abs().max() > 1e-3
    assert policy(part).words_and_states(ROWS)[1] is None


class HeadByKeyword(GPT2LMHeadModel):
    """Calls its head in a way that hooks on positional arguments do not see."""

    def forward(self, input_ids, attention_mask, use_cache=None):
        hidden = self.transformer(input_ids, attention_mask=attention_mask, use_cache=use_cache).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(input=hidden))


@pytest.mark.parametrize("prompt", [PROMPT, LONG_WORDS])
def test_a_head_that_cannot_be_narrowed_is_read_in_full(parts, prompt):
    part = parts("gpt2")
    model = HeadByKeyword(part.model.config).eval()
    model.load_state_dict(part.model.state_dict())
    words = LabelWords(Scratch(model, ParameterSet(model.named_parameters())), part.tokenizer, prompt)
    torch.testing.assert_close(words.scores(ROWS, [CENTRE]), policy(part, prompt).scores(ROWS, [CENTRE]))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft reads it
@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("bert", LoraConfig(target_modules="all-linear", init_lora_weights=False)),
        ("llama", LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")),
        ("gpt2", PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")),
        ("gpt2", PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")),
    ],
)
def test_adapters_are_read_like_the_models_they_wrap(parts, kind, adapter):
    bare = parts(kind)
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(bare.model), adapter).eval()
    tuned = ParameterSet((name, p) for name, p in model.named_parameters() if p.requires_grad)
    part = type(bare)(model, Scratch(model, tuned), bare.tokenizer)
    words = policy(part)
    scores = words.scores([*ROWS, {"text": "the film was odd " * 60}], [CENTRE])[0]
    assert words.masked == (kind == "bert")
    options = [ids_behind(part, " " + word) for word in ("terrible", "great", "odd")]
    for row, score in zip(ROWS, scores[:-1], strict=True):
        if words.masked:
            expected = masked_reference(part, f"{row['text']} it was [MASK].", [option[0] for option in options])
        else:
            expected = causal_reference(part, part.tokenizer(f"{row['text']} it was")["input_ids"], options)
        torch.testing.assert_close(score, expected, atol=2e-5, rtol=1e-5)


def test_half_precision_logits_are_normalised_in_single_precision(parts):
    part = parts("llama")
    model = copy.deepcopy(part.model).to(torch.bfloat16)
    words = LabelWords(Scratch(model, ParameterSet(model.named_parameters())), part.tokenizer, PROMPT)
    scores = words.scores(ROWS, [CENTRE])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(1, len(ROWS)), atol=1e-6, rtol=0)
    torch.testing.assert_close(scores, policy(part).scores(ROWS, [CENTRE]), atol=0.3, rtol=0)


def test_a_label_bias_is_added_to_the_log_probabilities(parts):
    part = parts("bert")
    head = LabelHead((1.0, -0.5, 0.0))
    biased = policy(part, Prompt(PROMPT.template, PROMPT.label_words, label_head=head)).scores(ROWS, [CENTRE])
    expected = (policy(part).scores(ROWS, [CENTRE]) + torch.tensor([1.0, -0.5, 0.0])).log_softmax(-1)
    torch.testing.assert_close(biased, expected)


# --- where the word goes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*MASKED, *CAUSAL])
def test_a_word_behind_a_space_has_the_tokens_that_it_has_there(parts, kind):
    prompt = Prompt("{text} {mask}", {"bad": "bad", "good": "good"})
    (answer,) = policy(parts(kind), prompt).answers([{"text": "it was"}], [CENTRE])[0]
    assert answer.completion_ids == ids_behind(parts(kind), " " + answer.completion)


@pytest.mark.parametrize("kind", [*MASKED, "gpt2", "opt", "qwen2"])
@pytest.mark.parametrize("template", ["{text}\n{mask}", "{text}({mask})"])
def test_a_word_that_no_space_precedes_has_none_in_its_tokens(parts, kind, template):
    prompt = Prompt(template, {"bad": "bad", "good": "good"})
    (answer,) = policy(parts(kind), prompt).answers([{"text": "it was"}], [CENTRE])[0]
    assert answer.completion_ids == parts(kind).tokenizer(answer.completion, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", MASKED)
def test_a_word_may_open_the_text(parts, kind):
    part = parts(kind)
    tokens = [part.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("bad", "good")]
    ids = part.tokenizer(f"{part.tokenizer.mask_token} it was odd")["input_ids"]
    expected = full_logits(part, ids)[1, tokens].log_softmax(0)
    found = policy(part, Prompt("{mask} {text}", {0: "bad", 1: "good"})).scores([{"text": "it was odd"}], [CENTRE])[
        0, 0
    ]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_causal_model_that_is_asked_first_scores_word_and_text(parts, kind):
    part = parts(kind)
    texts = [part.tokenizer(f"{word} it was odd", add_special_tokens=False)["input_ids"] for word in ("bad", "good")]
    start = [i for i in (part.tokenizer.bos_token_id, part.tokenizer.eos_token_id) if i is not None][:1]
    expected = causal_reference(part, start, texts)
    found = policy(part, Prompt("{mask} {text}", {0: "bad", 1: "good"})).scores([{"text": "it was odd"}], [CENTRE])[
        0, 0
    ]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_spaces_at_the_end_of_a_text_do_not_reach_a_causal_model(parts):
    part = parts("gpt2")
    prompt = Prompt("{text} {mask}", {0: "bad", 1: "good"})
    clean, trailing = (policy(part, prompt).scores([{"text": text}], [CENTRE]) for text in ("it was", "it was   "))
    assert torch.equal(clean, trailing)


def test_punctuation_behind_the_mask_is_dropped_on_a_causal_model(parts):
    part = parts("opt")
    words = {0: "bad", 1: "good"}
    bare, dotted = (
        policy(part, Prompt(t, words)).scores(ROWS, [CENTRE]) for t in ("{text} is {mask}", "{text} is {mask} !?")
    )
    assert torch.equal(bare, dotted)


@pytest.mark.parametrize("kind", CAUSAL)
def test_text_behind_the_mask_is_scored_as_a_part_of_the_word(parts, kind):
    part = parts(kind)
    prompt = Prompt("{text} was {mask} to watch.", {0: "bad", 1: "good"})
    options = [ids_behind(part, f" {word} to watch.") for word in ("bad", "good")]
    scores = policy(part, prompt).scores(ROWS[:3], [CENTRE])
    for row, score in zip(ROWS[:3], scores[0], strict=True):
        context = part.tokenizer(f"{row['text']} was")["input_ids"]
        torch.testing.assert_close(score, causal_reference(part, context, options), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_column_behind_the_mask_is_scored_row_by_row(parts, kind):
    part = parts(kind)
    prompt = Prompt("{premise}? {mask}, {hypothesis}", {"yes": "yes", "no": "no"})
    rows = [{"premise": "the film was great", "hypothesis": "it was good"}, {"premise": "who", "hypothesis": "me"}]
    scores = policy(part, prompt).scores(rows, [CENTRE])
    for row, score in zip(rows, scores[0], strict=True):
        options = [ids_behind(part, f" {word}, {row['hypothesis']}") for word in ("yes", "no")]
        context = part.tokenizer(f"{row['premise']}?")["input_ids"]
        torch.testing.assert_close(score, causal_reference(part, context, options), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", MASKED)
def test_a_masked_model_reads_the_text_on_both_sides(parts, kind):
    part = parts(kind)
    prompt = Prompt("{premise}? {mask}, {hypothesis}", {"yes": "yes", "no": "no"})
    row = {"premise": "the film was great", "hypothesis": "it was good"}
    tokens = [ids_behind(part, " " + word)[0] for word in ("yes", "no")]
    text = f"the film was great? {part.tokenizer.mask_token}, it was good"
    expected = masked_reference(part, text, tokens)
    torch.testing.assert_close(policy(part, prompt).scores([row], [CENTRE])[0, 0], expected, atol=1e-5, rtol=1e-5)


def test_mask_tokens_in_the_data_are_not_taken_for_ours(parts):
    part = parts("bert")
    prompt = Prompt("{mask} : {text}", PROMPT.label_words)
    ids = part.tokenizer("[MASK] : a [MASK] b")["input_ids"]
    tokens = [part.tokenizer.convert_tokens_to_ids(word) for word in ("terrible", "great", "odd")]
    expected = full_logits(part, ids)[1, tokens].log_softmax(0)
    found = policy(part, prompt).scores([{"text": "a [MASK] b"}], [CENTRE])[0, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# --- chats -----------------------------------------------------------------------------------------------------------

CHAT = Prompt("{text}\nGood or bad?\n{mask}", {0: "Bad", 1: "Good"}, system="be odd")


def test_the_label_word_opens_the_reply_of_a_chat(parts):
    part = parts("qwen2")
    options = [part.tokenizer(word)["input_ids"] for word in ("Bad", "Good")]
    text = "<|system|>\nbe odd<|end|>\n<|user|>\nthe film\nGood or bad?<|end|>\n<|assistant|>\n"
    expected = causal_reference(part, part.tokenizer(text)["input_ids"], options)
    found = policy(part, CHAT).scores([{"text": "the film"}], [CENTRE])[0, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_conversation_in_the_data_is_scored_like_the_chat_it_spells(parts):
    part = parts("qwen2")
    messages = [{"role": "system", "content": "be odd"}, {"role": "user", "content": "the film\nGood or bad?"}]
    conversation = policy(part, Prompt("{prompt}{mask}", CHAT.label_words))
    answers = conversation.answers([{"prompt": messages}], [CENTRE])
    assert torch.equal(
        conversation.scores([{"prompt": messages}], [CENTRE]),
        policy(part, CHAT).scores([{"text": "the film"}], [CENTRE]),
    )
    assert answers[0][0].completion in ("0", "1")  # a label's name, for a conversation too


def test_a_reply_that_has_begun_is_continued(parts):
    part = parts("qwen2")
    part_tokenizer = copy.deepcopy(part.tokenizer)
    messages = [{"role": "user", "content": "Good or bad?"}, {"role": "assistant", "content": "The answer was"}]
    prompt = Prompt("{prompt} {mask}", {0: "bad", 1: "good"})
    text = "<|user|>\nGood or bad?<|end|>\n<|assistant|>\nThe answer was"
    expected = causal_reference(
        part, part_tokenizer(text)["input_ids"], [ids_behind(part, " bad"), ids_behind(part, " good")]
    )
    found = policy(part, prompt).scores([{"prompt": messages}], [CENTRE])[0, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_options_of_the_chat_template_are_passed_on(parts):
    part = parts("qwen2")
    tokenizer = copy.deepcopy(part.tokenizer)
    tokenizer.chat_template += "{% if terse %}Good{% endif %}"
    found = []
    for options in (None, {"terse": True}):
        prompt = Prompt("{text}{mask}", CHAT.label_words, chat=True, chat_template_kwargs=options)
        found.append(LabelWords(part.evaluator, tokenizer, prompt).scores([{"text": "x"}], [CENTRE]))
    assert not torch.equal(*found)


# --- too long --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKED)
def test_a_long_text_loses_its_end_and_keeps_the_template_on_a_masked_model(parts, kind):
    part = parts(kind)
    words = " ".join(["the film was odd"] * 60)
    prompt = Prompt("{text} it was {mask}.", PROMPT.label_words)
    found = policy(part, prompt, max_length=20).scores([{"text": words}], [CENTRE])[0, 0]
    tokens = [ids_behind(part, " " + word)[0] for word in ("terrible", "great", "odd")]
    fitting = [
        text
        for text in (f"{words[:n]} it was {part.tokenizer.mask_token}." for n in range(200))
        if len(part.tokenizer(text)["input_ids"]) <= 20
    ]
    torch.testing.assert_close(found, masked_reference(part, fitting[-1], tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_long_text_loses_its_start_and_keeps_the_template_on_a_causal_model(parts, kind):
    part = parts(kind)
    words = " ".join(["the film was odd"] * 60)
    prompt = Prompt("Review: {text} it was {mask}.", PROMPT.label_words)
    found = policy(part, prompt, max_length=20).scores([{"text": words}], [CENTRE])[0, 0]
    options = [ids_behind(part, " " + word) for word in ("terrible", "great", "odd")]
    fitting = [
        text
        for text in (f"Review: {words[len(words) - n :]} it was" for n in range(200))
        if len(part.tokenizer(text)["input_ids"]) <= 20
    ]
    expected = causal_reference(part, part.tokenizer(fitting[-1])["input_ids"], options)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [*MASKED, *CAUSAL])
def test_a_text_longer_than_the_model_reads_is_cut_without_being_asked(parts, kind):
    part = parts(kind)
    prompt = PROMPT if kind in MASKED else LONG_WORDS
    scores = policy(part, prompt).scores([{"text": "the film was odd " * 200}, ROWS[0]], [CENTRE])
    assert scores.isfinite().all()
    torch.testing.assert_close(scores[:, 1:], policy(part, prompt).scores(ROWS[:1], [CENTRE]), atol=2e-5, rtol=1e-5)


def test_a_long_conversation_is_cut_in_its_messages_only(parts):
    part = parts("qwen2")
    messages = [{"role": "system", "content": "be odd"}, {"role": "user", "content": "the film was odd " * 100}]
    words = policy(part, Prompt("{prompt}{mask}", CHAT.label_words))
    encoded = words._encode([{"prompt": messages}])[0]
    text = part.tokenizer.decode(encoded.ids)
    assert 90 <= len(encoded.ids) <= 96
    assert text.startswith("<|system|>\nbe odd<|end|>\n<|user|>\n")
    assert text.endswith("the film was odd <|end|>\n<|assistant|>\n")


# --- answers ---------------------------------------------------------------------------------------------------------


def test_the_answer_is_the_name_of_the_likeliest_label(parts):
    part = parts("roberta")
    points = [CENTRE, Point(5, 0.1)]
    answers = policy(part).answers(ROWS, points, noise_seed=7)
    names = list(PROMPT.label_words)
    expected = [[names[i] for i in side] for side in policy(part).scores(ROWS, points).argmax(-1).tolist()]
    assert [[answer.completion for answer in side] for side in answers] == expected
    assert len({name for side in expected for name in side}) > 1


def test_no_rows_and_no_points_are_answered_with_nothing(parts):
    words = policy(parts("bert"))
    assert words.scores([], [CENTRE]).shape == (1, 0, 3)
    assert words.scores(ROWS, []).shape == (0, len(ROWS), 3)
    assert words.answers([], [CENTRE, CENTRE]) == [[], []]
    assert words.answers(ROWS, []) == []


def test_nan_scores_are_no_answer(parts):
    part = parts("gpt2")
    model = copy.deepcopy(part.model)
    evaluator = Scratch(model, ParameterSet(model.named_parameters()))
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    words = LabelWords(evaluator, part.tokenizer, PROMPT)
    assert words.scores(ROWS, [CENTRE]).isnan().any()
    with pytest.raises(FloatingPointError, match=r"scores are NaN at the point with offset 0.5 along seed 4"):
        words.answers(ROWS, [Point(4, 0.5)])


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "prompt", "message"),
    [
        ("bert", Prompt("{text}"), "has no label_words; without them use Generation"),
        (
            "bert",
            Prompt("{text} {mask}", {0: "unbelievable", 1: "great"}),
            r"the label word 'unbelievable' is 12 tokens \('u', '##n', .*\), and a masked language model fills one mask",
        ),
        ("bert", Prompt("{text} {mask}", {0: "東京", 1: "great"}), r"does not know the label word '東京': .*\[UNK\]"),
        (
            "bert",
            Prompt("{text} {mask}", {0: "Great", 1: "great"}),
            "'Great' and 'great' are the same to the tokenizer",
        ),
        ("bert", Prompt("{text} {mask}", {0: "bad", 1: "great"}, chat=True), "a chat needs a causal language model"),
        ("gpt2", Prompt("{text} {mask}", {0: "bad", 1: "great"}, chat=True), "the tokenizer .* has no chat_template"),
    ],
)
def test_a_prompt_that_does_not_suit_the_model_says_why(parts, kind, prompt, message):
    with pytest.raises(ValueError, match=message):
        policy(parts(kind), prompt).scores([{"text": "x"}], [CENTRE])


def test_a_conversation_for_a_masked_model_is_refused(parts):
    words = policy(parts("bert"), Prompt("{text}{mask}", {0: "bad", 1: "great"}))
    with pytest.raises(ValueError, match="a row holds a conversation, which needs a causal language model"):
        words.scores([{"text": [{"role": "user", "content": "x"}]}], [CENTRE])


def test_a_masked_model_with_a_causal_tokenizer_is_refused(parts):
    with pytest.raises(ValueError, match="fills masks, but the tokenizer .* has no mask token"):
        LabelWords(parts("bert").evaluator, parts("gpt2").tokenizer, PROMPT)


def test_models_without_a_language_model_head_are_refused(parts):
    part = parts("bert")
    model = BertModel(part.model.config)
    with pytest.raises(TypeError, match="BertModel has no language-model head .* AutoModelForMaskedLM"):
        LabelWords(Scratch(model, ParameterSet(model.named_parameters())), part.tokenizer, PROMPT)
    small = T5Config(vocab_size=len(part.tokenizer), d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(small)
    with pytest.raises(TypeError, match="T5ForConditionalGeneration is an encoder-decoder"):
        LabelWords(Scratch(model, ParameterSet(model.named_parameters())), part.tokenizer, PROMPT)


@pytest.mark.parametrize(("options", "message"), [({"batch_size": 0}, "batch_size"), ({"max_length": 0}, "max_length")])
def test_sizes_must_be_positive(parts, options, message):
    with pytest.raises(ValueError, match=message):
        policy(parts("bert"), **options)


# --- real models -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif("ZORL_SHARED" not in os.environ, reason="ZORL_SHARED names no folder with models/minilm-mlm")
def test_a_real_masked_model_prefers_the_right_word_more_often_than_not():
    folder = Path(os.environ["ZORL_SHARED"])
    model = AutoModelForMaskedLM.from_pretrained(folder / "models/minilm-mlm", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "models/minilm-mlm")
    words = LabelWords(
        Scratch(model, ParameterSet(model.named_parameters())),
        tokenizer,
        Prompt("{text} . it was {mask} .", {"0": "bad", "1": "good"}),
    )
    lines = (folder / "data/sst2/dev.tsv").read_text(encoding="utf-8").splitlines()[1:101]
    rows = [dict(zip(("text", "label"), line.rsplit("\t", 1), strict=True)) for line in lines]
    margin = words.scores(rows, [CENTRE])[0].diff(dim=-1)[:, 0]
    truth = torch.tensor([row["label"] == "1" for row in rows])
    auc = (margin[truth][:, None] > margin[~truth][None]).float().mean()
    assert auc > 0.7
