"""The config of one training run: a YAML file plus ``key.sub=value`` overrides, checked before anything
starts. No torch here."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from rdlm.config.base import Strict, parse
from rdlm.config.checkpoint import BlocksConfig, CheckpointConfig, ModelConfig, RecurrenceConfig
from rdlm.config.objective import NoiseConfig, ObjectiveConfig, OneStepConfig, objective_config
from rdlm.errors import UserError, reason


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
    """Of AdamW; with muon, of what it does not move."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Of muon."""
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
    """Of an update; in the first ones at most (1 + n) / (10 + n)."""
    export: bool = True
    """Whether ``model/`` holds the averages; `rdlm export RUN OUT --ema` and `--no-ema` choose."""


class LoraConfig(Strict):
    """Low-rank adapters on linear layers, which train in the place of the weights (train/lora.py)."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    """What an adapter adds is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of what enters an adapter."""
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
            told = "needs cooldown_steps; use constant for a rate that stays"
            if self.cooldown_steps:
                told = "has no cooldown_steps; use trapezoid or drop them"
            raise ValueError(f"kind {self.kind!r} {told}")
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
    """In which gradients are sent. auto is DeepSpeed's choice, the precision of the weights."""
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
    """Of a text, after its prompt."""

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


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML 1.2 file holds; raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        remedy = "give the path of a YAML file, see configs/"
        raise UserError("CONFIG", str(path), error.strerror or "cannot be read", remedy) from None
    except UnicodeDecodeError as error:
        raise UserError("CONFIG", str(path), f"is not YAML: {error}", "save it as UTF-8 text") from None
    data = _parsed(text, "CONFIG", str(path))
    if not isinstance(data, dict):
        raise UserError("CONFIG", str(path), "holds no mapping", "see configs/ for examples")
    return data


