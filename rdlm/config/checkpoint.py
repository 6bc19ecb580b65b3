"""What a checkpoint is: a model, an objective, its noise and its partition into blocks, as frozen pydantic
models.

Unknown keys are errors everywhere. This file holds no tensors and no training or serving settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rdlm.config.base import Strict
from rdlm.config.model import ImageConfig, ModelConfig
from rdlm.config.objective import NoiseConfig, ObjectiveConfig, OneStepConfig
from rdlm.errors import UserError
from rdlm.exit_criteria import CRITERIA

SCHEMA_VERSION = 2
"""2: an objective section carries the fields of its own objective alone; version 1 is converted on reading.
"""


class BlocksConfig(Strict):
    """A network cut into blocks that train on their own, each the denoiser of its noise range
    (DiffusionBlocks Sec. 3)."""

    num_blocks: int = Field(ge=1)
    layers_per_block: tuple[int, ...] | None = None
    """Layers of each block, noisiest block first; None splits evenly, earlier blocks take the remainder."""
    partition: Literal["equi_probability", "uniform", "log_uniform", "equal_information", "explicit"] = (
        "equi_probability"
    )
    """How the noise range is cut: equal mass of the objective's noise distribution, equal widths of sigma or
    of log sigma, equal drops of the CE-by-sigma curve, or ``edges``."""
    edges: tuple[float, ...] | None = None
    """explicit: the num_blocks - 1 levels between the blocks, falling."""
    curve: tuple[tuple[float, float], ...] | None = None
    """equal_information: measured (sigma, cross-entropy in nats) pairs, rising in sigma."""
    prior_nats: float | None = Field(None, gt=0)
    """equal_information without a curve: NLL of a next-token model; the curve is then that of an exact
    denoiser."""
    overlap: float = Field(0.1, ge=0, le=1)
    """A block trains on [low / a, high * a] with a = (high / low)^overlap, clipped; the paper takes 0.1 for
    text."""
    targets: Literal["frozen", "own"] = "frozen"
    """Rows that are noised. frozen: unit rows drawn once from ``target_seed``, the same in every block, in no
    block's memory of gradients. own: each block's input embedding, normalised and detached. Objective
    ``masked`` noises none."""
    target_seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _fields_of_the_partition(self) -> BlocksConfig:
        if (self.edges is not None) != (self.partition == "explicit"):
            raise ValueError("edges belong to partition 'explicit', which needs them")
        if (self.curve is not None) + (self.prior_nats is not None) != (
            self.partition == "equal_information"
        ):
            raise ValueError(
                "partition 'equal_information' takes exactly one of curve and prior_nats, the others neither"
            )
        return self


class RecurrenceConfig(Strict):
    """What K means for a checkpoint and which K a user may ask for; server, CLI and reports read it from
    here."""

    default_steps: int = Field(8, ge=1, le=2**20)
    max_steps: int = Field(64, ge=1, le=2**20)
    trained_steps: int | None = Field(None, ge=1)
    """Core steps that training covered: those of 99 of 100 updates of a run here (its export fills it in), the
    published depth of an imported model (its mean where depth was drawn). None: not known."""
    exit_thresholds: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Default thresholds of exit criteria by name, where the checkpoint's source has its own."""

    @field_validator("exit_thresholds")
    @classmethod
    def _of_criteria(cls, thresholds: dict[str, float]) -> dict[str, float]:
        for name in sorted(thresholds.keys() - CRITERIA.keys()):
            raise ValueError(f"there is no exit criterion {name!r}; use {', '.join(CRITERIA)}")
        return thresholds

    @model_validator(mode="after")
    def _ordered(self) -> RecurrenceConfig:
        if self.default_steps > self.max_steps:
            raise ValueError(f"default_steps ({self.default_steps}) exceeds max_steps ({self.max_steps})")
        return self


WeightFormat = Literal["int8", "int4"]


class QuantizationConfig(Strict):
    """How the matrices of a checkpoint are stored (rdlm/nn/quantization.py)."""

    weights: WeightFormat
    """Format of attention and feed-forward layers; the other matrices are int8."""
    group_size: Literal[32, 64, 128] = 32
    """Inputs of an output that share a scale."""


