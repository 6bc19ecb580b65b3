"""The config of one training run, as one class a section. How a file becomes one, and what no section can
check alone, is in train/config_file.py. No torch here."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from rdlm.config.base import Strict
from rdlm.config.checkpoint import BlocksConfig, CheckpointConfig, ModelConfig, RecurrenceConfig
from rdlm.config.objective import NoiseConfig, ObjectiveConfig, OneStepConfig, objective_config
from rdlm.errors import UserError


def _expanded(path: Any) -> Any:
    """``~`` and ``$NAME`` in a path stand for what the shell would put there."""
    if not isinstance(path, str):
        return path
    found = os.path.expandvars(os.path.expanduser(path))
    unset = re.search(r"\$\w+|\$\{[^}]*\}", found)
    if unset is not None:
        raise ValueError(f"the environment variable {unset[0]} is not set")
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", found) is not None:
        raise ValueError("a path holds no control characters")
    if any(len(part.encode()) > 255 for part in found.split("/")):
        raise ValueError("a name in a path has at most 255 bytes")
    return found


FolderPath = Annotated[str, BeforeValidator(_expanded), Field(min_length=1)]


Packing = Literal["windows", "documents"]
"""How documents become rows. windows: consecutive windows of all tokens, across the ends of documents.
documents: whole documents, as many as fit into a row, that do not see each other; positions count from the
start of each."""


class BaseDataConfig(Strict):
    """What every kind of training data says of itself."""

    unit: ClassVar[str] = "token"
    """What a position of a row is."""
    of_images: ClassVar[bool] = False

    @property
    def folder(self) -> str:
        """The one prepared folder that rows come from, "" where there is none."""
        return ""

    @property
    def separates_documents(self) -> bool:
        """Whether rows hold documents that do not see each other."""
        return False

    def row_length(self, fills_in: bool) -> int:
        """Positions of a row. fills_in: whether the model fills in masked tokens of whole rows."""
        return self.seq_len  # type: ignore[attr-defined]


class TokensConfig(BaseDataConfig):
    """Prepared shards of ``rdlm data prepare``."""

    kind: Literal["tokens"] = "tokens"
    path: FolderPath
    seq_len: int = Field(ge=2)
    packing: Packing = "windows"

    @property
    def folder(self) -> str:
        return self.path

    @property
    def separates_documents(self) -> bool:
        return self.packing == "documents"


class MixturePart(Strict):
    """Prepared shards, and their weight against the other parts."""

    path: FolderPath
    weight: float = Field(1.0, gt=0)


class MixtureConfig(BaseDataConfig):
    """Several folders of prepared shards with one tokenizer: rows come from each in proportion to its weight."""

    kind: Literal["mixture"] = "mixture"
    parts: tuple[MixturePart, ...] = Field(min_length=1)
    seq_len: int = Field(ge=2)
    packing: Packing = "windows"

    @property
    def separates_documents(self) -> bool:
        return self.packing == "documents"


class TaskConfig(BaseDataConfig):
    """A generated task. ``seq_len`` is the length of a row of the task itself, ``filled_in_len`` that of a row of
    ``rdlm.data.synthetic.FilledIn``."""

    def row_length(self, fills_in: bool) -> int:
        return self.filled_in_len if fills_in else super().row_length(fills_in)  # type: ignore[attr-defined]


class GroupProductConfig(TaskConfig):
    """Running product in a finite group: a task that needs serial steps."""

    kind: Literal["group_product"] = "group_product"
    group: str
    length: int = Field(ge=2)
    """Positions of a sequence."""

    @property
    def seq_len(self) -> int:
        return self.length

    @property
    def filled_in_len(self) -> int:
        return 2 * self.length


class PointerChasingConfig(TaskConfig):
    """Following a table of pointers, one hop further at every position."""

    kind: Literal["pointer_chasing"] = "pointer_chasing"
    nodes: int = Field(ge=2)
    hops: int = Field(ge=1)

    @property
    def seq_len(self) -> int:
        return self.nodes + self.hops

    @property
    def filled_in_len(self) -> int:
        return self.nodes + 2 * self.hops


class LatinSquareConfig(TaskConfig):
    """Completing Latin squares, whose answers depend on each other."""

    kind: Literal["latin_square"] = "latin_square"
    side: int = Field(ge=2)
    fewest_blanks: int = Field(ge=1)
    most_blanks: int = Field(ge=1)

    @property
    def seq_len(self) -> int:
        return 2 * self.side**2

    @property
    def filled_in_len(self) -> int:
        return self.side**2


class ImagesConfig(BaseDataConfig):
    """Prepared images of ``rdlm data images``."""

    unit = "image"
    of_images = True
    kind: Literal["images"] = "images"
    path: FolderPath
    augment: Literal["none", "flip", "flip_crop"] = "flip"
    """flip: mirrored with probability 1/2. flip_crop: then moved by up to 4 pixels within its reflection."""

    @property
    def seq_len(self) -> int:
        """Targets of a row: its class."""
        return 1

    @property
    def folder(self) -> str:
        return self.path


GeneratedConfig = GroupProductConfig | PointerChasingConfig | LatinSquareConfig
DataConfig = Annotated[
    TokensConfig | MixtureConfig | ImagesConfig | GeneratedConfig, Field(discriminator="kind")
]


class BatchConfig(Strict):
    """Sequences per update, over all processes, and per forward pass of one process."""

    global_size: int = Field(ge=1, le=2**24)
    micro_size: int | None = Field(None, ge=1)
    """None: global_size / processes, no gradient accumulation."""

    def accumulation(self, world: int) -> tuple[int, int]:
        """(micro_size, forward passes per update and process); raises UserError where the sizes do not
        divide."""
        if self.global_size % world:
            raise UserError(
                "batch.global_size",
                self.global_size,
                f"not a multiple of {world} processes",
                "change it or --num-procs",
            )
        share = self.global_size // world
        micro = self.micro_size or share
        if share % micro:
            raise UserError(
                "batch.micro_size",
                micro,
                f"does not divide the {share} sequences of each of {world} processes",
                f"use a divisor of {share}",
            )
        return micro, share // micro


class OptimizerConfig(Strict):
    """Weight decay acts on the matrices of linear layers only: never on norms, biases, scalars or token
    tables."""

    name: str = "adamw"
    """See OPTIMIZERS in train/optim.py."""
    lr: float = Field(gt=0, le=1e30)
    betas: tuple[float, float] = (0.9, 0.95)
    """Betas of AdamW; with muon, of what it does not move."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Momentum of muon."""
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, le=1e6)
    grad_clip: float = Field(1.0, ge=0)
    """Bound of the global gradient norm; 0 = no clipping."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that do not move, and whose gradients count for nothing: ``model.prelude.*``. A
    pattern stands for the names that it matches and for everything below them. Of a network in blocks the
    names are those within a block."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor of the learning rate from a layer to the one before it: the last layer and what follows it have the
    full rate, the embedding the smallest (Clark et al. 2020, ELECTRA). Times ``lr_factors``."""
    lr_factors: dict[str, Annotated[float, Field(gt=0, le=1e6)]] = {}
    """Pattern -> factor of the learning rate: ``{"model.adapter": 10}``. Of several that match a parameter
    the last one counts."""

    @model_validator(mode="after")
    def _of_muon(self) -> OptimizerConfig:
        if self.momentum != 0.95 and self.name != "muon":
            raise ValueError(f"momentum belongs to optimizer 'muon', this is {self.name!r}; drop it")
        return self

    @field_validator("betas")
    @classmethod
    def _betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("both betas must lie in [0, 1)")
        return betas