def changed(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The same mapping after ``key.sub=value`` overrides (values are YAML); raises UserError."""
    for override in overrides:
        _apply(data, override)
    return data


def load(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML 1.2 file, apply ``key.sub=value`` overrides, check the whole; raises UserError."""
    data = read_yaml(path)
    for override in overrides:
        if override.startswith("init_from="):  # before the others, which may change the model that it brings
            _apply(data, override)
    given = data.get("model", {})
    if isinstance(data.get("init_from"), str) and isinstance(given, dict) and "family" not in given:
        data["model"] = _merged(_model_of(parse(FolderPath, data["init_from"], "init_from")), given)
    changed(data, overrides)
    if data.get("precision") == "auto":
        data["precision"] = native_precision()
    config: TrainConfig = parse(TrainConfig, data, f"{path} or in an override" if overrides else str(path))
    _check(config)
    config = _within_depth(config)
    return (
        config
        if config.block is None
        else config.model_copy(update={"output": str(block_folder(config, config.block))})
    )


_STEPS = (("evaluation", "steps"), ("samples", "num_steps"))
"""Section and field that list values of K."""


def _steps_given(config: TrainConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The values of K that the user wrote and that will be used, with the name of the field."""
    for section, field in _STEPS:
        settings = getattr(config, section)
        if settings.interval_steps and field in settings.model_fields_set:
            yield f"{section}.{field}", getattr(settings, field)


def _within_depth(config: TrainConfig) -> TrainConfig:
    """The config without those default values of K that the run cannot take."""
    most = 1 if config.resident is not None else config.checkpoint_config.max_steps
    kept: dict[str, Any] = {}
    for section, field in _STEPS:
        settings = getattr(config, section)
        if field not in settings.model_fields_set:
            steps = tuple(k for k in getattr(settings, field) if k <= most)
            kept[section] = settings.model_copy(update={field: steps})
    return config.model_copy(update=kept)


def native_precision() -> str:
    """bf16 where the GPU, or without one the CPU, computes in it; else fp32. CPUs without it emulate bf16, many
    times slower."""
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return "fp32"
    return "bf16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags) else "fp32"


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections of ``below`` with the fields of ``above`` put in."""
    found = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = _merged(found[key], value) if both else value
    return found


def _model_of(source: str) -> dict[str, Any]:
    """The section model of a checkpoint folder, a run or a training checkpoint, without what follows from the
    objective."""
    for file in ("model/config.json", "config.json", "train_config.json", "manifest.json"):
        try:
            found = json.loads((Path(source) / file).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, RecursionError) as error:
            problem = f"its {file} cannot be read ({reason(error)})"
            raise UserError("init_from", source, problem, "give a complete checkpoint folder") from None
        found = found.get("config", found) if isinstance(found, dict) else {}
        if isinstance(found, dict) and isinstance(found.get("model"), dict):
            return {key: value for key, value in found["model"].items() if key != "noise_conditioning"}
        problem = f"its {file} is not that of a checkpoint of rdlm"
        raise UserError("init_from", source, problem, f"turn it into one: `rdlm import {source} OUT`")
    raise UserError("init_from", source, "is not a checkpoint folder", "give one, or write the section model")


def _parsed(text: str, field: str, value: str) -> Any:
    """The value of a YAML document. UserError where it has none, with the line and what is wrong there."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except RecursionError:
        raise UserError(field, value, "is not YAML: nested too deeply", "correct it") from None
    except (
        Exception
    ) as error:  # the parser raises more than its own errors: ValueError, TypeError, AttributeError
        problem = str(error)
        if isinstance(error, MarkedYAMLError):
            line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
            problem = f"{line}{error.problem or error.context}"
        raise UserError(field, value, f"is not YAML: {' '.join(problem.split())}", "correct it") from None


@contextmanager
def written_checked(config: TrainConfig) -> Iterator[Path]:
    """A JSON file in the output folder that holds a checked config for the processes of its run."""
    path = Path(config.output) / f".config-{os.getpid()}.json"
    path.write_text(config.model_dump_json(), encoding="utf-8")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def read_checked(path: Path) -> TrainConfig:
    """The config of ``written_checked``: nothing is checked again."""
    return TrainConfig.model_validate_json(path.read_text(encoding="utf-8"))


def block_folder(config: TrainConfig, block: int) -> Path:
    """Where the run of one block lies in the output folder of the whole."""
    return Path(config.output) / f"block_{block}"


def _check(config: TrainConfig) -> None:
    """What no section can see alone."""
    conditioned, objective = config.model.noise_conditioning, config.objective
    if conditioned != objective.noise_conditioned:
        problem = (
            f"objective {objective.name!r} {'noises' if objective.noise_conditioned else 'does not noise'} its "
            f"targets"
        )
        raise UserError(
            "model.noise_conditioning", conditioned, problem, "drop the field: it follows the objective"
        )
    if config.data.separates_documents and not objective.separates_documents:
        problem = f"objective {objective.name!r} cannot keep the documents of a row apart"
        raise UserError("data.packing", "documents", problem, "set data.packing=windows")
    of_images = config.model.is_image
    if of_images != config.data.of_images:
        problem = f"family {config.model.family!r} learns from {'images' if of_images else 'rows of ids'}"
        raise UserError(
            "data.kind",
            config.data.kind,
            problem,
            "use images" if of_images else "use tokens or a generated task",
        )
    depth = objective.depth_in_training
    window = 1 if depth.grad_steps == "all" else depth.grad_steps
    most = {"fixed": depth.mean, "uniform": 2 * depth.mean - 1}.get(depth.distribution, depth.max_steps)
    if depth.mean > depth.max_steps:
        problem = f"exceeds objective.depth.max_steps ({depth.max_steps}), where r is clipped"
        raise UserError("objective.depth.mean", depth.mean, problem, "lower it or raise max_steps")
    if window > most:
        problem = f"r is never above {most}"
        raise UserError("objective.depth.grad_steps", window, problem, f"use at most {most}, or all")
    if config.seq_len > config.model.max_seq_len:
        problem = f"longer than model.max_seq_len ({config.model.max_seq_len})"
        raise UserError(
            "data.seq_len", config.seq_len, problem, "shorten the sequences or raise model.max_seq_len"
        )
    for field, asked in _steps_given(config):
        beyond = [k for k in asked if k > config.checkpoint_config.max_steps]
        if not beyond:
            continue
        problem, remedy = (
            f"exceeds recurrence.max_steps ({config.recurrence.max_steps})",
            "use smaller K or raise recurrence.max_steps",
        )
        if objective.supports_exits and not config.model.iterates:
            problem, remedy = (
                f"with objective {objective.name!r} this model runs its layers once",
                f"set {field}=[1]",
            )
        raise UserError(field, beyond[0], problem, remedy)
    if config.branch_from is not None and config.init_from is not None:
        problem = "branch_from brings the weights, and their optimizer"
        raise UserError("init_from", config.init_from, problem, "drop one of the two")
    if config.init_map and config.init_from is None:
        problem, remedy = "says where weights of init_from go", "set init_from, or drop init_map"
        raise UserError("init_map", next(iter(config.init_map)), problem, remedy)
    if config.lora is not None and config.init_from is None and config.branch_from is None:
        problem, remedy = "adapters change a trained network", "set init_from, or drop the section lora"
        raise UserError("lora", config.lora.rank, problem, remedy)
    if config.resident is not None:
        _check_resident(config, config.resident)


def _check_resident(config: TrainConfig, resident: ResidentConfig) -> None:
    count = 1 if config.blocks is None else config.blocks.num_blocks
    if count == 1:
        given = None if config.blocks is None else config.blocks.num_blocks
        raise UserError(
            "blocks.num_blocks",
            given,
            "resident training needs several blocks",
            "raise it, or drop the section resident",
        )
    if config.block is not None:
        raise UserError(
            "block",
            config.block,
            "a block that is trained alone is always on the device",
            "drop the section resident",
        )
    if resident.visit_steps * count > config.schedule.steps:
        problem = f"with {count} blocks some would not be visited in {config.schedule.steps} steps"
        remedy = f"use at most {config.schedule.steps // count}"
        raise UserError("resident.visit_steps", resident.visit_steps, problem, remedy)
    for field, asked in _steps_given(config):
        several = [k for k in asked if k > 1]
        if several:
            problem = "K > 1 runs several blocks for every token, and one block is on the device"
            remedy = f"set {field}=[1]; rdlm eval and rdlm generate take any K afterwards"
            raise UserError(field, several[0], problem, remedy)


def _apply(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise UserError("override", override, "is not key.sub=value", "write for example optimizer.lr=0.001")
    value = _parsed(text, key, text)
    *parents, last = key.split(".")
    for parent in parents:
        below = data.setdefault(parent, {})
        if parent == "objective" and isinstance(below, str):  # short for its name
            below = data[parent] = {"name": below}
        data = below
        if not isinstance(data, dict):
            raise UserError(key, text, f"{parent} holds a value, not a section", "correct the key")
    data[last] = value
