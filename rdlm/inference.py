"""A checkpoint from Python: ``rdlm.load(folder).logits(ids, num_steps=[1, 4])``. Also behind ``rdlm logits``
and ``rdlm inspect``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Unpack

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rdlm.arguments import integer, listed, plain, token_ids
from rdlm.atomic import check_out_file, replacing_file
from rdlm.checkpoints import folder as checkpoint
from rdlm.checkpoints.convert.base import HUB_ID, local
from rdlm.checkpoints.convert.importers import import_checkpoint
from rdlm.checkpoints.folder import Loaded
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.errors import UserError, reason
from rdlm.flops import costs_of
from rdlm.nn.attention import AttentionContext
from rdlm.objectives import Objective
from rdlm.registry import build
from rdlm.sampling_params import Numbers, Order


@dataclass(frozen=True)
class Generation:
    """One answer."""

    text: str
    tokens: list[int]
    steps: list[int]
    """Core steps of the position that each token was drawn from."""
    finish: str
    """stop: an end of text or a stop string; length: ``max_tokens``."""
    drafted: int = 0
    accepted: int = 0
    """Tokens that were guessed early, by a draft or in a wavefront, and of these the ones that stayed."""


PROMPTS = "give a text, a list of texts, or a list of lists of token ids"
CHAT_TOKENS = 512
"""Most tokens of an answer to a conversation, by default."""


class GenerationOptions(Numbers, total=False):
    """What ``Model.generate`` and ``Model.chat`` take besides prompts and K. Each is a field of the server's requests
    (serve/api/schemas.py has ranges and defaults), but for ``kv_cache``."""

    max_tokens: int
    """Most tokens of an answer: by default 64, of a conversation's 512."""
    seed: int
    """Equal seeds give equal texts; default 0."""
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    min_tokens: int
    ignore_eos: bool
    sampler: str
    order: Order
    exit_criterion: str
    """A name of rdlm/exit_criteria.py, for instance latent-diff."""
    exit_threshold: float
    """Default: the checkpoint's."""
    step_sizes: Sequence[float]
    """Lengths of the core steps of a LoopFormer, whose number is K."""
    draft_steps: int
    """Self-speculative decoding (full or first cache): tokens are drafted at so many core steps, verified at K."""
    draft_tokens: int
    wavefront: int
    """So many positions are decoded together, and read out after every ``inner_steps`` core steps."""
    inner_steps: int
    wavefront_threshold: float
    wavefront_noise: float
    wavefront_average: float
    headway: int
    """A position whose state changes relatively by less leaves early."""
    kv_cache: Literal["shared", "full", "first"]
    """Which keys a position keeps: those of its last core step (default), of every one, or of the first."""


Message = Mapping[str, Any]
"""Of a conversation, as in OpenAI's API: ``{"role": "user", "content": "..."}``."""


class Engine(Protocol):
    """What ``Model.generate`` and ``Model.chat`` ask of the engine that the server runs (serve/in_process.py).
    rdlm imports no other package: the one that is used is handed over by rdlm/__init__.py."""

    def chat_ids(self, messages: Sequence[Message]) -> list[int]: ...

    def generate(
        self, prompts: Sequence[Sequence[int]], num_steps: int, options: GenerationOptions
    ) -> list[Generation]: ...


