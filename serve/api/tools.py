"""Tool calls: how a chat template writes them, the grammar of answers that may contain them, and reading them.

The form is told from the template itself. While tools are offered the answer is constrained (serve/engine/grammar.py):
what begins as a call becomes one, of a function that was offered and with arguments that fit its schema, so reading
needs no guesses.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from serve.engine.grammar import json_rule, special_rule


@dataclass(frozen=True)
class Tool:
    """A function that a model may call."""

    name: str
    parameters: Mapping[str, Any]
    """JSON schema of its arguments, an object."""
    given: Mapping[str, Any]
    """As the client sent it, in the form of chat: what the template sees."""
    field: str
    """Where the client sent the parameters."""


@dataclass(frozen=True)
class ToolChoice:
    mode: Literal["none", "auto", "required"]
    names: frozenset[str] | None = None
    """Functions that may be called; None: all."""


@dataclass(frozen=True)
class ToolFormat:
    """How an answer spells its calls: ``open``, then the calls joined by ``between``, then ``close``. A call is its
    name and its arguments, a JSON object, with ``call`` before, between and behind them."""

    open: str
    call: tuple[str, str, str]
    between: str | None
    """None: one call at most."""
    close: str
    short_ids: bool = False
    """Whether the template takes ids of nine letters and digits only."""

    @property
    def mark(self) -> str:
        """What tells a call from text; "" where a call is a text that begins with a brace."""
        return self.open.split("\n")[0].split(" ")[0].removesuffix("[") if self.open else ""

    def new_id(self) -> str:
        letters = string.ascii_letters + string.digits
        if self.short_ids:
            return "".join(secrets.choice(letters) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"

    def spelt(self, special: Mapping[str, int]) -> frozenset[int]:
        """Special tokens that calls consist of."""
        return frozenset(
            i
            for name, i in special.items()
            if name and name in "\0".join((self.open, *self.call, self.close))
        )


def in_json(arguments: str) -> tuple[str, str, str]:
    """``call`` of a JSON object with the fields name and ``arguments``."""
    return '{"name": "', f'", "{arguments}": ', "}"


def tool_format(template: str) -> ToolFormat | None:
    """How the template's model calls tools; None where it is none of the forms that are known here."""
    if "[TOOL_CALLS]" in template and "[ARGS]" not in template:  # Mistral
        space = " " if "[TOOL_CALLS] [" in template else ""
        return ToolFormat(f"[TOOL_CALLS]{space}[", in_json("arguments"), ", ", "]", short_ids=True)
    if "[TOOL_CALLS]" in template and "[CALL_ID]" not in template:  # Mistral since 2025
        return ToolFormat("[TOOL_CALLS]", ("", "[ARGS]", ""), "[TOOL_CALLS]", "", short_ids=True)
    if (
        "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template
    ):  # Hermes, Qwen
        return ToolFormat(
            "<tool_call>\n", in_json("arguments"), "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"
        )
    if re.search(r"""\\?"parameters\\?": """, template) and re.search(
        r"""\\?"name\\?": """, template
    ):  # Llama 3
        return ToolFormat("", in_json("parameters"), None, "")
    return None


def tool_grammar(
    form: ToolFormat,
    tools: Sequence[Tool],
    choice: ToolChoice,
    is_parallel: bool,
    special: Mapping[str, int],
    content: str | None = None,
) -> tuple[str, dict[int, int]]:
    """Lark of an answer with calls, and which line of it has the schema of which of ``tools``.

    content: what an answer without a call must be, as a part of a rule; None is any text.
    """
    offered = [i for i, tool in enumerate(tools) if choice.names is None or tool.name in choice.names]
    several = form.between is not None and is_parallel
    more = f"({special_rule(form.between or '', special)} call)*" if several else ""
    calls = " ".join(part for part in ("call", more, special_rule(form.close, special)) if part)
    opened = special_rule(form.open, special)
    lines = ["%llguidance {}", f"calls: {calls}"]  # the start follows, on line 3
    if choice.mode == "required":
        lines.append(f"start: {opened} calls")
    elif content is not None:
        lines.append(f"start: {content} | {opened} calls")
    elif not form.open:
        lines += ["start: TEXT | calls", r"TEXT: /([^{](.|\n)*)?/"]
    elif form.mark in special:
        lines += [f"start: TEXT | TEXT {opened} calls"]
        lines += [f"TEXT: /(?s:.*)/ & ~/(?s:.*){re.escape(form.mark)}(?s:.*)/"]  # spelt out it is no mark
    else:  # shortest match: the first mark begins the calls
        lines += [f"start: TEXT | marked {special_rule(form.open.removeprefix(form.mark), special)} calls"]
        lines += [rf"marked[lazy]: /(.|\n)*{re.escape(form.mark)}/", r"TEXT: /(.|\n)*/"]
    lines.append("call: " + " | ".join(f"call{i}" for i in offered))
    where = {}
    for i in offered:
        before, between, behind = form.call
        head = special_rule(f"{before}{tools[i].name}{between}", special)
        lines.append(f"call{i}: {head} {json_rule(tools[i].parameters)} {special_rule(behind, special)}")
        where[len(lines)] = i
    return "\n".join(lines) + "\n", where


