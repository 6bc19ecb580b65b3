"""What a checkpoint is: its objective, its noise and how it is cut, as frozen pydantic models; shapes are in rdlm/config/model.py.

Unknown keys are errors everywhere. This file holds no tensors and no training or serving settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from rdlm.config.base import Strict
from rdlm.config.model import ImageConfig, ModelConfig
from rdlm.errors import UserError

SCHEMA_VERSION = 1


class NoiseConfig(Strict):
    """Variance-exploding noise on unit-norm target embeddings: z = y + sigma * eps (DiffusionBlocks App. C, EDM Table 1)."""

    sigma_min: float = Field(0.002, gt=0)
    """Lowest noise level."""
    sigma_max: float = Field(80.0, gt=0)
    """Highest noise level; here z says nothing about its target."""
    p_mean: float = -1.2
    """Mean of log sigma under the published log-normal training distribution."""
    p_std: float = Field(1.2, gt=0)
    """Standard deviation of log sigma."""
    sigma_data: float = Field(0.5, gt=0)
    """Per-coordinate scale of the clean target in the EDM coefficients; 0.5 is what the paper uses for every family."""

    @model_validator(mode="after")
    def _ordered(self) -> NoiseConfig:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min ({self.sigma_min}) must be below sigma_max ({self.sigma_max})")
        return self


class DepthConfig(Strict):
    """The first dial: how often the core runs in one training step, and how many of those runs carry gradient."""

    distribution: Literal["fixed", "uniform", "lognormal_poisson"] = "fixed"
    """fixed: r = mean always; uniform: r in 1..2*mean-1; lognormal_poisson: r = 1 + Poisson(LogNormal), Geiping et al. 2025."""
    mean: int = Field(1, ge=1, le=256)
    """Mean of r (of r - 1 for lognormal_poisson, as in the Huginn code)."""
    spread: float = Field(0.5, ge=0, le=2)
    """Standard deviation of log rate for lognormal_poisson."""
    max_steps: int = Field(256, ge=1, le=1024)
    """r is clipped here: the tail of the distribution must not exhaust memory."""
    grad_steps: int = Field(1, ge=1, le=256)
    """The last so many runs carry gradient (truncated backpropagation through time); 1 = a single backward pass."""


class CorruptionConfig(Strict):
    """The second dial: which positions see a noised copy of their target, and at which level."""

    share: float = Field(0.0, ge=0, le=1)
    """Probability that a position is noised; the others start from z = 0 and learn the prior (plain next-token) prediction."""
    distribution: Literal["bands", "lognormal"] = "bands"
    """bands: half log-uniform in low_band, half in high_band; lognormal: the published distribution of NoiseConfig."""
    low_band: tuple[float, float] = (0.2, 2.0)
    high_band: tuple[float, float] = (2.0, 80.0)
    per: Literal["position", "sequence"] = "position"
    """Whether each position or each sequence is noised, or not, and draws its level, on its own."""

    @model_validator(mode="after")
    def _bands(self) -> CorruptionConfig:
        for name in ("low_band", "high_band"):
            low, high = getattr(self, name)
            if not 0 < low < high:
                raise ValueError(f"{name} must be two rising positive levels, got {(low, high)}")
        return self


class MaskingConfig(Strict):
    """Tokens that are hidden instead of noised (MD4, Shi et al. 2024): at level t in (0, 1] each one is, with probability t."""

    schedule: Literal["linear"] = "linear"
    """linear: alpha(t) = 1 - t is the probability of staying in sight."""
    t_min: float = Field(1e-3, gt=0, lt=1)
    """Lowest level in training: the weight of a hidden token is 1 / t there."""


PRESETS: dict[str, dict[str, Any]] = {
    "next_token": {"depth": {}, "corruption": {"share": 0.0}, "readout": "plain"},
    "bptt": {
        "depth": {"distribution": "lognormal_poisson", "mean": 32, "grad_steps": 8},
        "corruption": {"share": 0.0},
        "readout": "plain",
    },
    "onestep": {
        "depth": {"distribution": "lognormal_poisson", "mean": 2, "grad_steps": 1},
        "corruption": {"share": 0.0},
        "readout": "plain",
    },
    "evidence": {"depth": {}, "corruption": {"share": 0.75}, "readout": "evidence"},
    "single_pass": {
        "depth": {"distribution": "lognormal_poisson", "mean": 2, "grad_steps": 1},
        "corruption": {"share": 0.25},
        "readout": "evidence",
    },
    "paper": {
        "depth": {},
        "corruption": {"share": 1.0, "distribution": "lognormal", "per": "sequence"},
        "readout": "edm",
    },
    "masked": {"depth": {}, "corruption": {"share": 0.0}, "readout": "plain", "masking": {}},
    "classify": {"depth": {}, "corruption": {"share": 0.0}, "readout": "plain"},
    "forward_forward": {
        "depth": {},
        "corruption": {"share": 0.0},
        "readout": "plain",
        "goodness": "difference",
    },
    "edm": {
        "depth": {},
        "corruption": {"share": 1.0, "distribution": "lognormal", "per": "sequence"},
        "readout": "edm",
        "loss_weighting": "edm",
        "label_dropout": 0.1,
    },
}
"""Where each named objective sits on the dials. ``masked`` has one of its own, ``classify``, ``forward_forward`` and ``edm`` are of images.
``single_pass`` is the default, for the reasons in docs/architecture.md."""

ObjectiveName = Literal[
    "single_pass",
    "onestep",
    "evidence",
    "paper",
    "bptt",
    "next_token",
    "masked",
    "classify",
    "forward_forward",
    "edm",
]


class ObjectiveConfig(Strict):
    """An objective by name; the name sets the dials, and each dial may be overridden."""

    name: ObjectiveName = "single_pass"
    depth: DepthConfig = DepthConfig()
    corruption: CorruptionConfig = CorruptionConfig()
    readout: Literal["plain", "evidence", "edm"] = "plain"
    """plain: logits = W h. evidence: W h + a <E, z> / sigma^2. edm: logits of c_skip z + c_out h (the published form)."""
    loss_weighting: Literal["none", "edm"] = "none"
    """Per-position weight of the loss; edm is w(sigma) of Karras et al. 2022, applied per position."""
    label_dropout: float = Field(0.0, ge=0, lt=1)
    """Objective ``edm``: share of the images whose class is not told, which guidance needs."""
    goodness: Literal["threshold", "difference"] | None = None
    """Of objective ``forward_forward``, which compares a right class with a wrong one: see rdlm/objectives/forward_forward.py."""
    masking: MaskingConfig | None = None
    """Set for objective ``masked`` alone."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        merged: dict[str, Any] = {"name": "single_pass", **data}
        for key, default in PRESETS.get(str(merged["name"]), {}).items():
            given = merged.get(key)
            merged[key] = (
                {**default, **given}
                if isinstance(default, dict) and isinstance(given, Mapping)
                else (given if given is not None else default)
            )
        return merged

    @model_validator(mode="after")
    def _consistent(self) -> ObjectiveConfig:
        noisy, readout = self.corruption.share > 0, self.readout
        if (self.masking is not None) != (self.name == "masked"):
            raise ValueError("masking belongs to objective 'masked', which needs it")
        if self.masking is not None and (noisy or readout != "plain" or self.loss_weighting != "none"):
            raise ValueError(
                "objective 'masked' hides tokens: corruption, readout and loss_weighting are not its dials"
            )
        if noisy and readout == "plain":
            raise ValueError(
                "corruption.share > 0 needs readout 'evidence' or 'edm': a plain read-out ignores the noised target"
            )
        if self.name == "paper" and (readout != "edm" or self.depth.mean != 1):
            raise ValueError(
                "objective 'paper' is one forward pass with the edm read-out; use single_pass or evidence to vary the dials"
            )
        if (readout == "edm") != (self.name in ("paper", "edm")):
            raise ValueError("readout 'edm' belongs to objectives 'paper' and 'edm', which need it")
        if self.name == "edm" and (
            self.depth.mean != 1 or self.corruption.share != 1 or self.corruption.per != "sequence"
        ):
            raise ValueError(
                "objective 'edm' noises every image at one level and runs once: depth and corruption.share are not its dials"
            )
        if self.name in ("classify", "forward_forward") and noisy:
            raise ValueError(f"objective {self.name!r} noises nothing: use paper or evidence")
        if (self.goodness is not None) != (self.name == "forward_forward"):
            raise ValueError("goodness belongs to objective 'forward_forward', which needs it")
        if self.label_dropout and self.name != "edm":
            raise ValueError("label_dropout belongs to objective 'edm'")
        return self

    @property
    def noisy(self) -> bool:
        """True when the model is told a level."""
        return self.corruption.share > 0 or self.masking is not None

    @property
    def k_meaning(self) -> Literal["thinking", "sampling"]:
        """thinking: K core iterations, then one read-out. sampling: K levels of noise or masking, a read-out at each."""
        fixed_single = self.depth.distribution == "fixed" and self.depth.mean == 1
        return "sampling" if fixed_single and self.noisy else "thinking"


