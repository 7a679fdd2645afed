"""The label head as a value: what is written down is what was fitted, and it must fit the prompt and the model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zorl.label_head import LabelHead
from zorl.probe import CENTRE
from zorl.prompts import Prompt
from zorl.scoring import LabelWords
from zorl.verbalizer import Verbalizer

PROMPT = Prompt("{text} it was {mask}", {"bad": "terrible", "good": "great"})
ROWS = [{"text": "the film"}, {"text": "an odd ending"}]
finite = st.floats(-1e6, 1e6, width=32)


@given(st.lists(st.tuples(finite, st.tuples(finite, finite, finite)), min_size=1, max_size=5))
def test_a_head_of_bfloat16_weights_survives_json(rows: list[tuple[float, tuple[float, ...]]]) -> None:
    weight = torch.tensor([row for _, row in rows]).bfloat16().float().tolist()
    head = LabelHead(tuple(bias for bias, _ in rows), tuple(map(tuple, weight)))
    assert LabelHead.from_dict(json.loads(json.dumps(head.to_dict()))) == head
    biases = replace(head, weight=None)
    assert LabelHead.from_dict(json.loads(json.dumps(biases.to_dict()))) == biases


def test_a_prompt_keeps_its_head() -> None:
    prompt = replace(PROMPT, label_head=LabelHead((0.0, 1.5), ((0.25, -1.0), (0.5, 2.0))))
    assert Prompt.from_dict(json.loads(json.dumps(prompt.to_dict()))) == prompt
    assert Prompt.from_dict(PROMPT.to_dict()) == PROMPT


def test_heads_that_fit_nothing_are_refused(parts) -> None:
    with pytest.raises(ValueError, match="2 biases and 1 rows"):
        LabelHead((0.0, 1.0), ((1.0, 2.0),))
    with pytest.raises(ValueError, match="differ in width"):
        LabelHead((0.0, 1.0), ((1.0, 2.0), (1.0,)))
    with pytest.raises(ValueError, match="label_head is for 3 labels, and there are 2"):
        replace(PROMPT, label_head=LabelHead((0.0, 1.0, 2.0)))
    part = parts("gpt2")
    wide = replace(PROMPT, label_head=LabelHead((0.0, 1.0), ((1.0, 2.0), (1.0, 2.0))))
    with pytest.raises(ValueError, match="for states of width 2, and this model's have"):
        LabelWords(part.evaluator, part.tokenizer, wide)
    long = Prompt(
        "{text} it was {mask}", {"bad": "a terrible plot", "good": "a great story"}, label_head=wide.label_head
    )
    with pytest.raises(ValueError, match="have several tokens"):
        LabelWords(part.evaluator, part.tokenizer, long)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "qwen2", "bert", "roberta"])
def test_states_are_what_the_output_embedding_reads_and_the_head_is_added_to_the_words(parts, kind: str) -> None:
    part = parts(kind)
    plain = LabelWords(part.evaluator, part.tokenizer, PROMPT)
    words, states = plain.words_and_states(ROWS)
    assert states is not None
    torch.testing.assert_close(words, plain.scores(ROWS, [CENTRE])[0])
    output = part.model.get_output_embeddings()
    with torch.no_grad():
        logits = output(states)
    label_rows = Verbalizer(part.tokenizer, PROMPT, masked=plain.masked).single_tokens
    assert label_rows is not None
    torch.testing.assert_close(logits[:, label_rows].log_softmax(1), words, atol=1e-5, rtol=1e-5)

    weight = torch.randn(2, states.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16().float()
    head = LabelHead((0.5, -0.5), tuple(map(tuple, weight.tolist())))
    headed = LabelWords(part.evaluator, part.tokenizer, replace(PROMPT, label_head=head))
    expected = (words + states @ weight.T + torch.tensor([0.5, -0.5])).log_softmax(1)
    torch.testing.assert_close(headed.scores(ROWS, [CENTRE])[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(headed.words_and_states(ROWS)[0], words)  # what a head is fitted to is without the head