class Model:
    """A checkpoint of text in memory. ids: [B, T] int64; a state is what stands before the read-out after K
    core steps. K is None for the default of the checkpoint."""

    def __init__(self, folder: Path, loaded: Loaded, engine: Callable[[Model], Engine] | None = None) -> None:
        """engine: what generates; None leaves ``generate`` out."""
        self.folder = folder
        self.denoiser, self.config, self.tokenizer = loaded.denoiser, loaded.config, loaded.tokenizer
        self._engine = engine

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        num_steps: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[Generation]:
        """Continue texts, or ids as they are, with the engine that the server runs; in the order given, each as
        it would be alone. An option that is None counts as left out. Without a tokenizer ids are continued, and
        answers have no text.

        UserError where the model cannot do what is asked, or an option is out of range.
        """
        self.config.check_text("generate")
        given = [prompts] if isinstance(prompts, str) else listed("prompts", prompts, PROMPTS)
        ids = [
            self._begun(p) if isinstance(p, str) else token_ids(f"prompts[{i}]", p)
            for i, p in enumerate(given)
        ]
        for i, prompt in enumerate(ids):
            self._check_ids(f"prompts[{i}]", min(prompt, default=0), max(prompt, default=0))
        if options.get("step_sizes") is not None:
            steps = len(self._step_sizes(num_steps, options["step_sizes"]))
        else:
            default = self.config.default_steps
            steps = default if num_steps is None else integer("num_steps", num_steps, "give one K")
        return self._running.generate(ids, steps, options)

    def chat(
        self, messages: Sequence[Message], num_steps: int | None = None, **options: Unpack[GenerationOptions]
    ) -> Generation:
        """The answer to a conversation, written out by the chat template of the model's tokenizer. UserError
        where the model has no template, or it refuses the messages."""
        self.config.check_text("chat")
        ids = self._running.chat_ids(messages)
        room = max(1, self.config.model.max_seq_len - len(ids))
        asked = options.get("max_tokens")
        most = CHAT_TOKENS if asked is None else integer("max_tokens", asked, "give a number of tokens")
        options["max_tokens"] = min(most, room)
        return self.generate([ids], num_steps, **options)[0]

    @property
    def _running(self) -> Engine:
        if self._engine is None:
            raise UserError("engine", None, "this model was loaded without one", "use rdlm.load")
        return self._engine(self)

    @torch.no_grad()
    def score(
        self, texts: str | Sequence[str], num_steps: int | Sequence[int] | None = None, *, seed: int = 0
    ) -> dict[int, list[Tensor]]:
        """{K: for each text the log-probabilities of its tokens, fp32 [T], nats}. Without a beginning of text
        the first token has none. ``config.objective.estimator_at(K)`` names what the numbers are. UserError
        for a K that the model does not have, or a text that is too long."""
        ks, device = self._ks(num_steps), self.denoiser.model.head.weight.device
        found: dict[int, list[Tensor]] = {k: [] for k in ks}
        for text in [texts] if isinstance(texts, str) else listed("texts", texts, "give texts"):
            if not isinstance(text, str):
                raise UserError(
                    "texts", text, f"it is of type {type(text).__name__}, not a text", "give texts"
                )
            begun = self._begun(text)
            if len(begun) < 2:
                raise UserError("texts", text, "has no token to score", "give at least two tokens")
            ids = torch.tensor([begun])
            self._checked(ids)
            scores = self.denoiser.score(ids[:, :-1].to(device), ids[:, 1:].to(device), ks, seed=seed)
            for k in ks:
                found[k].append(scores[k].logprobs[0])
        return found

    def _begun(self, text: str) -> list[int]:
        """Ids of a text from the beginning of a sequence on."""
        if self.tokenizer is None:
            problem = "it has no tokenizer, so texts cannot be read"
            raise UserError("checkpoint", self.config.name, problem, "give ids")
        return [*self.tokenizer.start, *self.tokenizer.encode(text)]

    def logits(
        self,
        ids: Tensor,
        num_steps: int | Sequence[int] | None = None,
        *,
        states: Tensor | None = None,
        zero_state: bool = False,
        token_type_ids: Tensor | None = None,
        seed: int = 0,
        step_sizes: Sequence[float] | None = None,
    ) -> dict[int, Tensor]:
        """{K: fp32 logits [B, T, V] of the next token}; num_steps: the K, None for the default of the
        checkpoint.

        states [B, T, D]: the recurrent state before the first step; zero_state: zeros; else what the model
        starts from, drawn with ``seed`` where it is drawn. step_sizes: the lengths of the steps of LoopFormer, whose
        number is K. UserError where the model has no next token, or for a K that it does not have.
        """
        found = self.steps(ids, num_steps, states, zero_state, token_type_ids, seed, step_sizes)
        return {k: self.read_out(state, ctx) for k, state, ctx in found}

    def states(
        self,
        ids: Tensor,
        num_steps: int | Sequence[int] | None = None,
        *,
        states: Tensor | None = None,
        zero_state: bool = False,
        token_type_ids: Tensor | None = None,
        seed: int = 0,
    ) -> dict[int, Tensor]:
        """{K: state [B, T, S] after K core steps}; of the arguments see ``logits``."""
        return {k: s for k, s, _ in self.steps(ids, num_steps, states, zero_state, token_type_ids, seed)}

    @torch.no_grad()
    def gate(self, state: Tensor) -> Tensor:
        """Trained probability of stopping at a state [..., S] -> [...] fp32. UserError where there is no
        gate."""
        self.config.check_text("an exit gate")
        if not self.denoiser.model.has_exit_gate:
            remedy = "use a model with one, for instance Ouro"
            raise UserError("checkpoint", self.config.name, "it has no exit gate", remedy)
        return self.denoiser.model.gate(state)

    @torch.no_grad()
    def read_out(self, state: Tensor, ctx: AttentionContext) -> Tensor:
        """Logits [B, T, V] of states, fp32."""
        return self.denoiser.predict(self.denoiser.model.decode(state, ctx)).logits()

    @torch.no_grad()
    def steps(
        self,
        ids: Tensor,
        num_steps: int | Sequence[int] | None,
        states: Tensor | None,
        zero_state: bool,
        token_type_ids: Tensor | None,
        seed: int,
        step_sizes: Sequence[float] | None = None,
    ) -> list[tuple[int, Tensor, AttentionContext]]:
        """(K, state, what ``read_out`` needs with it) of every K; of the arguments see ``logits``."""
        seed = integer("seed", seed, "give an integer")
        for name, value in (("input_states", states), ("token_type_ids", token_type_ids)):
            if value is not None and not isinstance(value, Tensor):
                raise UserError(name, "...", f"it is of type {type(value).__name__}", "give a torch.Tensor")
        model = self.denoiser.model
        if step_sizes is not None:
            step_sizes = self._step_sizes(num_steps, step_sizes)
            num_steps = len(step_sizes)
        ks, found = self._ks(num_steps), []
        device = model.head.weight.device
        ids = self._checked(ids).to(device)
        if token_type_ids is not None and token_type_ids.shape != ids.shape:
            problem = f"there are ids {tuple(ids.shape)}"
            raise UserError("token_type_ids", tuple(token_type_ids.shape), problem, "give one type an id")
        ctx = (
            model.context(ids) if token_type_ids is None else model.prefix_context(token_type_ids.to(device))
        )
        e = model.encode(ids, ctx)
        cond = self.denoiser.condition(None, e)
        latent = None
        if states is not None or zero_state:
            shape = (*ids.shape, self.config.model.d_model)
            if states is not None and tuple(states.shape) != shape:
                raise UserError(
                    "input_states",
                    tuple(states.shape),
                    f"the model has states {shape}",
                    "give one of that shape",
                )
            latent = torch.zeros(shape) if states is None else states
            latent = latent.to(e)
        if latent is not None and not self.draws_state:
            latent = None
            if states is not None:
                problem = "this model starts from its tokens, not from a given state"
                raise UserError("input_states", tuple(states.shape), problem, "leave it out")
        for wanted in [[k] for k in ks] if model.depends_on_num_steps else [ks]:
            state = model.initial_state(e, model.state_stream(seed), latent, max(wanted))
            for k in range(1, max(wanted) + 1):
                if step_sizes is None:
                    state = model.core(state, e, cond, ctx)
                else:
                    state = model.sized_core(state, e, sum(step_sizes[: k - 1]), step_sizes[k - 1], ctx)
                if k in wanted:
                    found.append((k, state, ctx))
        return found

    @property
    def draws_state(self) -> bool:
        """Whether the recurrent state before the first step is free: drawn, zero or given."""
        return self.denoiser.model.draws_state

    def _checked(self, ids: Any) -> Tensor:
        if not isinstance(ids, Tensor):
            try:
                ids = torch.as_tensor(plain(ids))
            except (TypeError, ValueError, RuntimeError, OverflowError) as error:
                raise UserError("input_ids", ids, reason(error), "give a matrix of token ids") from None
        if ids.dim() != 2 or ids.dtype != torch.int64 or not ids.numel():
            problem = f"it is {ids.dtype} {tuple(ids.shape)}, not int64 [B, T]"
            raise UserError("input_ids", "...", problem, "give a matrix of token ids")
        limit = self.config.model.max_seq_len
        self._check_ids("input_ids", int(ids.min()), int(ids.max()))
        if ids.shape[1] > limit:
            raise UserError(
                "input_ids",
                ids.shape[1],
                f"the model was built for {limit} positions",
                f"give at most {limit}",
            )
        return ids

    def _step_sizes(self, num_steps: int | Sequence[int] | None, given: Sequence[float]) -> list[float]:
        """The lengths of steps as a list. UserError where they are none, or num_steps is given too."""
        sizes = listed("step_sizes", given, "write for instance 0.5,0.25,0.25")
        if not self.denoiser.model.takes_step_sizes:
            problem = "the steps of this model have no lengths"
            raise UserError("step_sizes", list(sizes), problem, "leave it out")
        if num_steps is not None:
            raise UserError(
                "num_steps", num_steps, "step_sizes says how many there are", "leave one of them out"
            )
        if not sizes or not all(isinstance(size, int | float) and 0 < size <= 1 for size in sizes):
            problem = "are not lengths of steps through [0, 1]"
            raise UserError("step_sizes", list(sizes), problem, "write for instance 0.5,0.25,0.25")
        return sizes

    def _check_ids(self, field: str, lowest: int, highest: int) -> None:
        size = self.config.model.vocab_size
        if lowest < 0 or highest >= size:
            wrong = highest if highest >= size else lowest
            raise UserError(field, wrong, f"the model knows ids 0 to {size - 1}", "encode with its tokenizer")

    def _ks(self, num_steps: int | Sequence[int] | None) -> list[int]:
        self.config.check_next_token("logits of the next token")
        self.config.check_whole()
        given = plain(self.config.default_steps if num_steps is None else num_steps)
        remedy = "give one K or a list of them"
        given = [given] if isinstance(given, int | float | str) else listed("num_steps", given, remedy)
        ks = [integer("num_steps", k, remedy) for k in given]
        if not ks:
            raise UserError("num_steps", [], "there is no K", remedy)
        most = self.config.max_steps if self.config.objective.supports_exits else 1
        for k in ks:
            if not 1 <= k <= most:
                raise UserError(
                    "num_steps",
                    k,
                    f"the checkpoint allows K from 1 to {most} here",
                    f"ask for at most {most}",
                )
        return ks