class EmaConfig(Strict):
    """An exponential moving average of the weights, beside them in the optimizer's state (train/ema.py)."""

    decay: float = Field(0.999, gt=0, lt=1)
    """Decay of an update; in the first ones at most (1 + n) / (10 + n)."""
    export: bool = True
    """Whether ``model/`` holds the averages; `rdlm export RUN OUT --ema` and `--no-ema` choose."""


class LoraConfig(Strict):
    """Low-rank adapters on linear layers, which train in the place of the weights (train/lora.py)."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    """What an adapter adds is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of what enters an adapter."""
    targets: tuple[str, ...] = Field(("*.attn.Wqkv", "*.attn.proj", "*.mlp.fc", "*.mlp.proj"), min_length=1)
    """Patterns of linear layers."""
    also_train: tuple[str, ...] = ()
    """Patterns of other parameters that move, as a whole: ``model.adapter``, the new injection of a converted
    model."""


class ScheduleConfig(Strict):
    """Learning rate over the run: see SCHEDULES in train/trainer.py."""

    kind: Literal["cosine", "trapezoid", "constant"] = "cosine"
    steps: int = Field(ge=1, le=2**40)
    """Updates of the whole run."""
    warmup_steps: int = Field(0, ge=0)
    cooldown_steps: int = Field(0, ge=0)
    """trapezoid only."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _fits(self) -> ScheduleConfig:
        if self.warmup_steps + self.cooldown_steps > self.steps:
            raise ValueError(f"warmup_steps + cooldown_steps exceed steps ({self.steps})")
        if bool(self.cooldown_steps) != (self.kind == "trapezoid"):
            problem = "needs cooldown_steps; use constant for a rate that stays"
            if self.cooldown_steps:
                problem = "has no cooldown_steps; use trapezoid or drop them"
            raise ValueError(f"kind {self.kind!r} {problem}")
        return self


