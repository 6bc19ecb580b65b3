"""Conversations to token ids and marks: rows in the common layouts, rendered with the tokenizer's own chat
template.

One layout of rows is a function and a line in LAYOUTS. The template is rendered in the environment of
transformers, so that training sees the text that a server and ``apply_chat_template`` make.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from rdlm.data.token_shards import COUNTS, STARTS
from rdlm.data.tokenizer import HALF_PAIR, Tokenizer, is_unicode
from rdlm.errors import UserError, reason
from train.data.writer import Encoded

LossOn = Literal["answers", "last_answer", "all"]
Message = dict[str, Any]
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
"""Names of ShareGPT's roles, and those of the templates; others stay as they are."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class BadRow(ValueError):
    """What is wrong with a row, and in which field."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field {field!r} {problem}")


@dataclass(frozen=True)
class Conversation:
    """Turns of a conversation. place: file and line. tools: JSON schemas, for templates that list them."""

    place: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def _messages(row: Mapping[str, Any]) -> list[Message]:
    """``messages``: a list of {role, content}; ShareGPT's ``conversations``: {from, value}."""
    name = "messages" if "messages" in row else "conversations"
    turns = row[name]
    if not isinstance(turns, list | tuple) or not turns:
        raise BadRow(name, "is not a list of messages")
    return [_message(turn, f"{name}[{i}]") for i, turn in enumerate(turns)]


def _message(turn: Any, place: str) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRow(place, "is not an object with role and content")
    role, content = ("role", "content") if "role" in turn else ("from", "value")
    if not isinstance(turn.get(role), str):
        raise BadRow(f"{place}.role", "is not text")
    rest = {key: value for key, value in turn.items() if key not in (role, content) and value is not None}
    if turn.get(content) is None and "tool_calls" in rest:
        return {"role": ROLES.get(turn[role], turn[role]), **rest}
    text = _text(turn.get(content), f"{place}.{content}")
    return {"role": ROLES.get(turn[role], turn[role]), "content": text, **rest}


def _text(value: Any, place: str) -> str:
    """A text, or a list of parts of text."""
    if isinstance(value, list | tuple):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in value]
        if all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
    if not isinstance(value, str):
        raise BadRow(place, "is not text")
    return value


def _optional(row: Mapping[str, Any], name: str) -> str:
    """A text that may be null or left out."""
    return "" if row.get(name) is None else _text(row[name], name)


def _pair(question: str, answer: str) -> Callable[[Mapping[str, Any]], list[Message]]:
    """Two fields: texts, or (as in TRL) lists of messages."""

    def read(row: Mapping[str, Any]) -> list[Message]:
        found: list[Message] = []
        for name, role in ((question, "user"), (answer, "assistant")):
            if isinstance(row[name], list | tuple):
                found += [_message(turn, f"{name}[{i}]") for i, turn in enumerate(row[name])]
            else:
                found.append({"role": role, "content": _text(row[name], name)})
        return found

    return read


def _instruction(row: Mapping[str, Any]) -> list[Message]:
    """Alpaca: the input, where there is one, follows the instruction after a blank line."""
    asked, given = _text(row["instruction"], "instruction"), _optional(row, "input")
    question = f"{asked}\n\n{given}" if given else asked
    answer = {"role": "assistant", "content": _text(row["output"], "output")}
    return [{"role": "user", "content": question}, answer]


LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], list[Message]]], ...] = (
    (("messages",), _messages),
    (("conversations",), _messages),
    (("prompt", "response"), _pair("prompt", "response")),
    (("prompt", "completion"), _pair("prompt", "completion")),
    (("instruction", "output"), _instruction),
    (("question", "answer"), _pair("question", "answer")),
)
"""Fields that a row must have -> what reads it; the first that fits."""


def conversation(place: str, row: Mapping[str, Any], option: str) -> Conversation:
    """A row of any of LAYOUTS; a field ``system`` becomes the first turn. UserError names place and field."""
    read = next((read for fields, read in LAYOUTS if all(row.get(name) is not None for name in fields)), None)
    if read is None:
        known = "; ".join(", ".join(fields) for fields, _ in LAYOUTS)
        problem = f"holds no conversation: its fields are {', '.join(map(repr, row)) or '(none)'}"
        raise UserError(option, place, problem, f"give rows with {known}")
    try:
        messages, tools = read(row), row.get("tools")
        if system := _optional(row, "system"):
            messages = [{"role": "system", "content": system}, *messages]
        if tools is not None and not (isinstance(tools, list) and all(isinstance(t, Mapping) for t in tools)):
            raise BadRow("tools", "is not a list of JSON schemas")
        if not any(message["role"] == "assistant" for message in messages):
            raise BadRow(
                next(iter(row)) if "messages" not in row else "messages", "has no turn of an assistant"
            )
    except BadRow as error:
        raise UserError(option, place, str(error), "correct the row, or leave it out") from None
    return Conversation(place, messages, tools)


