"""From a published model to answers at several K: import, serve, ask over HTTP.

python -m demo.chat ByteDance/Ouro-1.4B                 # or a folder; K 1, 2 and 4, where the model has them
python -m demo.chat SOURCE --num-steps 1,4,32 --question "Why is the sky blue?"
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import openai
import typer

from demo.ask import wait_until_ready
from demo.processes import StepFailed
from rdlm.checkpoints.convert.importers import import_checkpoint
from rdlm.checkpoints.folder import load_config
from rdlm.cli import run
from rdlm.command_line import new_app
from rdlm.errors import UserError


def main(
    source: Annotated[str, typer.Argument(help="Name on the hub, folder in a published layout, GGUF file.")],
    num_steps: Annotated[str, typer.Option(help="K, one or several with commas.")] = "1,2,4",
    question: Annotated[str, typer.Option(help="What to ask.")] = "What is the capital of France?",
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 48,
    out: Annotated[Path, typer.Option(help="Folder of imported checkpoints.")] = Path("runs/zoo"),
) -> None:
    """Import once, serve on a free port, and ask the same question at every K; base models continue it."""
    checkpoint = out / re.sub(r"[^A-Za-z0-9._-]", "-", source.strip("/").rpartition("/")[2])
    if not checkpoint.is_dir():
        import_checkpoint(source, checkpoint, name=checkpoint.name)
    config = load_config(checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        port, log = Path(scratch) / "port", Path(scratch) / "log"
        command = [sys.executable, "-m", "rdlm", "serve", "--checkpoint", str(checkpoint), "--port", "0"]
        with log.open("w", encoding="utf-8") as stream:
            server = subprocess.Popen([*command, "--port-file", str(port)], stdout=stream, stderr=stream)
        try:
            try:
                base = wait_until_ready(server, port, log, seconds=1800)
            except StepFailed as error:
                said = log.read_text(encoding="utf-8").strip().splitlines() or [str(error)]
                remedy = f"see `rdlm serve --checkpoint {checkpoint}`"
                raise UserError("SOURCE", source, f"cannot be served ({said[-1]})", remedy) from None
            client = openai.OpenAI(base_url=f"{base}/v1", api_key="none")
            card = client.models.list().data[0].model_dump()
            print(f"{config.name}: K is {card['recurrence']['meaning']}")
            for k in [k for k in map(int, num_steps.split(",")) if k <= config.max_steps]:
                given: dict[str, Any] = {
                    "model": config.name,
                    "temperature": 0,
                    "max_tokens": max_tokens,
                    "extra_body": {"num_steps": k},
                }
                if card["chat"]:
                    messages: Any = [{"role": "user", "content": question}]
                    answer: Any = client.chat.completions.create(messages=messages, **given)
                    text = answer.choices[0].message.content
                else:
                    answer = client.completions.create(prompt=question, **given)
                    text = answer.choices[0].text
                warnings = answer.model_dump().get("warnings") or []
                print(f"\nK = {k}: {text}", *(f"[{warning}]" for warning in warnings), sep="\n")
        finally:
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    app = new_app()
    app.command()(main)
    sys.exit(run(app, sys.argv[1:], "demo.chat"))