@dataclass(frozen=True)
class Delta:
    """A part of an answer: of its text, or of call number ``call``."""

    text: str = ""
    call: int | None = None
    id: str | None = None
    """With the first part of a call, like ``name``."""
    name: str | None = None


class CallReader:
    """Splits a constrained answer into text and calls, as it arrives."""

    def __init__(self, form: ToolFormat, only_first: bool = False) -> None:
        """only_first: a mark begins calls only where the answer begins with it: the text may contain it."""
        self._form, self._only_first = form, only_first or not form.open
        self._is_decided = False
        """Whether the rest is text, come what may."""
        self._state: Literal["text", "head", "arguments"] = "text"
        self._buffer = ""
        self._scan = JsonEnd()
        self.calls = 0
        """Calls that have begun."""

    @property
    def is_whole(self) -> bool:
        """Whether there are calls, and the last one is complete."""
        return self.calls > 0 and self._state == "head"

    def feed(self, text: str) -> list[Delta]:
        """What has become certain with ``text``."""
        self._buffer += text
        found: list[Delta] = []
        while (delta := self._next()) is not None:
            found.append(delta)
        return [delta for delta in found if delta.text or delta.id]

    def finish(self) -> list[Delta]:
        """What was held back, at the end of an answer: text that only began like a call."""
        text, self._buffer = self._buffer if self._state == "text" else "", ""
        return [Delta(text)] if text else []

    def _next(self) -> Delta | None:
        """One more part, None where more text is needed."""
        if not self._buffer:
            return None
        if self._state == "text":
            return self._text()
        if self._state == "head":
            before, between, _ = self._form.call
            head = re.search(re.escape(before) + r'([^"\[\]]*)' + re.escape(between), self._buffer)
            if head is None:
                return None
            self._buffer, self._state, self._scan = self._buffer[head.end() :], "arguments", JsonEnd()
            self.calls += 1
            return Delta(call=self.calls - 1, id=self._form.new_id(), name=head[1])
        end = self._scan.feed(self._buffer)
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        if self._scan.is_closed:
            self._state = "head"
        return Delta(text, call=self.calls - 1)

    def _text(self) -> Delta | None:
        mark = self._form.mark or "{"
        if self._is_decided:
            text, self._buffer = self._buffer, ""
            return Delta(text)
        at = self._buffer.find(mark)
        if at == 0 or (at > 0 and not self._only_first):
            text, self._buffer, self._state = self._buffer[:at], self._buffer[at:], "head"
            return Delta(text)
        if self._only_first:
            self._is_decided = not mark.startswith(self._buffer)
            return Delta() if self._is_decided else None
        most = min(len(mark) - 1, len(self._buffer))
        held = next((n for n in range(most, 0, -1) if self._buffer.endswith(mark[:n])), 0)
        certain = len(self._buffer) - held
        text, self._buffer = self._buffer[:certain], self._buffer[certain:]
        return Delta(text) if text else None


class JsonEnd:
    """Finds the end of a JSON object that arrives in parts."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False
        self.is_closed = False

    def feed(self, text: str) -> int:
        """Characters of ``text`` that belong to the object."""
        for at, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    self.is_closed = True
                    return at + 1
        return len(text)