def load(
    source: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    engine: Callable[[Model], Engine] | None = None,
) -> Model:
    """See rdlm.load."""
    if not isinstance(source, str | os.PathLike) or not str(source):
        raise UserError("source", source, "it is no path", "give a checkpoint folder, or a name on the hub")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(
            "dtype", dtype, "it is no floating point type of torch", "give torch.float32 or torch.bfloat16"
        )
    folder = Path(source)
    if not folder.exists() and HUB_ID.fullmatch(str(source)):
        folder = _imported(str(source))
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        problem, remedy = f"cannot be used ({reason(error)})", "use cpu, or cuda on a machine with one"
        raise UserError("device", str(device), problem, remedy) from None
    return Model(folder, checkpoint.load(folder, device, dtype), engine)


def _imported(name: str) -> Path:
    """A published model of the hub as a checkpoint, imported where that has not been done. UserError."""
    snapshot = local(name)  # its folder is called by the commit
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rdlm"
    out = cache / f"{name.replace('/', '--')}--{snapshot.name[:12]}"
    return out if out.is_dir() else import_checkpoint(str(snapshot), out, name=name.partition("/")[2])


def logits_file(
    folder: Path,
    source: Path,
    out: Path,
    *,
    num_steps: str,
    zero_state: bool,
    seed: int,
    device: str,
    step_sizes: str = "",
) -> str:
    """``rdlm logits``: see rdlm/checkpoints/cli.py. Returns what was written, in words."""
    try:
        ks = [int(part) for part in num_steps.split(",")] if num_steps else None
    except ValueError:
        raise UserError(
            "--num-steps", num_steps, "is not a list of numbers", "write for instance 1,2,4"
        ) from None
    try:
        sizes = [float(part) for part in step_sizes.split(",")] if step_sizes else None
    except ValueError:
        problem = "is not a list of numbers"
        raise UserError("--step-sizes", step_sizes, problem, "write for instance 0.5,0.25,0.25") from None
    check_out_file(out, "--out")
    try:
        given = load_file(source)
    except (OSError, SafetensorError) as error:
        raise UserError(
            "IN", str(source), f"cannot be read ({reason(error)})", "give a safetensors file"
        ) from None
    for name in sorted(given.keys() - {"input_ids", "input_states", "token_type_ids"}):
        raise UserError("IN", name, "is not read", "keep input_ids, input_states and token_type_ids")
    if "input_ids" not in given:
        raise UserError("IN", str(source), "holds no input_ids", "give input_ids [B, T] int64")
    if zero_state and "input_states" in given:
        raise UserError("--zero-state", str(source), "holds input_states", "choose one of both")
    model = load(folder, device)
    options: dict[str, Any] = {
        "states": given.get("input_states"),
        "zero_state": zero_state,
        "token_type_ids": given.get("token_type_ids"),
        "seed": seed,
        "step_sizes": sizes,
    }
    found = {}
    for k, state, ctx in model.steps(given["input_ids"], ks, **options):
        found[f"logits_K{k}"] = model.read_out(state, ctx)
        if model.denoiser.model.has_exit_gate:
            found[f"gate_K{k}"] = model.gate(state)
    save = {name: value.float().contiguous().cpu() for name, value in found.items()}
    try:
        with replacing_file(out, "--out") as temporary:
            save_file(save, temporary)
    except SafetensorError as error:
        remedy = "make room, or name another file"
        raise UserError("--out", str(out), f"cannot be written ({reason(error)})", remedy) from None
    start = (
        " (this model starts from its tokens: --zero-state changes nothing)"
        if zero_state and not model.draws_state
        else ""
    )
    beyond = model.config.depth_warning(max([*(ks or []), len(sizes or []), model.config.default_steps]))
    return f"{', '.join(save)}{start}" + ("" if beyond is None else f". Warning: {beyond}")


