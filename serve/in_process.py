"""The server's engine around a model that is in memory: behind ``generate`` and ``chat`` of ``rdlm.load(...)``."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from rdlm.arguments import listed, plain
from rdlm.config.base import parse
from rdlm.data.tokenizer import IdsAlone, Tokenizer
from rdlm.errors import UserError
from rdlm.inference import Generation, GenerationOptions, Message, Model
from serve.api.chat_template import ChatTemplate
from serve.api.request_parsing import parse_completion
from serve.api.schemas import ChatRequest, CompletionRequest
from serve.api.state import ServerState
from serve.engine.engine import Engine
from serve.engine.sequence import Event
from serve.errors import ApiError
from serve.loading import build_served, end_ids
from serve.options import REQUEST, as_user_error, fields
from serve.settings import EngineSettings, HttpSettings

MOST_TOGETHER = 16
"""Prompts that step together."""
DEFAULTS: dict[str, Any] = {"max_tokens": 64, "seed": 0, "kv_cache": "shared"}
"""Defaults of options; the others have those of a request."""
FIELDS = {"prompts": "prompt", "num_steps": "num_steps", "max_tokens": "max_tokens", "seed": "seed"} | {
    {"exit": "exit_criterion"}.get(name, name) if "." in path else path: path
    for name, path in REQUEST.items()
}
"""Argument -> the field of a request that it sets: of the options those of the commands, named like the fields."""


class InProcess:
    """See rdlm.inference.Engine. Each call has a pool of keys that fits its prompts, and none stays behind."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def generate(
        self, prompts: Seq[Seq[int]], num_steps: int, options: GenerationOptions
    ) -> list[Generation]:
        if not prompts:
            return []
        given = DEFAULTS | {name: value for name, value in options.items() if value is not None}
        kv_cache = given.pop("kv_cache")
        for name in given.keys() - FIELDS.keys():
            raise UserError(name, given[name], "there is no such option", f"use some of {', '.join(FIELDS)}")
        values = {name: plain(value) for name, value in given.items()}
        body = fields({FIELDS[name]: value for name, value in values.items()}) | {"num_steps": num_steps}
        try:
            return self._answers(prompts, body, kv_cache)
        except (ApiError, UserError) as error:
            raise as_user_error(error, body, FIELDS, "see docs/python.md") from None

    def _answers(self, prompts: Seq[Seq[int]], body: dict[str, Any], kv_cache: str) -> list[Generation]:
        """Parsed as the server parses requests. ApiError or UserError."""
        model, tokenizer = self.model, self._tokenizer
        bodies = [CompletionRequest.parse({**body, "prompt": [*ids]}) for ids in prompts]
        longest, most = max(map(len, prompts)), model.config.model.max_seq_len
        if longest + body["max_tokens"] > most:
            problem = f"with max_tokens = {body['max_tokens']} it exceeds the {most} positions of the model"
            raise UserError("prompts", f"{longest} tokens", problem, "shorten it, or ask for fewer tokens")
        pool = {
            "kv_cache": kv_cache,
            "max_slots": min(len(prompts), MOST_TOGETHER),
            "max_len": max(2, longest + body["max_tokens"]),
            "max_queue": len(prompts),
        }
        settings: EngineSettings = parse(EngineSettings, pool, "the options of generate")
        ends = end_ids(model.folder, tokenizer)
        served = build_served(model.denoiser, model.config, tokenizer, settings, ends)
        with Engine(lambda: served, settings.max_queue) as engine:
            server = ServerState(engine, HttpSettings())
            requests = [parse_completion(one, server).requests[0] for one in bodies]
            return [_generation(events) for events in engine.generate(requests)]

    def chat_ids(self, messages: Seq[Message]) -> list[int]:
        """The prompt of a conversation. UserError where there is no template for it, or it refuses."""
        template = ChatTemplate.of(self._tokenizer)
        if template is None:
            missing = "its tokenizer has no chat template"
            problem = "it has no tokenizer" if self.model.tokenizer is None else missing
            raise UserError("checkpoint", self.model.config.name, problem, "continue texts with generate")
        remedy = 'give a list of {"role": ..., "content": ...}'
        given = listed("messages", messages, remedy)
        if not given or not all(isinstance(message, Mapping) for message in given):
            raise UserError("messages", messages, "it holds no conversation", remedy)
        try:
            shown = ChatRequest.parse({"messages": [dict(message) for message in given]}).messages
            return self._tokenizer.encode(template.render([message.plain() for message in shown], {}))
        except ApiError as error:
            _, _, problem = error.message.partition(": ")
            raise UserError("messages", len(given), problem or error.message, "change them") from None

    @property
    def _tokenizer(self) -> Tokenizer:
        return self.model.tokenizer or IdsAlone(self.model.config.model.vocab_size)


def _generation(events: list[Event]) -> Generation:
    last = events[-1]
    if last.error is not None:
        raise last.error
    if last.finish not in ("stop", "length"):
        raise RuntimeError(f"generation ended with {last.finish!r}")
    drawn = [(e.token, e.steps) for e in events if e.token is not None and e.steps is not None]
    tokens, steps = [token for token, _ in drawn], [count for _, count in drawn]
    guesses = (0, 0) if last.usage is None else (last.usage.drafted, last.usage.accepted)
    return Generation("".join(e.text for e in events), tokens, steps, last.finish, *guesses)
