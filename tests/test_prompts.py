"""Templates, label words and conversations."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zorl.prompts import Prompt, Rendered

SENTIMENT = Prompt("{text} It was {mask}.", {"negative": "terrible", "positive": "great"})
CONVERSATION = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Go"},
]


def test_a_row_is_rendered_around_the_mask():
    rendered = SENTIMENT.render({"text": "Dull.", "label": "negative"})
    assert rendered == Rendered(before="Dull. It was ", after=".", messages=(), conversational=False)
    assert rendered.prompt == "Dull. It was "


def test_a_template_without_label_words_is_the_prompt_itself():
    prompt = Prompt("Question: {question}\nAnswer:")
    assert prompt.render({"question": "Who?"}).prompt == "Question: Who?\nAnswer:"
    assert prompt.labels == ()


def test_fields_are_the_columns_in_order_without_the_mask():
    prompt = Prompt("{a b} {c}? {mask}, {d} {c}", {0: "yes", 1: "no"})
    assert prompt.fields == ("a b", "c", "d")
    assert prompt.fields_after_mask == ("d", "c")
    assert prompt.render({"a b": "1", "c": "2", "d": "3"})[:2] == ("1 2? ", ", 3 2")


@given(st.text())
def test_data_is_never_interpreted(text):
    assert Prompt("{{{text}}} {mask}", {0: "a", 1: "b"}).render({"text": text}).before == "{" + text + "} "


def test_values_other_than_text_are_rendered_as_python_prints_them():
    assert Prompt("{a} {b} {c}").render({"a": 3, "b": True, "c": 0.5}).before == "3 True 0.5"


@pytest.mark.parametrize(("keep", "expected"), [("start", "abc|x"), ("end", "cde|x")])
def test_a_limit_cuts_values_and_not_the_template(keep, expected):
    assert Prompt("{a}|{b}").render({"a": "abcde", "b": "x"}, limit=3, keep=keep).before == expected


def test_labels_are_text_in_the_order_given():
    assert Prompt("{t}{mask}", {1: "yes", False: "no", "x": " maybe "}).label_words == {
        "1": "yes",
        "False": "no",
        "x": "maybe",
    }
    assert SENTIMENT.labels == ("negative", "positive")


@pytest.mark.parametrize(
    ("template", "words", "message"),
    [
        ("{text} It was.", {0: "bad", 1: "good"}, r"has no \{mask\} to put them in"),
        ("{text} {mask}", None, r"has a \{mask\}, but there are no label_words"),
        ("{text} {mask} {mask}", {0: "bad", 1: "good"}, r"has 2 \{mask\} fields"),
        ("It was {mask}.", {0: "bad", 1: "good"}, "uses no column"),
        ("", None, "uses no column"),
        ("{} {mask}", {0: "bad", 1: "good"}, "not a plain column name"),
        ("{text!r}", None, "not a plain column name"),
        ("{text:>10}", None, "not a plain column name"),
        ("{text", None, r"unpaired brace .* a literal brace is written \{\{ or \}\}"),
        ("text}", None, "unpaired brace"),
        ("{t}{mask}", {0: "bad", "0": "good"}, "has the label '0' twice"),
        ("{t}{mask}", {0: "bad", 1: " bad"}, "the labels '0' and '1' have the same label word 'bad'"),
        ("{t}{mask}", {0: "bad", 1: ""}, "the label word of '1' must be a word, not ''"),
        (
            "{t}{mask}",
            {0: "bad", 1: True},
            r"the label word of '1' must be a word, not True \(bool; quote it in YAML\)",
        ),
        ("{t}{mask}", {0: "bad"}, "needs at least two labels, found 1"),
        ("{t}{mask}", {}, "needs at least two labels, found 0"),
    ],
)
def test_a_template_that_does_not_fit_its_label_words_says_why(template, words, message):
    with pytest.raises(ValueError, match=message):
        Prompt(template, words)


@pytest.mark.parametrize("name", ["messages", "tokenize", "add_generation_prompt", "continue_final_message"])
def test_what_follows_from_the_conversation_is_no_option_of_its_chat_template(name):
    with pytest.raises(ValueError, match=f"chat_template_kwargs has '{name}', which is set for each conversation"):
        Prompt("{t}", chat=True, chat_template_kwargs={"enable_thinking": False, name: False})


CHOICE = Prompt("{premise} {mask}", options="choices")


def test_a_rows_own_options_belong_to_its_question():
    row = {"premise": "He fell", "choices": ["down", " up "]}
    assert CHOICE.options_of(row) == ("down", " up "), "as they are in the data"
    assert CHOICE.render(row) == Rendered("He fell ", "", (), False, ("down", "up"))
    assert CHOICE.render(row) != CHOICE.render({**row, "choices": ["down", "over"]})
    assert Prompt("{premise} {mask}", options="answers") != CHOICE
    assert (CHOICE.chooses, SENTIMENT.chooses, Prompt("{t}").chooses) == (True, True, False)
    assert (CHOICE.labels, SENTIMENT.options_of(row)) == ((), ())


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ("down", r"must hold a list of texts to choose from in each row, found 'down' in the row \{'premise'"),
        (None, "found None in the row"),
        (["down", 3], r"found \['down', 3\]"),
        (["down"], "at least two texts to choose from, all different and none empty"),
        (["down", "down "], "all different"),
        (["down", ""], "none empty"),
    ],
)
def test_options_that_leave_no_choice_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        CHOICE.render({"premise": "He fell", "choices": choices})


def test_options_need_a_place_and_exclude_label_words():
    with pytest.raises(ValueError, match=r"options are given, but the template '\{t\}' has no \{mask\}"):
        Prompt("{t}", options="choices")
    with pytest.raises(ValueError, match="label_words and options='choices' are two sets of answers"):
        Prompt("{t}{mask}", {0: "a", 1: "b"}, options="choices")
    with pytest.raises(ValueError, match=r"options names the column 'choices', .* did you mean 'choice'\?"):
        CHOICE.check_columns(["premise", "choice"])
    told = {"p": [{"role": "user", "content": "Hi"}], "choices": ["a", "b"]}
    with pytest.raises(ValueError, match=r"the template must be '\{p\}\{mask\}'"):
        Prompt("{p} so {mask}", options="choices").render(told)


def test_a_misspelt_column_is_named_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"uses the column 'txt', which the data does not have; did you mean 'text'\?"):
        Prompt("{txt}").check_columns(["text", "label"])
    with pytest.raises(ValueError, match=r"the column 'premise', .* does not have \(columns: 'text', 'label'\)"):
        Prompt("{premise}").check_columns(["text", "label"])
    with pytest.raises(ValueError, match="did you mean 'text'"):
        Prompt("{txt}").render({"text": "x"})
    SENTIMENT.check_columns(iter(["label", "text"]))


@pytest.mark.parametrize("hole", [None, float("nan")])
def test_an_empty_cell_is_named(hole):
    with pytest.raises(
        ValueError, match=r"the column 'text' is empty \((None|nan)\) in the row \{'text': .*'label': 1\}"
    ):
        SENTIMENT.render({"text": hole, "label": 1})


def test_an_object_in_a_cell_is_no_text():
    with pytest.raises(
        ValueError, match="the column 'data' holds an object with the fields 'text', 'id', and a template takes"
    ):
        Prompt("{data} it was").render({"data": {"text": "a film", "id": 3}})


def test_a_label_without_a_word_is_named_and_counted():
    SENTIMENT.check_labels(["negative", "positive"])
    with pytest.raises(
        ValueError,
        match=r"the column 'y' holds 'neutral' \(2 rows\), 'Positive' \(1 row\) without a label word;"
        r" label_words has 'negative', 'positive'",
    ):
        SENTIMENT.check_labels(["neutral", "negative", "Positive", "neutral"], column="y")
    Prompt("{t}{mask}", {0: "bad", 1: "good"}).check_labels([0, "1", 1])
    Prompt("{t}").check_labels(["anything"])


def test_a_chat_makes_the_text_before_the_mask_the_users_message():
    prompt = Prompt("{text}\nGood or bad?\n{mask}", {0: "bad", 1: "good"}, system="Be brief.")
    rendered = prompt.render({"text": "Fine."})
    assert prompt.chat
    assert rendered.messages == (("system", "Be brief."), ("user", "Fine.\nGood or bad?"))
    assert not rendered.conversational
    assert rendered.prompt == "Fine.\nGood or bad?\n"


def test_a_column_of_conversations_is_the_prompt():
    rendered = Prompt("{prompt}").render({"prompt": CONVERSATION})
    assert rendered.messages == (("user", "Hi"), ("assistant", "Yes?"), ("user", "Go"))
    assert rendered.conversational
    assert rendered.prompt == CONVERSATION


def test_a_system_message_is_put_before_a_conversation_that_has_none():
    prompt = Prompt("{prompt}", system="Be brief.")
    assert prompt.render({"prompt": CONVERSATION}).messages[0] == ("system", "Be brief.")
    own = [{"role": "system", "content": "Be long."}, *CONVERSATION]
    assert [role for role, _ in prompt.render({"prompt": own}).messages] == ["system", "user", "assistant", "user"]


def test_a_limit_spares_the_system_message():
    prompt = Prompt("{prompt}", system="Be brief.")
    assert prompt.render({"prompt": [{"role": "user", "content": "abc"}]}, limit=1).messages[1:] == (("user", "a"),)
    assert prompt.render({"prompt": CONVERSATION}, limit=0).messages[0] == ("system", "Be brief.")


def test_a_conversation_inside_other_text_is_refused():
    with pytest.raises(
        ValueError, match=r"the column 'prompt' holds conversations, so the template must be '\{prompt\}',"
    ):
        Prompt("Say: {prompt}").render({"prompt": CONVERSATION})
    with pytest.raises(ValueError, match=r"the template must be '\{prompt\}\{mask\}'"):
        Prompt("{prompt} {mask} {x}", {0: "a", 1: "b"}).render({"prompt": CONVERSATION, "x": "y"})


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "user", "content": [{"type": "image"}]}, r"has the content \[\{'type': 'image'\}\]"),
        ({"role": "user"}, "has the content None"),
        ({"role": "user", "content": "x", "tool_calls": []}, "has 'tool_calls'"),
    ],
)
def test_messages_that_are_not_text_are_refused(message, expected):
    with pytest.raises(ValueError, match=r"a message in the column 'prompt' " + expected):
        Prompt("{prompt}").render({"prompt": [message]})


def test_unused_keys_of_a_message_may_be_none():
    assert Prompt("{p}").render({"p": [{"role": "user", "content": "x", "name": None}]}).messages == (("user", "x"),)


@pytest.mark.parametrize(
    "prompt",
    [
        SENTIMENT,
        Prompt("{q}"),
        Prompt("{t}{mask}", {1: "Ja", 0: "Nein ☃"}, system="{x}", chat_template_kwargs={"enable_thinking": False}),
        Prompt("{t}{mask}", options="choices"),
    ],
)
def test_a_prompt_survives_json(prompt):
    again = Prompt.from_dict(json.loads(json.dumps(prompt.to_dict())))
    assert again == prompt
    assert again.labels == prompt.labels  # equal dictionaries may differ in order, and the order breaks ties
    assert hash(again) == hash(prompt)


def test_a_dictionary_that_is_no_prompt_is_refused():
    with pytest.raises(ValueError, match="a prompt does not know 'words'; its keys are template, label_words"):
        Prompt.from_dict({"template": "{t}", "words": {}})
    with pytest.raises(ValueError, match="a prompt needs 'template'"):
        Prompt.from_dict({})