def description(folder: Path) -> dict[str, str]:
    """``rdlm inspect``: what a checkpoint is, without reading its weights."""
    config = checkpoint.load_config(folder)
    objective = build(config, device="meta")
    model, count = config.model, sum(p.numel() for p in objective.parameters())
    found = {
        "name": config.name,
        "family": checkpoint.family_of(config),
        "parameters": f"{count:,}",
        **checkpoint.stored_as(config),
        "objective": config.objective.name,
        "K": f"{config.k_description}. Default {config.default_steps}, at most {config.max_steps}",
        "likelihood": config.objective.estimator,
    }
    if config.trained_steps is not None:
        found["trained at"] = f"K up to {config.trained_steps}; beyond it answers may be worse"
    if config.blocks is not None:
        found["blocks"] = f"{config.blocks.num_blocks}" + (
            f", block {config.block} alone" if config.block is not None else ""
        )
    has_tokenizer = (Path(folder) / checkpoint.TOKENIZER).is_dir()
    if not model.is_image:
        found |= _text_description(config, objective)
        found["tokenizer"] = "yes" if has_tokenizer else "none: the model takes ids only"
    commands = [command.replace("THIS_FOLDER", str(folder)) for command in model.commands]
    if not model.is_image and not has_tokenizer:
        commands = [f"rdlm logits {folder} IN.safetensors --out OUT.safetensors"]
    return {**found, "commands": "; ".join(commands)}


