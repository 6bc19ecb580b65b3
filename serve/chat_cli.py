"""``rdlm chat``: a conversation on the terminal, through the server's engine. Imports torch only once its options
are valid."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from rdlm.command_line import new_app
from rdlm.config.base import parse
from rdlm.errors import UserError
from rdlm.sampling_params import SamplingParams
from serve.api.chat_template import ChatTemplate
from serve.cli import (
    CacheOption,
    CheckpointOption,
    DeviceOption,
    DtypeOption,
    KernelOption,
    WeightOption,
)
from serve.engine.engine import Engine
from serve.engine.sequence import Event, Request, StepBudget
from serve.errors import ApiError
from serve.settings import EngineSettings

app = new_app()
DEFAULTS: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}
HELP = "/k N: answer with K = N. /new: begin anew. /exit or end of input: leave. Ctrl-C stops an answer."


@app.command(epilog="Example: rdlm chat --checkpoint runs/smollm2-looped --num-steps 4")
def chat(
    checkpoint: CheckpointOption,
    system: Annotated[
        str | None, typer.Option(help="System message of the conversation.", show_default=False)
    ] = None,
    num_steps: Annotated[
        int | None, typer.Option(help="K; by default the checkpoint's.", show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0 is greedy; by default that of the checkpoint's generation_config.json, else 0.8.",
            show_default=False,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Keep the most probable tokens up to this total probability; by default that of "
            "generation_config.json, else 0.95.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed and messages, same answers.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    kv_cache: CacheOption = "shared",
    kernels: KernelOption = "auto",
    weights: WeightOption = "auto",
) -> None:
    """Chat with a checkpoint whose tokenizer has a chat template. A line is a message.

    /k N changes K from the next answer on, /new begins a new conversation, /exit or the end of input leaves.
    Messages may be piped in, one a line; then the answers alone are printed.
    """
    given = {"device": device, "dtype": dtype, "kv_cache": kv_cache, "kernels": kernels, "weights": weights}
    settings: EngineSettings = parse(
        EngineSettings, {**given, "max_slots": 1, "max_queue": 1}, "the options of rdlm chat"
    )
    given_numbers = {"temperature": temperature, "top_p": top_p}
    named: dict[str, Any] = {name: value for name, value in given_numbers.items() if value is not None}
    SamplingParams(**named)

    from serve.loading import load_served

    with Engine(lambda: load_served(checkpoint, settings), settings.max_queue) as engine:
        template = ChatTemplate.of(engine.served.tokenizer)
        if template is None:
            problem, remedy = "its tokenizer has no chat template", "continue texts with rdlm generate"
            raise UserError("--checkpoint", str(checkpoint), problem, remedy)
        sampling = SamplingParams(**{**DEFAULTS, **engine.served.sampling_defaults, **named})
        start = [] if system is None else [{"role": "system", "content": system}]
        conversation = _Conversation(engine, template, start, sampling, seed, max_tokens)
        conversation.choose(engine.served.default_steps if num_steps is None else num_steps)
        _talk(conversation, sys.stdin.isatty())


class _Conversation:
    """The messages so far, and the K of the next answer."""

    def __init__(
        self,
        engine: Engine,
        template: ChatTemplate,
        start: list[dict[str, Any]],
        sampling: SamplingParams,
        seed: int,
        max_tokens: int,
    ) -> None:
        self.engine, self.template, self.start = engine, template, start
        self.sampling, self.seed, self.max_tokens = sampling, seed, max_tokens
        self.num_steps = engine.served.default_steps
        self.clear()

    def clear(self) -> None:
        self.messages = list(self.start)

    def choose(self, num_steps: int) -> None:
        """Answer with this K. UserError where it is out of range; a warning beyond the trained depth."""
        most = self.engine.served.max_steps
        if not 1 <= num_steps <= most:
            raise UserError("--num-steps", num_steps, "is out of range", f"this model takes 1 to {most}")
        self.num_steps = num_steps
        if (warning := self.engine.served.config.depth_warning(num_steps)) is not None:
            typer.echo(f"rdlm: {warning}", err=True)

    def answer(self, message: str) -> None:
        """Print the answer as it comes. UserError or ApiError for a message that cannot be answered, which is
        forgotten; what Ctrl-C leaves of an answer is kept."""
        served, asked = self.engine.served, [*self.messages, {"role": "user", "content": message}]
        ids = tuple(served.tokenizer.encode(self.template.render(asked, {})))
        room = served.max_len - len(ids)
        if room < 1:
            problem = f"the conversation's {len(ids)} tokens fill the context of {served.max_len}"
            raise UserError("message", message[:40], problem, "begin anew with /new")
        request = Request(
            ids, StepBudget(self.num_steps), min(self.max_tokens, room), self.sampling, self.seed,
            stop_ids=served.end_ids
        )  # fmt: skip
        said: list[str] = []

        def show(event: Event) -> None:
            said.append(event.text)
            typer.echo(event.text, nl=False)

        try:
            [events] = self.engine.generate([request], show)
            if events[-1].error is not None:
                raise events[-1].error
        except KeyboardInterrupt:
            typer.echo(" [stopped]", nl=False)
        typer.echo()
        self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]


def _talk(conversation: _Conversation, terminal: bool) -> None:
    """Answer line by line. terminal: whether somebody types, who may correct a mistake."""
    if terminal:
        import readline  # noqa: F401  lines can be edited and called back

        typer.echo(f"K = {conversation.num_steps}. {HELP}")
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
            elif line.startswith("/k ") and line[3:].strip().isdecimal():
                conversation.choose(int(line[3:]))
            elif line.startswith("/"):
                raise UserError("message", line, "there is no such command", HELP)
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
