"""Messages to a prompt, through the tokenizer's own jinja2 template in a sandbox."""

from __future__ import annotations

from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rdlm.data.tokenizer import Tokenizer
from serve.errors import ApiError, invalid


class _Refused(TemplateError):
    """The template itself refuses the conversation."""


def _refuse(message: str) -> NoReturn:
    raise _Refused(message)


def render(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> str:
    """The prompt that asks for the next answer. Raises ApiError 400 without a template, or where it refuses the messages."""
    if tokenizer.chat_template is None:
        raise invalid(
            "this model has no chat template, so it cannot take messages; use /v1/completions, or add chat_template to the "
            "checkpoint's tokenizer_config.json", "messages", "no_chat_template",
        )  # fmt: skip
    names = {i: text for text, i in tokenizer.special_tokens.items()}
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(tokenizer.chat_template).render(
            messages=messages, add_generation_prompt=True,
            bos_token=names.get(tokenizer.bos_id, "") if tokenizer.bos_id is not None else "",
            eos_token=names.get(tokenizer.eos_id, "") if tokenizer.eos_id is not None else "",
        )  # fmt: skip
    except (TemplateError, TypeError) as error:
        raise ApiError(
            400, f"messages: the chat template refuses them ({error})", "invalid_request_error", "messages"
        ) from error
