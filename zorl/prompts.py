"""Templates, label words and conversations: how a row of a data set becomes a question to a language model.

A `Prompt` only knows text. Tokens are the business of `zorl.encoding`, scores of `zorl.scoring`, and generated text of
`zorl.generation`.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from zorl.label_head import LabelHead
from zorl.suggestions import did_you_mean

MASK = "mask"  # a reserved field: the place of the label word
SEPARATOR = "sep"  # the other one: the beginning of a pair's second text
# What a chat template is given anyway: the conversation, and whether a reply is to begin or to be continued.
_SET_FOR_CHATS = (
    "conversation", "conversations", "messages", "tokenize", "add_generation_prompt", "continue_final_message",
)  # fmt: skip

Message = dict[str, str]  # {"role": "user", "content": "…"}


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's answer to one row at one point.

    Attributes:
        completion: with label words, the best label's name; with options, the best one's text; otherwise the generated text or,
            if the row's prompt is a conversation, `[{"role": "assistant", "content": text}]`.
        completion_ids: its token ids, with the end-of-sequence token and without padding.
    """

    completion: str | list[Message]
    completion_ids: list[int]


class Rendered(NamedTuple):
    """One row in the template. It is hashable: equal ones are the same question.

    Attributes:
        before: the text up to the label word; the whole text if there is none.
        after: the text behind the label word.
        messages: the (role, content) pairs to put through the model's chat template; empty for plain text.
        conversational: the row's own prompt is a conversation, so its completion is one too.
        options: the row's own answers to choose from; empty if it has none.
    """

    before: str
    after: str
    messages: tuple[tuple[str, str], ...]
    conversational: bool
    options: tuple[str, ...] = ()

    @property
    def prompt(self) -> str | list[Message]:
        """The prompt as reward functions get it: text, or messages if the row holds a conversation."""
        return [{"role": r, "content": c} for r, c in self.messages] if self.conversational else self.before