class BlocksConfig(Strict):
    """A network cut into blocks that train on their own, each the denoiser of its noise range (DiffusionBlocks Sec. 3)."""

    num_blocks: int = Field(ge=1)
    layers_per_block: tuple[int, ...] | None = None
    """Layers of each block, noisiest block first; None splits evenly, earlier blocks take the remainder."""
    partition: Literal["equi_probability", "uniform", "log_uniform", "equal_information", "explicit"] = (
        "equi_probability"
    )
    """How the noise range is cut: equal mass of the objective's noise distribution, equal widths of sigma or of log sigma, equal
    drops of the CE-by-sigma curve, or ``edges``."""
    edges: tuple[float, ...] | None = None
    """explicit: the num_blocks - 1 levels between the blocks, falling."""
    curve: tuple[tuple[float, float], ...] | None = None
    """equal_information: measured (sigma, cross-entropy in nats) pairs, rising in sigma."""
    prior_nats: float | None = Field(None, gt=0)
    """equal_information without a curve: NLL of a next-token model; the curve is then that of an exact denoiser."""
    overlap: float = Field(0.1, ge=0, le=1)
    """A block trains on [low / a, high * a] with a = (high / low)^overlap, clipped; the paper takes 0.1 for text."""
    targets: Literal["frozen", "own"] = "frozen"
    """Rows that are noised. frozen: unit rows drawn once from ``target_seed``, the same in every block, in no block's memory of
    gradients. own: each block's input embedding, normalised and detached. Objective ``masked`` noises none."""
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
    """What K means for a checkpoint and which K a user may ask for; server, CLI and reports read it from here."""

    default_steps: int = Field(8, ge=1)
    max_steps: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> RecurrenceConfig:
        if self.default_steps > self.max_steps:
            raise ValueError(f"default_steps ({self.default_steps}) exceeds max_steps ({self.max_steps})")
        return self


