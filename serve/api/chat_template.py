"""Messages to a prompt through the tokenizer's Jinja template, in the environment of transformers."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from rdlm.data.tokenizer import Tokenizer
from rdlm.errors import UserError, reason
from serve.errors import invalid


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
            _compile_jinja_template(self._source)
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            where = "" if line is None else f" (line {line})"
            raise UserError(
                "chat_template",
                "...",
                f"it is no Jinja template: {reason(error)}{where}",
                "correct or remove it",
            ) from None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The tokenizer's template, None where it has none. Raises UserError."""
        return None if tokenizer.chat_template is None else cls(tokenizer)

    def render(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """The prompt that asks for the next answer; variables: ``chat_template_kwargs``. Raises ApiError
        where it refuses.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        fixed: dict[str, Any] = {
            "chat_template": self._source,
            "add_generation_prompt": True,
            **self._special,
        }
        taken = variables.keys() & {*fixed, "conversations", "messages", "tools", "documents", "self"}
        taken |= variables.keys() & {"continue_final_message", "return_assistant_tokens_mask"}
        if taken:
            problem = f"{min(taken)} is not for a request to set"
            raise invalid(f"chat_template_kwargs: {problem}; leave it out", "chat_template_kwargs")
        try:
            rendered = render_jinja_template([messages], **fixed, **variables)[0][0]
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise invalid(
                f"messages: the chat template refuses them ({reason(error)})", "messages"
            ) from error
        return rendered