class CheckpointConfig(Strict):
    """The ``config.json`` of a checkpoint folder."""

    schema_version: int = SCHEMA_VERSION
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    """Model name on the server; aliases ``name:kN`` choose K."""
    model: ModelConfig
    objective: ObjectiveConfig = OneStepConfig()
    noise: NoiseConfig = NoiseConfig()
    recurrence: RecurrenceConfig = RecurrenceConfig()
    blocks: BlocksConfig | None = None
    """None: the network is one denoiser of all noise levels."""
    block: int | None = Field(None, ge=0)
    """The one block the folder holds; None = all of them."""
    step: int = Field(0, ge=0)
    """Optimizer steps taken."""
    quantization: QuantizationConfig | None = None
    """None: every weight is stored as a float."""

    @property
    def max_steps(self) -> int:
        """Largest K a user may ask for: 1 where layers run once and nothing is drawn through levels, whatever
        ``recurrence`` says."""
        return 1 if self.runs_once else self.recurrence.max_steps

    @property
    def runs_once(self) -> bool:
        """Whether K is 1 and nothing else: the layers run once, and nothing is drawn through levels."""
        return self.objective.k_meaning == "thinking" and not self.model.iterates

    @property
    def k_description(self) -> str:
        """What K is, in words."""
        if self.runs_once:
            return "K is 1: the layers run once (`rdlm convert` makes such a model recurrent)"
        return self.objective.k_description

    @property
    def trained_steps(self) -> int | None:
        """Core steps that training covered; None where it is not known, or K is a setting of a sampler."""
        trains_depth = self.objective.supports_exits and not self.runs_once
        return self.recurrence.trained_steps if trains_depth else None

    def depth_warning(self, num_steps: int) -> str | None:
        """A sentence where K = num_steps goes beyond what training covered, in ASCII: it may be a header."""
        trained = self.trained_steps
        if trained is None or num_steps <= trained:
            return None
        limit = f"the {trained} core steps that {self.name} was trained with"
        return f"K = {num_steps} exceeds {limit}: answers may be worse"

    @property
    def default_steps(self) -> int:
        """K where none is asked for."""
        return min(self.recurrence.default_steps, self.max_steps)

    @model_validator(mode="before")
    @classmethod
    def _upgraded(cls, data: Any) -> Any:
        """A document of an earlier schema version; its sections convert themselves
        (rdlm/config/objective.py)."""
        version = data.get("schema_version") if isinstance(data, Mapping) else None
        return {**data, "schema_version": SCHEMA_VERSION} if version == 1 else data

    def check_text(self, what: str) -> None:
        """Raises UserError for a model of images."""
        if isinstance(self.model, ImageConfig):
            problem = f"a model of images has no tokens, which {what} needs"
            raise UserError("checkpoint", self.name, problem, f"use {self.model.instead_of_text}")

    def check_family(self, what: str, family: str) -> None:
        """Raises UserError for a model of another family than ``what`` is about."""
        if self.model.family != family:
            problem = f"family {self.model.family!r} is not {family!r}, which {what} is about"
            raise UserError("checkpoint", self.name, problem, f"give a checkpoint of family {family!r}")

    def check_exact(self, what: str) -> None:
        """Raises UserError for a checkpoint of `rdlm quantize`: its weights are not those that were trained."""
        if self.quantization is not None:
            problem = (
                f"its weights are quantised to {self.quantization.weights}, and {what} needs the exact ones"
            )
            raise UserError("checkpoint", self.name, problem, "give the checkpoint that it was made from")

    def check_whole(self) -> None:
        """Raises UserError for a checkpoint that holds one block of a network."""
        if self.block is not None:
            problem = f"it holds block {self.block} alone, not the network"
            raise UserError("checkpoint", self.name, problem, "put the blocks together with `rdlm merge`")

    def check_next_token(self, what: str) -> None:
        """Raises UserError where the model has no next token, which ``what`` needs: masked diffusion fills
        all positions at once."""
        self.check_text(what)
        if not self.objective.left_to_right:
            problem = f"a masked diffusion model has no next token, which {what} needs"
            remedy = (
                "use `rdlm serve`, `rdlm generate`, or `rdlm eval` nll, depth, gen-ppl, mauve and lm-eval"
            )
            raise UserError("checkpoint", self.name, problem, remedy)
