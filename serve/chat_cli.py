"""``rdlm chat``: a conversation on the terminal, through the server's engine. Imports torch only once its options
are valid."""

from __future__ import annotations

import io
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rdlm.command_line import new_app
from rdlm.config.base import parse
from rdlm.errors import UserError
from serve.api.schemas import ChatRequest
from serve.cli import CheckpointOption
from serve.engine.engine import Engine
from serve.engine.sequence import Event, Request
from serve.errors import ApiError
from serve.options import takes_options, unnamed_defaults
from serve.settings import EngineSettings, HttpSettings

if TYPE_CHECKING:
    from serve.api.state import ServerState

app = new_app()
HELP = "/k N: answer with K = N. /new: begin anew. /exit or end of input: leave. Ctrl-C stops an answer."


@app.command(epilog="Example: rdlm chat --checkpoint runs/smollm2-looped --num-steps 4")
@takes_options
def chat(
    checkpoint: CheckpointOption,
    system: Annotated[
        str | None, typer.Option(help="System message of the conversation.", show_default=False)
    ] = None,
    num_steps: Annotated[
        int | None, typer.Option(help="K; by default the checkpoint's.", show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    seed: Annotated[int, typer.Option(help="Same seed and messages, same answers.")] = 0,
    *,
    engine: dict[str, Any],
    request: dict[str, Any],
) -> None:
    """Chat with a checkpoint whose tokenizer has a chat template. A line is a message.

    /k N changes K from the next answer on, /new begins a new conversation, /exit or the end of input leaves.
    Messages may be piped in, one a line; then the answers alone are printed.
    """
    settings: EngineSettings = parse(
        EngineSettings, {**engine, "max_slots": 1, "max_queue": 1}, "the options of rdlm chat"
    )
    start = [] if system is None else [{"role": "system", "content": system}]
    body = {"messages": start, "seed": seed, "max_tokens": max_tokens, **request}
    ChatRequest.parse(
        {**body, "messages": [{"role": "user", "content": ""}]}
    )  # mistakes end the command early

    from serve.api.state import ServerState
    from serve.loading import load_served

    with Engine(lambda: load_served(checkpoint, settings), settings.max_queue) as running:
        server = ServerState(running, HttpSettings())
        if server.chat_template is None:
            problem, remedy = "its tokenizer has no chat template", "continue texts with rdlm generate"
            raise UserError("--checkpoint", str(checkpoint), problem, remedy)
        conversation = _Conversation(server, {**unnamed_defaults(running.served), **body})
        default = len(body.get("step_sizes", ())) or running.served.default_steps
        conversation.choose(default if num_steps is None else num_steps)
        _talk(conversation, sys.stdin.isatty())


class _Conversation:
    """The messages so far, and the K of the next answer."""

    def __init__(self, server: ServerState, body: dict[str, Any]) -> None:
        """body: of a chat request, with the messages that every conversation begins with."""
        self.server, self.body = server, body
        self.num_steps = server.served.default_steps
        self.clear()

    def clear(self) -> None:
        self.messages: list[dict[str, Any]] = list(self.body["messages"])

    def choose(self, num_steps: int) -> None:
        """Answer with this K. UserError where it is out of range; a warning beyond the trained depth."""
        served = self.server.served
        most = served.max_steps
        if not 1 <= num_steps <= most:
            raise UserError("--num-steps", num_steps, "is out of range", f"this model takes 1 to {most}")
        self.num_steps = num_steps
        if (warning := served.config.depth_warning(num_steps)) is not None:
            typer.echo(f"rdlm: {warning}", err=True)

    def _request(self, body: dict[str, Any]) -> Request:
        """The request, with fewer tokens where the context has no room for all. Raises UserError or
        ApiError."""
        from serve.api.request_parsing import parse_chat

        try:
            try:
                return parse_chat(ChatRequest.parse(body), self.server).requests[0]
            except ApiError as error:
                if (error.param, error.code) != ("max_tokens", "context_length_exceeded"):
                    raise
            return parse_chat(ChatRequest.parse({**body, "max_tokens": None}), self.server).requests[0]
        except ApiError as error:
            if error.code != "context_length_exceeded":
                raise
        message, most = body["messages"][-1]["content"], self.server.served.max_len
        problem = f"with it the conversation would fill the context of {most}"
        raise UserError("message", message[:40], problem, "begin anew with /new")

    def answer(self, message: str) -> None:
        """Print the answer as it comes. UserError or ApiError for a message that cannot be answered, which is
        forgotten; what Ctrl-C leaves of an answer is kept."""
        asked = [*self.messages, {"role": "user", "content": message}]
        request = self._request({**self.body, "messages": asked, "num_steps": self.num_steps})
        texts: list[str] = []

        def show(event: Event) -> None:
            texts.append(event.text)
            typer.echo(event.text, nl=False)

        try:
            [events] = self.server.engine.generate([request], show)
            if events[-1].error is not None:
                raise events[-1].error
        except KeyboardInterrupt:
            typer.echo(" [stopped]", nl=False)
        typer.echo()
        self.messages = [*asked, {"role": "assistant", "content": "".join(texts)}]


def _talk(conversation: _Conversation, terminal: bool) -> None:
    """Answer line by line. terminal: whether somebody types, who may correct a mistake."""
    if terminal:
        import readline  # noqa: F401  lines can be edited and called back

        typer.echo(f"K = {conversation.num_steps}. {HELP}")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(
            errors="surrogateescape"
        )  # bytes that are not UTF-8 are a wrong line, not the end
    while True:
        try:
            line = (input("> ") if terminal else next(sys.stdin)).strip()
        except (EOFError, StopIteration, KeyboardInterrupt):
            return
        try:
            if line == "/exit":
                return
            elif line == "/new":
                conversation.clear()
            elif re.fullmatch("/k +[0-9]{1,9}", line):
                conversation.choose(int(line[3:]))
            elif line.startswith("/"):
                raise UserError("message", line, "there is no such command", HELP)
            elif any("\ud800" <= character <= "\udfff" for character in line):
                raise UserError("message", line[:40], "is not UTF-8", "send another")
            elif line:
                conversation.answer(line)
        except (UserError, ApiError) as error:
            if not terminal:
                raise (
                    error
                    if isinstance(error, UserError)
                    else UserError("message", line[:40], str(error), "send another")
                ) from None
            typer.echo(f"rdlm: {error}", err=True)
