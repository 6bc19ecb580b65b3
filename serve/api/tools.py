"""Tool calls: the grammar of answers that may contain them, and reading them. How a model spells them: tool_formats.py.

While tools are offered the answer is constrained (serve/engine/grammar.py):
what begins as a call becomes one, of a function that was offered and with arguments that fit its schema, so reading
needs no guesses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from serve.engine.grammar import special_rule

if TYPE_CHECKING:
    from serve.api.tool_formats import ArgumentReader, ToolFormat


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


def tool_grammar(
    form: ToolFormat,
    tools: Sequence[Tool],
    choice: ToolChoice,
    is_parallel: bool,
    special: Mapping[str, int],
    content: str | None = None,
) -> tuple[str, dict[int, int]]:
    """Lark of an answer with calls, and which line of it belongs to which of ``tools``. Raises ApiError.

    content: what an answer without a call must be, as a part of a rule; None is any text.
    """
    offered = [i for i, tool in enumerate(tools) if choice.names is None or tool.name in choice.names]
    several = form.between is not None and is_parallel
    more = f"({special_rule(form.between or '', special)} call)*" if several else ""
    calls = " ".join(part for part in ("call", more, special_rule(form.close, special)) if part)
    opened = special_rule(form.open, special)
    if form.tag in special:
        opened = f"{special_rule(form.tag, special)}? {opened}"
    lines = ["%llguidance {}", f"calls: {calls}"]  # the start follows, on line 3
    if choice.mode == "required":
        lines.append(f"start: {opened} calls")
    elif content is not None:
        lines.append(f"start: {content} | {opened} calls")
    elif form.first:
        lines += [f"start: TEXT | {opened} calls", rf"TEXT: /([^\{form.first}](.|\n)*)?/"]
    elif form.mark in special:
        lines += [f"start: TEXT | TEXT {opened} calls"]
        lines += [f"TEXT: /(?s:.*)/ & ~/(?s:.*){re.escape(form.mark)}(?s:.*)/"]  # spelt out it is no mark
    else:  # shortest match: the first mark begins the calls
        lines += [f"start: TEXT | marked {special_rule(form.open.removeprefix(form.mark), special)} calls"]
        lines += [rf"marked[lazy]: /(.|\n)*{re.escape(form.mark)}/", r"TEXT: /(.|\n)*/"]
    lines.append("call: " + " | ".join(f"call{i}" for i in offered))
    where: dict[int, int] = {}
    for i in offered:
        rules = form.rules(f"call{i}", tools[i], special)
        where |= dict.fromkeys(range(len(lines) + 1, len(lines) + len(rules) + 1), i)
        lines += rules
    return "\n".join(lines) + "\n", where


def begun(text: str, mark: str) -> int:
    """Characters at the end of ``text`` that ``mark`` may begin with."""
    most = min(len(mark) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(mark[:n])), 0)


@dataclass(frozen=True)
class Delta:
    """A part of an answer: of its text, or of call number ``call``."""

    text: str = ""
    call: int | None = None
    id: str | None = None
    """Identifier of the call, with its first part, like ``name``."""
    name: str | None = None


class CallReader:
    """Splits a constrained answer into text and calls, as it arrives."""

    def __init__(self, form: ToolFormat, tools: Sequence[Tool], only_first: bool = False) -> None:
        """only_first: a mark begins calls only where the answer begins with it: the text may contain it."""
        self._form, self._only_first = form, only_first or bool(form.first)
        self._tools = {tool.name: tool for tool in tools}
        self._is_decided = False
        """Whether the rest is text, come what may."""
        self._state: Literal["text", "head", "arguments"] = "text"
        self._buffer = ""
        self._arguments: ArgumentReader | None = None
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
            head = self._form.head.search(self._buffer)
            if head is None or head[1] not in self._tools:
                return None
            self._buffer, self._state = self._buffer[head.end() :], "arguments"
            self._arguments = self._form.arguments(self._tools[head[1]])
            self.calls += 1
            return Delta(call=self.calls - 1, id=head[2] or self._form.new_id(), name=head[1])
        assert self._arguments is not None
        used, text = self._arguments.feed(self._buffer)
        self._buffer = self._buffer[used:]
        if self._arguments.is_closed:
            self._state = "head"
        return Delta(text, call=self.calls - 1) if used else None

    def _text(self) -> Delta | None:
        mark = self._form.mark
        if self._is_decided:
            text, self._buffer = self._buffer, ""
            return Delta(text)
        if self._form.tag and self._buffer.startswith(self._form.tag):
            self._buffer = self._buffer.removeprefix(self._form.tag)
        at = self._buffer.find(mark)
        if at == 0 or (at > 0 and not self._only_first):
            text, self._buffer, self._state = self._buffer[:at], self._buffer[at:], "head"
            return Delta(text)
        if self._only_first:
            self._is_decided = not mark.startswith(self._buffer)
            return Delta() if self._is_decided else None
        certain = len(self._buffer) - begun(self._buffer, mark)
        text, self._buffer = self._buffer[:certain], self._buffer[certain:]
        return Delta(text) if text else None


@dataclass(frozen=True)
class OfferedTools:
    """How an answer calls the tools that were offered."""

    form: ToolFormat
    tools: tuple[Tool, ...]
    only_first: bool
    """Whether only the begin of an answer tells calls from text."""

    def reader(self) -> CallReader:
        return CallReader(self.form, self.tools, self.only_first)