def _text_description(config: CheckpointConfig, objective: Objective) -> dict[str, str]:
    layout, backbone = config.model.layout(), objective.model  # type: ignore[union-attr]
    layer, head_dim = layout.layer, layout.layer.head_width(layout.d_model)
    rows = {
        "topology": layout.topology(),
        "layer": f"d_model {layout.d_model}, {layer.num_heads} heads on {layer.num_kv_heads or layer.num_heads} "
        f"key-value heads of {head_dim}, {layer.mlp} {layer.mlp_width}, norms {layer.norms}, q/k norm {layer.qk_norm}",
        "context": f"{layout.max_seq_len} tokens of a vocabulary of {layout.vocab_size}",
    }
    ks = sorted({1, config.default_steps, config.max_steps})
    if backbone.is_causal:
        core, entry = len(backbone.core_cache_layers), 2 * backbone.num_kv_heads * backbone.head_dim * 2
        once = backbone.num_cache_layers - core
        every = ", ".join(f"{entry * (once + k * core):,} at K = {k}" for k in ks)
        rows["cache per token"] = f"shared and first {entry * (once + core):,} bytes in bf16; full {every}"
    costs = costs_of(objective)
    fixed = costs.encode.weights + costs.decode.weights + costs.head
    rows["FLOPs per token"] = (
        ", ".join(f"{fixed + k * costs.core.weights:.3g} at K = {k}" for k in ks) + ", attention scores aside"
    )
    return rows
