"""Samples in the log of a run: what the model writes after a few prompts, at several K."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from rdlm.atomic import write_file
from rdlm.data.batch import Batch
from rdlm.data.tokenizer import Tokenizer
from rdlm.errors import UserError
from rdlm.objectives import Objective
from rdlm.objectives.base import HeldOut
from train.metrics import MetricsLog
from train.settings import SamplesConfig, TrainConfig

Written = dict[str, dict[int, str]]
"""Prompt -> K -> what was written."""
UPDATE = "\n## Update "


@torch.no_grad()
def written_texts(
    network: Objective, asked: SamplesConfig, tokenizer: Tokenizer, max_len: int, device: torch.device
) -> Written:
    """Greedy continuations of every prompt at every K. Collective: the processes make the same calls.

    Every token is the answer of one forward pass over all prompts and K, through the code that scores whole
    sequences: there is no cache whose layout training would have to know.
    """
    wanted = [(prompt, k) for prompt in asked.prompts for k in asked.num_steps]
    starts = [tokenizer.encode(prompt) for prompt, _ in wanted]
    rows = [list(ids) for ids in starts]
    going = set(range(len(rows)))
    for _ in range(asked.max_tokens):
        going = {i for i in going if len(rows[i]) < max_len}
        if not going:
            break
        longest = max(map(len, rows))
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in rows], device=device)
        batch = Batch(padded, padded, torch.ones_like(padded, dtype=torch.bool))
        found = network(batch, held_out=HeldOut(asked.num_steps, answers=True))
        for i in sorted(going):
            token = int(found[f"K={wanted[i][1]}"][i, len(rows[i]) - 1])
            if token == tokenizer.eos_id or token >= tokenizer.vocab_size:
                going.discard(i)
            else:
                rows[i].append(token)
    texts: Written = {}
    for (prompt, k), ids, start in zip(wanted, rows, starts, strict=True):
        texts.setdefault(prompt, {})[k] = tokenizer.decode(ids[len(start) :])
    return texts


def record(file: Path, name: str, step: int, texts: Written, board: MetricsLog) -> None:
    """Write the samples of an update to ``file`` and to TensorBoard. Samples of this and later updates, of a
    run that was resumed before them, are replaced."""
    earlier = file.read_text(encoding="utf-8") if file.exists() else ""
    head, *parts = earlier.split(UPDATE)
    kept = [part for part in parts if _number(part) is not None and int(part.split("\n")[0]) < step]
    head = head if parts else f"# What {name} writes\n\nThe most probable tokens, at several K.\n"
    body = as_markdown(texts)
    write_file(file, UPDATE.join([head, *kept, f"{step}\n\n{body}"]))
    board.text("samples", body, step)


def as_markdown(texts: Written) -> str:
    """A paragraph for each prompt, a line for each K."""
    lines = []
    for prompt, by_k in texts.items():
        lines.append(f"**{_quoted(prompt)}**\n")
        lines += [f"- K = {k}: {_quoted(text)}" for k, text in by_k.items()] + [""]
    return "\n".join(lines)


def check_samples(config: TrainConfig, tokenizer: Tokenizer | None) -> None:
    """UserError where samples are wanted that the model cannot write."""
    asked = config.samples
    if not asked.interval_steps:
        return
    problem, remedy = None, "set samples.interval_steps=0"
    if tokenizer is None or config.model.is_image:
        problem = "the model has no text to write"
    elif not config.objective.left_to_right:
        problem = "a masked model does not go on from a prompt; use `rdlm generate` afterwards"
    elif config.block is not None:
        problem = "one block alone writes nothing"
    if problem is not None:
        raise UserError("samples.interval_steps", asked.interval_steps, problem, remedy)
    assert tokenizer is not None
    for prompt in asked.prompts:
        length = len(tokenizer.encode(prompt))
        if not 0 < length < config.model.max_seq_len:
            problem = f"has {length} tokens; the model takes 1 to {config.model.max_seq_len - 1}"
            raise UserError("samples.prompts", prompt, problem, "use another prompt")


def _quoted(text: str) -> str:
    """The text on one line, with what Markdown would read as layout escaped."""
    return json.dumps(text, ensure_ascii=False)


def _number(part: str) -> int | None:
    first = part.split("\n")[0]
    return int(first) if first.isdecimal() else None
