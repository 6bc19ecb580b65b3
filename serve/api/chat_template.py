"""Messages to a prompt through the tokenizer's Jinja template, in the environment of transformers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError, meta

from rdlm.data.tokenizer import Tokenizer
from rdlm.errors import UserError, reason
from serve.api.tool_formats import tool_format
from serve.api.tools import Tool
from serve.errors import ApiError, invalid

MAX_SECONDS, MAX_PROMPT = 5.0, 1 << 24
"""Longest time and most characters of rendering one conversation."""
RESERVED = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversations",
    "documents",
    "messages",
    "return_assistant_tokens_mask",
    "self",
    "tools",
)
"""Variables that transformers or this server sets."""

_deadline = threading.local()


class TooSlow(ApiError):
    """The time for a conversation was over."""


def _check_bounds(size: int = 0) -> None:
    """Raises ApiError where the rendering of this thread takes too long or has become too large."""
    is_late = time.monotonic() > _deadline.at
    if is_late or size > MAX_PROMPT:
        problem = f"more than {MAX_SECONDS} s or {MAX_PROMPT} characters"
        message = f"messages: the chat template makes {problem} of them; send less"
        raise (TooSlow if is_late else ApiError)(400, message, "invalid_request_error", "messages")


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        _check_bounds()
        return function(*args, **kwargs)

    return call


class ChatTemplate:
    """A compiled template: sandbox, filters, globals and extensions are those of ``transformers``
    (``apply_chat_template``).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises UserError for a template that does not compile."""
        from transformers.utils.chat_template_utils import _compile_jinja_template  # takes a second to import

        assert tokenizer.chat_template is not None
        self._source = tokenizer.chat_template
        names = {i: text for text, i in tokenizer.special_tokens.items()}
        ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._special = {key: "" if i is None else names.get(i, "") for key, i in ends.items()}
        try:
            environment = _compile_jinja_template(self._source).environment.overlay()
            for name in ("getattr", "getitem", "call"):  # whatever loops without output uses some of them
                setattr(environment, name, _checked(getattr(environment, name)))
            self._template = environment.from_string(self._source)
            tree = environment.parse(self._source)
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            where = "" if line is None else f" (line {line})"
            raise UserError(
                "chat_template",
                "...",
                f"it is not a Jinja template: {reason(error)}{where}",
                "correct or remove it",
            ) from None
        self.knows_tools = "tools" in meta.find_undeclared_variables(tree)
        self.tool_format = tool_format(self._source) if self.knows_tools else None
        """How the model calls tools; None where that is not known."""
        self._taken = {*self._special, *self._template.environment.globals, *RESERVED}

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The tokenizer's template, None where it has none. Raises UserError."""
        return None if tokenizer.chat_template is None else cls(tokenizer)

    def render(
        self,
        messages: list[dict[str, Any]],
        variables: dict[str, Any],
        tools: Sequence[Tool] = (),
        seconds: float | None = None,
    ) -> str:
        """The prompt that asks for the next answer; variables: ``chat_template_kwargs``. Raises ApiError
        where it refuses, or makes more than ``MAX_PROMPT`` characters, and TooSlow after ``seconds`` (``MAX_SECONDS``).
        """
        if taken := variables.keys() & self._taken:
            problem = f"{min(taken)} is not for a request to set"
            raise invalid(f"chat_template_kwargs: {problem}; leave it out", "chat_template_kwargs")
        offered = [dict(tool.given) for tool in tools] or None
        fixed = {"messages": messages, "tools": offered, "documents": None, "add_generation_prompt": True}
        pieces: list[str] = []
        size = 0
        _deadline.at = time.monotonic() + (MAX_SECONDS if seconds is None else seconds)
        try:
            for piece in self._template.generate(**self._special, **fixed, **variables):
                pieces.append(piece)
                size += len(piece)
                _check_bounds(size)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise invalid(
                f"messages: the chat template refuses them ({reason(error)})", "messages"
            ) from error
        return "".join(pieces)