@dataclass(frozen=True)
class Prompt:
    """A template over the columns of a data set, and optionally the answers to choose from: words that stand for its labels,
    or a column with the options of each row.

        Prompt("{text} It was {mask}.", {"negative": "terrible", "positive": "great"})    # classification
        Prompt("{premise} {connective} {mask}", options="choices")                         # multiple choice
        Prompt("Question: {question}\\nAnswer:")                                           # generation
        Prompt("{text}\\nPositive or negative?{mask}", {0: "negative", 1: "positive"}, chat=True)
        Prompt("{prompt}")                           # a column that holds conversations (or text)
        Prompt("{premise}{sep}{hypothesis}", classes=("yes", "maybe", "no"))               # a sequence-classification model

    `{column}` stands for the row's value in that column, `{mask}` for the label word or option; `{{` and `}}` are literal braces.
    Braces in the data are literal.

    In a chat (`chat=True`, a `system` message, or a template that is a single column holding a list of
    `{"role": …, "content": …}`) the text before `{mask}` is the user's message, and the word or option opens the reply.

    Args:
        template: the text with its fields.
        label_words: a word, or several, for each label. Names are compared as `str(label)`, so 1 and "1" are one label.
            The template decides on the space before the word, so spaces around words do not count.
        chat: apply the tokenizer's chat template to the text.
        system: a system message for the chat; implies `chat`.
        chat_template_kwargs: passed on to the chat template, such as `{"enable_thinking": False}`; not what follows from the
            conversation, such as `add_generation_prompt`.
        label_head: a fitted layer that is added to the labels' log-probabilities (see `zorl.label_head`).
        classes: the labels of a sequence-classification model, in the order of its logits, instead of label words. The text then
            needs no `{mask}`; a `{sep}` splits it into two texts, which the tokenizer encodes as a pair.
        options: the column with each row's list of answers to choose from: two or more different texts. Spaces around
            them do not count, as for label words. A causal language model is needed.

    Raises:
        ValueError: the template and the label words or options do not fit together; the message says how.
    """

    template: str
    label_words: Mapping[Any, str] | None = field(default=None, hash=False)  # kept as dict[str, str], or None
    chat: bool = False
    system: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = field(default=None, hash=False)
    label_head: LabelHead | None = None
    classes: Sequence[Any] | None = None  # kept as tuple[str, ...], or None
    options: str | None = None
    _parts: tuple[tuple[str, str | None], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.template, str):
            raise ValueError(f"the template must be a text such as '{{text}} It was {{mask}}.', got {self.template!r}")
        _check_characters("the template", self.template)
        parts = tuple(_parse(self.template))
        object.__setattr__(self, "_parts", parts)
        object.__setattr__(self, "chat", bool(self.chat or self.system is not None))
        masks = sum(name == MASK for _, name in parts)
        if not self.fields:
            raise ValueError(f"the template {self.template!r} uses no column; write one as {{column}}")
        if masks > 1:
            raise ValueError(
                f"the template {self.template!r} has {masks} {{mask}} fields; one answer goes in one place"
            )
        if self.label_head is not None and len(self.label_head.bias) != len(self.label_words or ()):
            raise ValueError(
                f"label_head is for {len(self.label_head.bias)} labels, and there are {len(self.label_words or ())}"
                " label_words"
            )
        if taken := [name for name in _SET_FOR_CHATS if name in (self.chat_template_kwargs or {})]:
            raise ValueError(
                f"chat_template_kwargs has {taken[0]!r}, which is set for each conversation from its messages: leave it out"
            )
        self._check_classes()
        if self.label_words is not None and self.options is not None:
            raise ValueError(
                f"label_words and options={self.options!r} are two sets of answers to choose from; give one of them"
            )
        given = "label_words" if self.label_words is not None else "options" if self.options is not None else None
        if given is None and masks:
            raise ValueError(
                f"the template {self.template!r} has a {{mask}}, but there are no label_words or options to put there"
            )
        if given is not None and not masks:
            raise ValueError(f"{given} are given, but the template {self.template!r} has no {{mask}} to put them in")
        if self.label_words is not None:
            object.__setattr__(self, "label_words", _normalised(self.label_words))

    def _check_classes(self) -> None:
        if sum(name == SEPARATOR for _, name in self._parts) > 1 or (self.is_pair and self.chat):
            raise ValueError(
                f"the template {self.template!r} has a {{sep}} too many: a pair has two texts, and a chat has none"
            )
        if self.is_pair and self.label_words is not None:
            raise ValueError(
                f"the template {self.template!r} has a {{sep}}, which is for sequence-classification models, and label words"
            )
        if self.classes is None:
            return
        names = tuple(map(str, self.classes))
        if self.label_words is not None or self.options is not None:
            raise ValueError(
                "a prompt has label_words or options, for a language model, or classes, for a classifier: not both"
            )
        if len(set(names)) < max(2, len(names)):
            raise ValueError(f"classes must be at least two different labels (compared as text), got {names}")
        object.__setattr__(self, "classes", names)

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns that the template uses, each once, in order."""
        return tuple(dict.fromkeys(name for _, name in self._parts if name not in (None, MASK, SEPARATOR)))

    @property
    def labels(self) -> tuple[str, ...]:
        """The label names in the order of `label_words` or `classes`; empty for a prompt that has neither."""
        return tuple(self.label_words or self.classes or ())

    @property
    def is_pair(self) -> bool:
        """Whether the template has a `{sep}`."""
        return any(name == SEPARATOR for _, name in self._parts)

    @property
    def chooses(self) -> bool:
        """Whether the answer is chosen from given ones: label words, classes or options. Otherwise it is generated."""
        return bool(self.labels) or self.options is not None

    @property
    def literal_before_mask(self) -> str:
        """The template's own text right before `{mask}`, back to the column before it. Empty without `{mask}`."""
        return next((literal for literal, name in self._parts if name == MASK), "")

    @property
    def opens_with_mask(self) -> bool:
        """Whether no column comes before `{mask}`."""
        return self._parts[0][1] == MASK

    @property
    def literal_after_mask(self) -> str:
        """The template's own text behind `{mask}`, without the columns there."""
        names = [name for _, name in self._parts]
        return "".join(literal for literal, _ in self._parts[names.index(MASK) + 1 :]) if MASK in names else ""

    @property
    def fields_after_mask(self) -> tuple[str, ...]:
        """The columns used behind `{mask}`."""
        names = [name for _, name in self._parts]
        return tuple(n for n in names[names.index(MASK) + 1 :] if n is not None) if MASK in names else ()

    def with_head_of(self, other: Prompt) -> Prompt:
        """This prompt with the other's label head, if it asks the same: at most the names of columns differ.

        A head means nothing for another prompt, so otherwise this one is returned as it is.
        """
        same = self._shape == other._shape and all(
            getattr(self, name) == getattr(other, name)
            for name in ("label_words", "chat", "system", "chat_template_kwargs")
        )
        return replace(self, label_head=other.label_head) if same and self.label_head is None else self

    @property
    def _shape(self) -> list[tuple[str, Any]]:
        """The template with numbers for the names of its columns."""
        return [(literal, self.fields.index(name) if name in self.fields else name) for literal, name in self._parts]

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raises:
        ValueError: the template uses a column that is not among `columns`, or the options are in none of them.
        """
        available = list(columns)
        users = [(f"the template {self.template!r} uses", name) for name in self.fields]
        users += [] if self.options is None else [("options names", self.options)]
        for user, name in users:
            if name not in available:
                hint = did_you_mean(name, available)
                listed = ", ".join(repr(column) for column in available)
                raise ValueError(f"{user} the column {name!r}, which the data does not have{hint} (columns: {listed})")

    def options_of(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The row's own answers to choose from, as they are in the data; empty for a prompt without `options`.

        Raises:
            ValueError: the column is missing, or does not hold two or more different texts.
        """
        if self.options is None:
            return ()
        if self.options not in row:
            self.check_columns(row)
        value = row[self.options]
        if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(o, str) for o in value):
            raise ValueError(
                f"the column {self.options!r} must hold a list of texts to choose from in each row, found {value!r} in the row"
                f" {_shortened(row)}"
            )
        texts = [option.strip() for option in value]
        _check_characters(f"the column {self.options!r}", "".join(texts))
        if len(texts) < 2 or len(set(texts)) < len(texts) or not all(texts):
            raise ValueError(
                f"the column {self.options!r} must hold at least two texts to choose from, all different and none empty, found"
                f" {list(value)!r} in the row {_shortened(row)}"
            )
        return tuple(value)

    def check_labels(self, labels: Iterable[Any], column: str = "label") -> None:
        """Checks that every label of the data has a label word. A prompt without label words has nothing to check.

        Raises:
            ValueError: some have none; the message names these labels and how many rows have them.
        """
        if not self.labels:
            return
        missing = Counter(name for name in map(str, labels) if name not in self.labels)
        if missing:
            found = ", ".join(f"{name!r} ({n} row{'s' if n > 1 else ''})" for name, n in missing.most_common(5))
            known = ", ".join(map(repr, self.labels))
            if self.classes is not None:
                raise ValueError(f"the column {column!r} holds {found}, and the model's classes are {known}")
            raise ValueError(f"the column {column!r} holds {found} without a label word; label_words has {known}")

    def render(
        self, row: Mapping[str, Any], *, limit: int | None = None, keep: Literal["start", "end"] = "start"
    ) -> Rendered:
        """The template with a row's values in it.

        Args:
            limit: cut each value (in a conversation each message but the system's) to this many characters …
            keep: … and keep its start or its end.

        Raises:
            ValueError: a column is missing or empty, or a conversation is malformed or mixed into other text.
        """
        texts: tuple[list[str], list[str]] = ([], [])
        side = 0
        for literal, name in self._parts:
            texts[side].append(literal)
            if name in (MASK, SEPARATOR):
                side = 1
            elif name is not None:
                if name not in row:
                    self.check_columns(row)
                value = row[name]
                if isinstance(value, str):
                    _check_characters(f"the column {name!r}", value)
                    texts[side].append(_cut(value, limit, keep))
                elif _is_conversation(value):
                    rendered = self._render_conversation(name, value, limit, keep)
                    return rendered._replace(options=self._stripped_options(row))
                elif isinstance(value, Mapping):
                    raise ValueError(
                        f"the column {name!r} holds an object with the fields {', '.join(map(repr, value))}, and a "
                        "template takes texts and numbers: make columns of its fields"
                    )
                elif value is None or value != value:  # NaN stands for a missing value in tables
                    raise ValueError(f"the column {name!r} is empty ({value}) in the row {_shortened(row)}")
                else:
                    texts[side].append(_cut(str(value), limit, keep))
        before, after = "".join(texts[0]), "".join(texts[1])
        messages = (*self._system_message(), ("user", before.strip())) if self.chat else ()
        return Rendered(before, after, messages, False, self._stripped_options(row))

    def _render_conversation(
        self, name: str, value: Sequence[Any], limit: int | None, keep: Literal["start", "end"]
    ) -> Rendered:
        literals = "".join(literal for literal, _ in self._parts)
        if literals.strip() or self.fields != (name,) or self.fields_after_mask:
            alone = f"{{{name}}}{{mask}}" if self.chooses and self.classes is None else f"{{{name}}}"
            raise ValueError(
                f"the column {name!r} holds conversations, so the template must be {alone!r}, not {self.template!r}"
            )
        pairs = [_pair(name, message) for message in value]
        system = () if pairs[0][0] == "system" else self._system_message()
        cut = ((role, text if role == "system" else _cut(text, limit, keep)) for role, text in pairs)
        return Rendered("", "", (*system, *cut), True)

    def _stripped_options(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(option.strip() for option in self.options_of(row))

    def _system_message(self) -> tuple[tuple[str, str], ...]:
        return () if self.system is None else (("system", self.system),)

    def to_dict(self) -> dict[str, Any]:
        """The prompt as plain JSON values, for the folder of a saved model. `from_dict` reads it back."""
        words = None if self.label_words is None else dict(self.label_words)
        chat_options = None if self.chat_template_kwargs is None else dict(self.chat_template_kwargs)
        return {
            "template": self.template,
            "label_words": words,
            "chat": self.chat,
            "system": self.system,
            "chat_template_kwargs": chat_options,
            "label_head": None if self.label_head is None else self.label_head.to_dict(),
            "classes": None if self.classes is None else list(self.classes),
            "options": self.options,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Prompt:
        """Raises:
        ValueError: a key is unknown, or there is no template.
        """
        known = (
            "template", "label_words", "chat", "system", "chat_template_kwargs", "label_head", "classes", "options",
        )  # fmt: skip
        unknown = [key for key in values if key not in known]
        if unknown or "template" not in values:
            problem = f"does not know {unknown[0]!r}" if unknown else "needs 'template'"
            raise ValueError(f"a prompt {problem}; its keys are {', '.join(known)}")
        head = values.get("label_head")
        return cls(**{**values, "label_head": None if head is None else LabelHead.from_dict(head)})


def _parse(template: str) -> Iterable[tuple[str, str | None]]:
    """(literal, field or None) pairs in order."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"the template {template!r} has an unpaired brace ({error}); a literal brace is written {{{{ or }}}}"
        ) from None
    for literal, name, spec, conversion in parsed:
        if name == "" or spec or conversion:
            raise ValueError(f"a field of the template {template!r} is not a plain column name such as {{text}}")
        yield literal, name


def _normalised(label_words: Mapping[Any, str]) -> dict[str, str]:
    words: dict[str, str] = {}
    if not isinstance(label_words, Mapping):
        raise ValueError(
            f"label_words must be a word for each label, such as {{'bad': 'terrible'}}, got {label_words!r}"
        )
    for label, word in label_words.items():
        name = str(label)
        if name in words:
            raise ValueError(f"label_words has the label {name!r} twice (labels are compared as text)")
        if not isinstance(word, str) or not word.strip():
            raise ValueError(
                f"the label word of {name!r} must be a word, not {word!r}"
                + ("" if isinstance(word, str) else f" ({type(word).__name__}; quote it in YAML)")
            )
        _check_characters(f"the label word of {name!r}", word)
        twin = next((other for other, used in words.items() if used == word.strip()), None)
        if twin is not None:
            raise ValueError(f"the labels {twin!r} and {name!r} have the same label word {word.strip()!r}")
        words[name] = word.strip()
    if len(words) < 2:
        raise ValueError(f"label_words needs at least two labels, found {len(words)}")
    return words


def _is_conversation(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) > 0 and all(isinstance(m, Mapping) and "role" in m for m in value)


def _pair(column: str, message: Mapping[str, Any]) -> tuple[str, str]:
    extra = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
    if extra or not isinstance(message.get("content"), str):
        problem = f"has {extra[0]!r}" if extra else f"has the content {message.get('content')!r}"
        raise ValueError(
            f"a message in the column {column!r} {problem}; zorl reads text messages that have only 'role' and 'content'"
        )
    _check_characters(f"a message in the column {column!r}", message["content"])
    return str(message["role"]), message["content"]


def _check_characters(where: str, text: str) -> None:
    """Raises ValueError for a text that is not valid Unicode, which tokenizers refuse without saying why."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):x}"
        around = ascii(text[max(0, error.start - 20) : error.start + 20])
        raise ValueError(
            f"{where} holds {half}, half a character (a surrogate without its pair), in {around}: take it out"
        ) from None


def _cut(text: str, limit: int | None, keep: Literal["start", "end"]) -> str:
    if limit is None or len(text) <= limit:
        return text
    return text[:limit] if keep == "start" else text[len(text) - limit :]


def _shortened(row: Mapping[str, Any]) -> str:
    text = repr(dict(row))
    return text if len(text) <= 200 else text[:199] + "…"