class CheckpointConfig(Strict):
    """The ``config.json`` of a checkpoint folder."""

    schema_version: int = SCHEMA_VERSION
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    """Model name on the server; aliases ``name:kN`` choose K."""
    model: ModelConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    noise: NoiseConfig = NoiseConfig()
    recurrence: RecurrenceConfig = RecurrenceConfig()
    blocks: BlocksConfig | None = None
    """None: the network is one denoiser of all noise levels."""
    block: int | None = Field(None, ge=0)
    """The one block the folder holds; None = all of them."""
    step: int = Field(0, ge=0)
    """Optimizer steps taken."""

    @property
    def max_steps(self) -> int:
        """Largest K a user may ask for: 1 where layers run once and nothing is drawn through levels, whatever ``recurrence`` says."""
        runs_once = self.objective.k_meaning == "thinking" and not self.model.iterates
        return 1 if runs_once else self.recurrence.max_steps

    @property
    def default_steps(self) -> int:
        """K where none is asked for."""
        return min(self.recurrence.default_steps, self.max_steps)

    @property
    def estimator(self) -> str:
        """Which of the model's token likelihoods is normalised: see rdlm/scoring.py."""
        if self.objective.name == "edm":
            return "none: it denoises images"
        if self.objective.masking is not None:
            return "normalised: one token a step, from left to right"
        if self.objective.goodness is not None:
            return "softmax of goodness over classes: normalised, not calibrated"
        return (
            "logits after K iterations"
            if self.objective.k_meaning == "thinking"
            else "logits at sigma_max with z = 0 (K = 1)"
        )

    def check_text(self, what: str) -> None:
        """Raises UserError for a model of images."""
        if isinstance(self.model, ImageConfig):
            problem = f"a model of images has no tokens, which {what} needs"
            remedy = (
                "use `rdlm eval accuracy`"
                if self.model.family == "vit"
                else "use `rdlm images` or `rdlm eval fid`"
            )
            raise UserError("checkpoint", self.name, problem, remedy)

    def check_family(self, what: str, family: str) -> None:
        """Raises UserError for a model of another family than ``what`` is about."""
        if self.model.family != family:
            problem = f"family {self.model.family!r} is not {family!r}, which {what} is about"
            raise UserError("checkpoint", self.name, problem, f"give a checkpoint of family {family!r}")

    def check_whole(self) -> None:
        """Raises UserError for a checkpoint that holds one block of a network."""
        if self.block is not None:
            problem = f"it holds block {self.block} alone, not the network"
            raise UserError("checkpoint", self.name, problem, "put the blocks together with `rdlm merge`")

    def check_next_token(self, what: str) -> None:
        """Raises UserError where the model has no next token, which ``what`` needs: masked diffusion fills all positions at once."""
        self.check_text(what)
        if self.objective.masking is not None:
            problem = f"a masked diffusion model has no next token, which {what} needs"
            remedy = (
                "use `rdlm serve`, `rdlm generate`, or `rdlm eval` nll, depth, gen-ppl, mauve and lm-eval"
            )
            raise UserError("checkpoint", self.name, problem, remedy)