class DeepSpeedConfig(Strict):
    """Which of optimizer state, gradients and weights are split over processes or kept in host memory."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_param: Literal["none", "cpu"] = "none"
    bucket_elements: int = Field(50_000_000, ge=2, le=2**40, multiple_of=2)
    """Elements reduced or gathered in one message."""
    overlap_comm: bool | None = None
    """Send gradients while the backward pass computes, on a stream of their own. None: at stage 3 alone, where
    weights are gathered so; at stages 1 and 2 it changes the order of additions between runs."""
    communication_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision in which gradients are sent. auto is DeepSpeed's choice, the precision of the weights."""
    live_elements: int | None = Field(None, ge=1)
    """ZeRO 3: most elements of gathered weights in memory; a small bound gathers more often. None:
    DeepSpeed's 1,000 million."""

    @model_validator(mode="after")
    def _possible(self) -> DeepSpeedConfig:
        if self.offload_optimizer == "cpu" and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_param == "cpu" and self.zero_stage != 3:
            raise ValueError("offload_param needs zero_stage 3")
        if self.live_elements is not None and self.zero_stage != 3:
            raise ValueError("live_elements needs zero_stage 3")
        return self


class ResidentConfig(Strict):
    """One block on the device at a time: parameters, gradients and optimizer states of inactive blocks are
    moved off it."""

    visit_steps: int = Field(100, ge=1)
    """Updates a block makes in a row. Moving blocks takes a share of the time that falls as visits get
    longer."""
    rest: Literal["disk", "host"] = "disk"
    """Where inactive blocks are kept: on the disk of ``output``, or in host memory (with GPUs)."""


class CheckpointingConfig(Strict):
    interval_steps: int = Field(500, ge=1)
    """A checkpoint every so many updates, besides one on SIGTERM and one at the end."""
    keep: int = Field(2, ge=1)
    """Newest complete checkpoints that stay."""
    keep_best: bool = False
    """Also save after a held-out evaluation that is the best so far, and keep that checkpoint."""


class NonfiniteConfig(Strict):
    """What to do about an update whose loss or gradient is not finite. Such an update never changes the
    weights."""

    action: Literal["skip", "stop", "rollback"] = "skip"
    """skip: go on with the next batch. stop: end the run. rollback: go back to the last checkpoint and pass
    over the batches since."""
    limit: int = Field(10, ge=0)
    """skip: the run ends after more non-finite updates in a row than this. rollback: after more rollbacks
    than this since the last checkpoint."""