class ChatEncoder:
    """A tokenizer's template, and which of the tokens it makes are targets.

    Where the template has ``{% generation %}`` (transformers' ``return_assistant_tokens_mask``), those are
    the answers. Without it an answer is what its turn adds to the prompt that asks for it, up to and with its
    end-of-text token.
    """

    def __init__(self, tokenizer: Tokenizer, loss_on: LossOn, given: str) -> None:
        """given: the tokenizer as the user named it. UserError where it has no template, or one that is none."""
        from transformers.utils.chat_template_utils import _compile_jinja_template

        if tokenizer.chat_template is None:
            remedy = (
                "give a checkpoint with a chat template, or add chat_template to its tokenizer_config.json"
            )
            raise UserError("--tokenizer", given, "this tokenizer has no chat template", remedy)
        self._tokenizer, self._template, self._loss_on = tokenizer, tokenizer.chat_template, loss_on
        names = {i: text for text, i in tokenizer.special_tokens.items()}
        ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._special = {key: "" if i is None else names.get(i, "") for key, i in ends.items()}
        self._end = self._special["eos_token"]
        self._says_answers = _GENERATION.search(self._template) is not None
        try:
            _compile_jinja_template(self._template)
        except TemplateError as error:
            problem = f"its chat template is not a Jinja template ({reason(error)})"
            raise UserError("--tokenizer", given, problem, "correct it") from None

    def encode(self, chat: Conversation, option: str) -> Encoded:
        """UserError names the place of a conversation that the template refuses."""
        try:
            text, answers = self._rendered(chat)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            remedy = "correct the row, or leave it out"
            raise UserError(
                option, chat.place, f"the chat template refuses it: {reason(error)}", remedy
            ) from None
        if not is_unicode(text):
            raise UserError(option, chat.place, HALF_PAIR, "remove or replace it")
        ids, spans = self._tokenizer.encode_spans(text)
        marks = bytearray(len(ids))
        for first, last in [(0, len(text))] if self._loss_on == "all" else answers:
            inside = [i for i, (start, end) in enumerate(spans) if start < last and end > first]
            if inside:  # as transformers: from the token of the first character to that of the last
                marks[inside[0] : inside[-1] + 1] = bytes([COUNTS]) * (inside[-1] + 1 - inside[0])
        if ids:
            marks[0] |= STARTS
        return Encoded(text, ids, len(text.encode()), marks)

    def _rendered(self, chat: Conversation) -> tuple[str, Sequence[tuple[int, int]]]:
        """The text of the conversation, and the characters [first, last + 1) of each answer in it."""
        if self._says_answers:
            text, spans = self._render(chat, chat.messages, return_assistant_tokens_mask=True)
            found = [(int(first), int(last)) for first, last in spans]
            return text, found[-1:] if self._loss_on == "last_answer" else found
        text = self._text(chat, len(chat.messages), asks=False)
        if self._loss_on == "all":
            return text, []
        turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        return text, [
            self._answer(chat, i, text) for i in turns[-1 if self._loss_on == "last_answer" else 0 :]
        ]

    def _answer(self, chat: Conversation, turn: int, text: str) -> tuple[int, int]:
        prompt, upto = self._text(chat, turn, asks=True), self._text(chat, turn + 1, asks=False)
        if not upto.startswith(prompt) or not text.startswith(upto):
            problem = (
                f"it writes turn {turn} in another way once later turns follow, so that answers have no place"
            )
            raise ValueError(
                f"{problem}; mark them with generation in the template, or use --loss-on last_answer"
            )
        answer = upto[len(prompt) :]
        end = answer.rfind(self._end) if self._end else -1
        kept = len(answer.rstrip()) if end < 0 else end + len(self._end)
        return len(prompt), len(prompt) + kept

    def _text(self, chat: Conversation, count: int, asks: bool) -> str:
        """The first ``count`` turns, and where ``asks`` the head of the next answer."""
        return self._render(chat, chat.messages[:count], add_generation_prompt=asks)[0]

    def _render(self, chat: Conversation, messages: list[Message], **how: bool) -> tuple[str, Any]:
        """Text, and the answers' places where ``how`` asks for them."""
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template
        texts, places = render(
            [messages], tools=chat.tools, chat_template=self._template, **how, **self._special
        )
        return texts[0], places[0] if places else ()


def conversations(rows: Iterator[tuple[str, Mapping[str, Any]]], option: str) -> Iterator[Conversation]:
    """Each row as a conversation."""
    return (conversation(place, row, option) for place, row in rows)