class EvaluationConfig(Strict):
    interval_steps: int = Field(0, ge=0)
    """Held-out NLL every so many updates and at the end; 0 = never."""
    steps: tuple[int, ...] = (1, 4, 16)
    """Values of K; where they are left out, those of 1, 4 and 16 that the model takes."""
    max_tokens: int = Field(16_384, ge=1)

    @field_validator("steps")
    @classmethod
    def _steps(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if not steps or min(steps) < 1:
            raise ValueError("needs at least one K, each 1 or more")
        return steps


class SamplesConfig(Strict):
    """Texts that the model writes while it is trained, in ``samples.md`` and TensorBoard."""

    interval_steps: int = Field(0, ge=0)
    """Every so many updates and at the end; 0 = never."""
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    num_steps: tuple[int, ...] = (1, 4, 16)
    """Values of K; where they are left out, those of 1, 4 and 16 that the model takes."""
    max_tokens: int = Field(48, ge=1)
    """Tokens of a text after its prompt."""

    @model_validator(mode="after")
    def _complete(self) -> SamplesConfig:
        if self.interval_steps and not self.prompts:
            raise ValueError("samples need at least one of prompts")
        if not self.num_steps or min(self.num_steps) < 1:
            raise ValueError("num_steps needs at least one K, each 1 or more")
        return self


class WandbConfig(Strict):
    """Weights & Biases; WANDB_MODE=offline writes files alone, to be sent later with `wandb sync`."""

    project: str = Field(min_length=1)
    entity: str | None = None


class ProfileConfig(Strict):
    """A trace of some updates by torch's profiler, of each process, in ``output/profile``."""

    start: int = Field(ge=0)
    """The first update that is recorded; two before it warm the profiler up."""
    steps: int = Field(3, ge=1, le=100)
    """Updates that are recorded."""


class LogConfig(Strict):
    interval_steps: int = Field(1, ge=1)
    tensorboard: bool = True
    wandb: WandbConfig | None = None
    """Send every record to Weights & Biases as well (package wandb)."""
    gradient_noise: bool = False
    """Estimate the gradient noise scale from AdamW's moments, in sequences; reads them at every record."""


class TrainConfig(Strict):
    """One training run."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    output: FolderPath
    """Folder of checkpoints, logs, metrics and the exported model."""
    init_from: FolderPath | None = None
    """A checkpoint folder (``model/`` of a run, an imported or a converted one) whose weights the run starts
    from, with a new optimizer. The section model may then be left out, or hold single fields to change: the rest
    is the checkpoint's."""
    init_map: dict[str, Annotated[str, Field(min_length=1)]] = {}
    """Where names or shapes differ from those of ``init_from``: pattern of names -> ``skip`` (of the model: initialised
    anew; of the checkpoint: left out), ``overlap`` (rows and columns that both have, from the first on; the rest is
    initialised anew), or the name in the checkpoint of the weight, or the part, that takes this place. Of several
    patterns that match the last one counts."""
    branch_from: FolderPath | None = None
    """A training checkpoint, or a run (its newest one), that this run goes on from, with its optimizer, step and
    data: another decay of the learning rate, for instance. Its own output folder stays as it is."""
    allow_changes: bool = False
    """Resume although fields have changed that decide what is learned. `rdlm train --allow-changes` sets it.
    """
    seed: int = Field(0, ge=0, lt=2**31)
    model: ModelConfig
    objective: ObjectiveConfig = OneStepConfig()
    noise: NoiseConfig = NoiseConfig()
    recurrence: RecurrenceConfig = RecurrenceConfig()
    blocks: BlocksConfig | None = None
    """How the network is cut into blocks that train on their own; None: it is not."""
    block: int | None = Field(None, ge=0)
    """Train this block alone, in ``output/block_<n>``; None trains all of them, one per update. `rdlm train
    --block` sets it."""
    resident: ResidentConfig | None = None
    """Keep one block on the device at a time; None keeps all of them there."""
    data: DataConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    ema: EmaConfig | None = None
    """Average the weights over updates; None: they are not."""
    lora: LoraConfig | None = None
    """Train adapters instead of the weights of ``init_from``; None: the weights."""
    schedule: ScheduleConfig
    precision: Literal["bf16", "fp32"] = "bf16"
    """A config file may say ``auto``: bf16 where the device computes in it, else fp32."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass."""
    compile: Literal["off", "layers", "blocks"] = "off"
    """layers: run transformer layers through torch.compile. It needs a C++ compiler on a CPU, and Triton on a
    GPU; results differ by rounding. blocks is its former name."""
    noise_source: Literal["generator", "counter"] = "generator"
    """What makes the noise of targets and random states. generator: torch's generator on one CPU thread, as in all
    runs without this field. counter: a hash, computed on the device, with a fixed number of noised positions in a
    micro-batch: for GPUs, which would wait for the CPU."""
    deterministic: bool = False
    """On GPUs: deterministic kernels, which bit-exact resuming needs there and which cost time. CPUs need no
    switch."""
    nonfinite: NonfiniteConfig = NonfiniteConfig()
    checkpoint: CheckpointingConfig = CheckpointingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    samples: SamplesConfig = SamplesConfig()
    log: LogConfig = LogConfig()
    profile: ProfileConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _noise_conditioning(cls, data: Any) -> Any:
        """A noisy objective needs a noise-conditioned model: fill it in where the user left it open."""
        if (
            not isinstance(data, dict)
            or not isinstance(data.get("model"), dict)
            or "noise_conditioning" in data["model"]
        ):
            return data
        try:
            noisy = objective_config.validate_python(data.get("objective", {})).noise_conditioned
        except ValidationError:
            return data  # the field's own validation reports it
        return {**data, "model": {**data["model"], "noise_conditioning": noisy}}

    @property
    def fills_in(self) -> bool:
        """Whether the model fills in hidden tokens: inputs and answers of a task then share a row."""
        return self.objective.fills_in

    @property
    def seq_len(self) -> int:
        """Positions of a row."""
        return self.data.row_length(self.fills_in)

    @property
    def checkpoint_config(self) -> CheckpointConfig:
        """The part that describes the trained model; ``step`` is 0."""
        return CheckpointConfig(
            name=self.name, model=self.model, objective=self.objective, noise=self.noise, recurrence=self.recurrence,
            blocks=self.blocks, block=self.block,
        )  # fmt: skip
