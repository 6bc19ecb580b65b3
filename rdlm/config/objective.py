"""What a network is trained to do, as one config class an objective. Each names the class in rdlm/objectives
that does it; ``ObjectiveConfig`` at the end lists them all.

A config names its objective (``name``) and carries the fields of that objective alone. Facts about an
objective that need no tensors (what K means, whether it decodes from left to right) are properties here,
because the server and the command line read them. This file imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, TypeAdapter, field_validator, model_validator

from rdlm.config.base import Strict

KMeaning = Literal["thinking", "sampling"]


class NoiseConfig(Strict):
    """Variance-exploding noise on unit-norm targets: z = y + sigma * eps (DiffusionBlocks App. C, EDM Table
    1)."""

    sigma_min: float = Field(0.002, gt=0)
    """Lowest noise level."""
    sigma_max: float = Field(80.0, gt=0)
    """Highest noise level, at which z carries no information about its target."""
    p_mean: float = -1.2
    """Mean of log sigma under the published log-normal training distribution."""
    p_std: float = Field(1.2, gt=0)
    """Standard deviation of log sigma."""
    sigma_data: float = Field(0.5, gt=0, le=1e6)
    """Per-coordinate scale of the clean target in the EDM coefficients; 0.5 is what the paper uses for every
    family."""

    @model_validator(mode="after")
    def _ordered(self) -> NoiseConfig:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min ({self.sigma_min}) must be below sigma_max ({self.sigma_max})")
        return self


class CurriculumConfig(Strict):
    """The mean of r rises over the first updates of a run."""

    kind: Literal["linear", "one_minus_sqrt", "geometric"] = "linear"
    """See CURRICULA in rdlm/objectives/depth.py."""
    start: int = Field(1, ge=1)
    """Mean in the first update."""
    updates: int = Field(ge=1)
    """Updates until the mean is ``depth.mean``."""


class DepthConfig(Strict):
    """How often the core runs in one update (r), and how many of these runs record gradient."""

    distribution: Literal["fixed", "uniform", "poisson", "lognormal_poisson"] = "fixed"
    """fixed: r = mean. uniform: r in 1..2*mean-1. poisson: r = 1 + Poisson(mean - 1). lognormal_poisson: r =
    1 + Poisson(LogNormal) (Geiping et al. 2025). See DISTRIBUTIONS in rdlm/objectives/depth.py."""
    per: Literal["update", "sequence"] = "update"
    """Whether all sequences of an update share one r, or each draws its own. Rows of different depth share a
    pass, and none runs longer than its own r."""
    mean: int = Field(1, ge=1, le=256)
    """Mean of r (of r - 1 for lognormal_poisson, as in the Huginn code)."""
    spread: float = Field(0.5, ge=0, le=2)
    """Standard deviation of the log rate of lognormal_poisson."""
    max_steps: int = Field(256, ge=1, le=1024)
    """r is clipped here, so that the tail of the distribution cannot exhaust memory."""
    grad_steps: Annotated[int, Field(ge=1, le=1024)] | Literal["all"] = 1
    """The last so many runs record gradient (truncated backpropagation through time); 1 is a single backward
    pass, ``all`` is backpropagation through every run."""
    curriculum: CurriculumConfig | None = None
    """None: the mean is the same in all updates."""

    @model_validator(mode="after")
    def _rising(self) -> DepthConfig:
        if self.curriculum is not None and self.curriculum.start > self.mean:
            raise ValueError(f"curriculum.start ({self.curriculum.start}) must not exceed mean ({self.mean})")
        return self

    @property
    def is_single(self) -> bool:
        """Whether the core always runs exactly once."""
        return self.distribution in ("fixed", "poisson") and self.mean == 1


ONE_RUN = DepthConfig()


class CorruptionConfig(Strict):
    """Which positions start from a noised copy of their target, and how their noise levels are drawn."""

    share: float = Field(0.0, ge=0, le=1)
    """Probability that a position is noised; the others start from z = 0 and learn the plain prediction."""
    distribution: str = "bands"
    """A name of NOISE_SCHEDULES in rdlm/diffusion/schedules.py, as bands (half the levels log-uniform in
    low_band, half in high_band) or lognormal (the published one, with the parameters of NoiseConfig)."""
    low_band: tuple[float, float] = (0.2, 2.0)
    high_band: tuple[float, float] = (2.0, 80.0)
    per: Literal["position", "sequence"] = "position"
    """Whether each position or each sequence is noised, and draws its level, independently."""

    @model_validator(mode="after")
    def _bands(self) -> CorruptionConfig:
        for name in ("low_band", "high_band"):
            low, high = getattr(self, name)
            if not 0 < low < high:
                raise ValueError(f"{name} must be two rising positive levels, got {(low, high)}")
        return self


NO_NOISE = CorruptionConfig()


class MaskingConfig(Strict):
    """Tokens that are masked instead of noised (MD4, Shi et al. 2024)."""

    schedule: str = "linear"
    """A masking schedule of rdlm/diffusion/schedules.py; linear: alpha(t) = 1 - t is the probability of
    staying unmasked."""
    t_min: float = Field(1e-3, gt=0, lt=1)
    """Lowest level in training: the weight of a masked token is 1 / t there."""


class BaseObjectiveConfig(Strict):
    """What every objective says about itself."""

    name: str
    implementation: ClassVar[str]
    """``module:class`` of the objective itself (rdlm/objectives)."""
    tasks: ClassVar[tuple[str, ...]]
    """Kinds of models it can train, see ``task`` in rdlm/config/model.py."""
    readout: ClassVar[Literal["plain", "evidence", "edm"]] = "plain"
    """plain: logits = W h. evidence: W h + a <E, z> / sigma^2. edm: logits of c_skip z + c_out h (the
    published form)."""
    k_meaning: ClassVar[KMeaning] = "thinking"
    """thinking: K core iterations, then one read-out. sampling: K levels of noise or masking, with a read-out
    at each."""
    left_to_right: ClassVar[bool] = True
    """Whether text is decoded one token after the other; masked models fill several positions at once."""
    separates_documents: ClassVar[bool] = True
    """Whether the documents of a row can be kept apart (``data.packing``)."""
    supports_exits: ClassVar[bool] = True
    """Whether a position may leave the loop over K before its last step."""
    fills_in: ClassVar[bool] = False
    """Whether answers of a task are filled in where they stand: inputs and answers then share a row."""
    estimators: ClassVar[tuple[str, ...]] = ("normalised",)
    """Names of the likelihood estimators it has (eval/texts/likelihood.py), the default first."""
    loss_name: ClassVar[str] = "cross-entropy, nats"
    k_description: ClassVar[str] = (
        "K is the number of core steps before the one read-out: more steps, more computation per answer"
    )
    levels_are_sigma: ClassVar[bool] = True
    """Whether a level is a standard deviation of noise; a masking level is a probability."""
    default_steps_in_evaluation: ClassVar[tuple[int, ...] | None] = None
    """K of a held-out likelihood where none is given; None: the usual powers of two up to the largest K."""
    sampled_from_noise: ClassVar[bool] = False
    """Whether a sampler may start from z = sigma_max eps: clean rows then fill the cache, beside the noisy one.
    """
    needs_exit_gate: ClassVar[bool] = False
    """Whether it trains the model's exit gate, which the model must have."""

    @model_validator(mode="before")
    @classmethod
    def _nested_defaults(cls, data: Any) -> Any:
        """A section given in part keeps the other defaults of this objective, not those of the section's own
        class."""
        if not isinstance(data, Mapping):
            return data
        merged = dict(data)
        for key, field in cls.model_fields.items():
            if isinstance(field.default, Strict) and isinstance(merged.get(key), Mapping):
                merged[key] = {**field.default.model_dump(), **merged[key]}
            elif isinstance(field.default, Strict) and key in merged and merged[key] is None:
                del merged[key]
        return merged

    @property
    def noise_conditioned(self) -> bool:
        """Whether the network is conditioned on a level of noise or masking."""
        return False

    @property
    def noised_in_training(self) -> str:
        """What is noised, for the model card."""
        corruption = getattr(self, "corruption", None)
        return "nothing" if corruption is None else f"{corruption.share:.0%} of the positions"

    @property
    def depth_in_training(self) -> DepthConfig:
        """How often the core runs in one update."""
        return getattr(self, "depth", ONE_RUN)

    def estimator_at(self, num_steps: int, num_draws: int | None = None) -> str:
        """What ``Objective.score`` and ``token_logprobs`` estimate at K = num_steps, in words."""
        return f"normalised: logits after K = {num_steps} core steps"

    @property
    def estimator(self) -> str:
        """Which of the model's likelihoods is normalised."""
        return "logits after K iterations"


ZLoss = Annotated[float, Field(ge=0)]
"""Factor of the squared log of the softmax's denominator that is added to the loss of a position (PaLM,
Chowdhery et al. 2022: 1e-4). ``ce`` in the metrics is without it."""


class NextTokenConfig(BaseObjectiveConfig):
    """Plain next-token prediction; the core runs once unless ``depth`` says otherwise."""

    name: Literal["next_token"] = "next_token"
    implementation = "rdlm.objectives.next_token:NextToken"
    tasks = ("causal",)
    depth: DepthConfig = DepthConfig()
    z_loss: ZLoss = 0.0


class OneStepConfig(NextTokenConfig):
    """The default: several runs of the core, of which only the last records gradient."""

    name: Literal["onestep"] = "onestep"  # type: ignore[assignment]
    depth: DepthConfig = DepthConfig(distribution="lognormal_poisson", mean=2, grad_steps=1)


class BpttConfig(NextTokenConfig):
    """Truncated backpropagation through time, as Huginn was trained (Geiping et al. 2025)."""

    name: Literal["bptt"] = "bptt"  # type: ignore[assignment]
    depth: DepthConfig = DepthConfig(distribution="lognormal_poisson", mean=32, grad_steps=8)


class SinglePassConfig(NextTokenConfig):
    """One backward pass through one core run, as ``onestep``, with a share of the positions noised."""

    name: Literal["single_pass"] = "single_pass"  # type: ignore[assignment]
    readout = "evidence"
    depth: DepthConfig = DepthConfig(distribution="lognormal_poisson", mean=2, grad_steps=1)
    corruption: CorruptionConfig = CorruptionConfig(share=0.25)
    loss_weighting: Literal["none", "edm"] = "none"
    """Per-position weight of the loss; edm is w(sigma) of Karras et al. 2022."""

    @property
    def noise_conditioned(self) -> bool:
        return self.corruption.share > 0


class _EveryStepConfig(NextTokenConfig):
    """Every core run is read out. Noise conditioning is on where ``corruption.share`` is above 0."""

    depth: DepthConfig = DepthConfig(mean=4, grad_steps="all")
    corruption: CorruptionConfig = CorruptionConfig()

    @property
    def readout(self) -> Literal["plain", "evidence"]:  # type: ignore[override]
        """As in ``single_pass`` where targets are noised, as in ``bptt`` where they are not."""
        return "evidence" if self.noise_conditioned else "plain"

    @property
    def noise_conditioned(self) -> bool:
        return self.corruption.share > 0


class PerStepConfig(_EveryStepConfig):
    """A weighted sum of the cross-entropies after every core run."""

    name: Literal["per_step"] = "per_step"  # type: ignore[assignment]
    implementation = "rdlm.objectives.per_step:PerStep"
    weights: Literal["uniform", "linear", "last"] = "uniform"
    """Weights of the cross-entropy after run t of r: see WEIGHTS in rdlm/objectives/per_step.py."""


class ExitGateConfig(_EveryStepConfig):
    """Network and exit gate together: the expected cross-entropy under the gate's exit distribution, less an
    entropy (Ouro's first stage, arXiv 2510.25741)."""

    name: Literal["exit_gate"] = "exit_gate"  # type: ignore[assignment]
    implementation = "rdlm.objectives.exit_gate:ExitGate"
    needs_exit_gate = True
    loss_name = "expected cross-entropy - beta entropy of the exit, nats"
    beta: float = Field(0.1, ge=0)
    """Weight of the entropy of the exit distribution, which keeps it near the uniform one."""


class GateOnlyConfig(NextTokenConfig):
    """The exit gate alone, with the network frozen: it learns to go on as long as the loss falls (Ouro's
    second stage, arXiv 2510.25741)."""

    name: Literal["gate_only"] = "gate_only"  # type: ignore[assignment]
    implementation = "rdlm.objectives.gate_only:GateOnly"
    needs_exit_gate = True
    loss_name = "binary cross-entropy of the exit gate, nats"
    depth: DepthConfig = DepthConfig(mean=4)
    slope: float = Field(50.0, gt=0)
    """The target of going on is sigmoid(slope (improvement - margin)), the improvement in nats."""
    margin: float = Field(0.005, ge=0)

    @field_validator("z_loss")
    @classmethod
    def _no_softmax(cls, z_loss: float) -> float:
        if z_loss:
            raise ValueError(
                "objective 'gate_only' trains the gate alone, and z_loss is of the softmax; drop it"
            )
        return z_loss


class _SamplingConfig(BaseObjectiveConfig):
    """One network call at each of K noise levels, and a token drawn at each."""

    tasks = ("causal", "classify")
    k_meaning = "sampling"
    supports_exits = False
    estimators = ("normalised", "mixture")
    k_description = (
        "K is the number of noise levels that a token (of images: the class) is drawn through: a setting "
        "of the sampler"
    )
    default_steps_in_evaluation = (1,)
    corruption: CorruptionConfig
    z_loss: ZLoss = 0.0
    loss_weighting: Literal["none", "edm"] = "none"
    readout_quantile: float = Field(1.0, gt=0, le=1)
    """The level at which z = 0 is read, as a quantile of the training distribution of levels. 1 is sigma_max,
    which ``paper`` practically never draws: a network is not read outside of what it was trained on."""

    @property
    def noise_conditioned(self) -> bool:
        return self.corruption.share > 0

    def estimator_at(self, num_steps: int, num_draws: int | None = None) -> str:
        if num_steps == 1:
            return f"normalised: logits at {self._level} with z = 0"
        return f"mixture over noise draws at K = {num_steps} (biased upward in NLL)"

    @property
    def estimator(self) -> str:
        return f"logits at {self._level} with z = 0 (K = 1)"

    @property
    def _level(self) -> str:
        return (
            "sigma_max" if self.readout_quantile == 1 else f"the {self.readout_quantile:g} quantile of sigma"
        )


class EvidenceConfig(_SamplingConfig):
    """One forward pass, most positions noised, and the exact evidence of z added to the prediction."""

    name: Literal["evidence"] = "evidence"
    implementation = "rdlm.objectives.evidence:Evidence"
    readout = "evidence"
    corruption: CorruptionConfig = CorruptionConfig(share=0.75)


class PaperConfig(_SamplingConfig):
    """DiffusionBlocks as published (App. E.4): a noisy stream and a clean one, EDM preconditioning."""

    name: Literal["paper"] = "paper"
    implementation = "rdlm.objectives.evidence:Paper"
    readout = "edm"
    sampled_from_noise = True
    corruption: CorruptionConfig = CorruptionConfig(share=1.0, distribution="lognormal", per="sequence")
    readout_quantile: float = Field(0.99, gt=0, le=1)


class MaskedConfig(BaseObjectiveConfig):
    """Masked diffusion (MD4, Shi et al. 2024)."""

    name: Literal["masked"] = "masked"
    implementation = "rdlm.objectives.masked:MaskedDiffusion"
    tasks = ("masked",)
    k_meaning = "sampling"
    left_to_right = False
    fills_in = True
    estimators = ("bound", "left_to_right")
    separates_documents = False
    supports_exits = False
    levels_are_sigma = False
    k_description = "K is the number of steps in which masked tokens are filled in: a setting of the sampler"
    default_steps_in_evaluation = (1, 4, 16, 64, 256, 1024)
    masking: MaskingConfig = MaskingConfig()

    @property
    def noised_in_training(self) -> str:
        return "nothing: tokens are masked"

    @property
    def noise_conditioned(self) -> bool:
        return True

    def estimator_at(self, num_steps: int, num_draws: int | None = None) -> str:
        drawn = (
            "exact"
            if num_steps == 1
            else "stratified draws"
            if num_draws is None
            else f"{num_draws} stratified draws"
        )
        return f"upper bound of the NLL, not its value: K = {num_steps} unmasking steps, {drawn}"

    @property
    def estimator(self) -> str:
        return "normalised: one token a step, from left to right"


class ClassifyConfig(BaseObjectiveConfig):
    """Cross-entropy of the class of an image."""

    name: Literal["classify"] = "classify"
    implementation = "rdlm.objectives.next_token:NextToken"
    tasks = ("classify",)


class ForwardForwardConfig(BaseObjectiveConfig):
    """Forward-Forward (Hinton 2022), a baseline without a backward pass between layers."""

    name: Literal["forward_forward"] = "forward_forward"
    implementation = "rdlm.objectives.forward_forward:ForwardForward"
    tasks = ("classify",)
    goodness: Literal["threshold", "difference"] = "difference"
    """How the goodness of the right class is compared with that of a wrong one: see
    rdlm/objectives/forward_forward.py."""

    def estimator_at(self, num_steps: int, num_draws: int | None = None) -> str:
        return self.estimator

    @property
    def estimator(self) -> str:
        return "softmax of goodness over classes: normalised, not calibrated"


class EdmConfig(BaseObjectiveConfig):
    """Denoising of images (Karras et al. 2022; DiffusionBlocks Sec. 3)."""

    name: Literal["edm"] = "edm"
    implementation = "rdlm.objectives.edm:Edm"
    tasks = ("denoise",)
    readout = "edm"
    k_meaning = "sampling"
    left_to_right = False
    supports_exits = False
    loss_name = "weighted squared error"
    k_description = "K is the number of steps from noise to an image"
    corruption: CorruptionConfig = CorruptionConfig(share=1.0, distribution="lognormal", per="sequence")
    loss_weighting: Literal["none", "edm"] = "edm"
    label_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of the images that are trained without their class, which guidance needs."""

    @model_validator(mode="after")
    def _whole_images(self) -> EdmConfig:
        if self.corruption.share != 1 or self.corruption.per != "sequence":
            raise ValueError(
                "objective 'edm' noises every image at one level: corruption.share is 1, corruption.per sequence"
            )
        return self

    @property
    def noised_in_training(self) -> str:
        return "the images"

    @property
    def noise_conditioned(self) -> bool:
        return True

    def estimator_at(self, num_steps: int, num_draws: int | None = None) -> str:
        return self.estimator

    @property
    def estimator(self) -> str:
        return "none: it denoises images"


DEFAULT = "onestep"
"""The objective of a section that names none."""
_V1_FIELDS = {"depth", "corruption", "readout", "loss_weighting", "label_dropout", "goodness", "masking"}


def _current(data: Any) -> Any:
    """An objective section as today's classes read it.

    Schema version 1 wrote all fields of all objectives. Those that another objective owns are dropped where
    they hold the only value they could have; a value that would mean something is left for validation to
    refuse. Two names of version 1 overlapped: the evidence read-out with one core run is ``evidence``, with
    several it is ``single_pass``.
    """
    if isinstance(data, str):
        data = {"name": data}  # objective: bptt
    if not isinstance(data, Mapping):
        return data
    section = {"name": DEFAULT, **data}
    variant = _BY_NAME.get(str(section["name"]))
    if variant is None:
        return section
    defaults = variant.model_fields
    depth = _merged(section.get("depth"), defaults["depth"].default if "depth" in defaults else DepthConfig())
    corruption = _merged(
        section.get("corruption"),
        defaults["corruption"].default if "corruption" in defaults else CorruptionConfig(),
    )
    noised = isinstance(corruption, dict) and float(corruption.get("share") or 0) > 0
    if section.get("readout", variant.readout) == "evidence" and noised and "causal" in variant.tasks:
        single = isinstance(depth, dict) and depth.get("distribution") == "fixed" and depth.get("mean") == 1
        section = {
            **section,
            "name": "evidence" if single else "single_pass",
            "depth": depth,
            "corruption": corruption,
        }
        variant = _BY_NAME[section["name"]]
    if "readout" in data and "readout_quantile" in variant.model_fields:
        section.setdefault("readout_quantile", 1.0)  # version 1 read at sigma_max
    for key in (_V1_FIELDS - variant.model_fields.keys()) & section.keys():
        if _is_neutral(key, section[key], variant):
            del section[key]
    return section


def _merged(given: Any, default: Strict) -> Any:
    if given is None:
        return default.model_dump()
    return {**default.model_dump(), **given} if isinstance(given, Mapping) else given


def _is_neutral(key: str, value: Any, variant: type[BaseObjectiveConfig]) -> bool:
    """Whether a field of another objective says nothing."""
    if key == "readout":
        return bool(value == variant.readout)
    if key == "depth":
        return (
            isinstance(value, Mapping)
            and value.get("distribution", "fixed") == "fixed"
            and value.get("mean", 1) == 1
        )
    if key == "corruption":
        return isinstance(value, Mapping) and not value.get("share", 0)
    return value in (None, "none", 0, 0.0)


ObjectiveConfig = Annotated[
    SinglePassConfig | OneStepConfig | EvidenceConfig | PaperConfig | BpttConfig | NextTokenConfig | PerStepConfig
    | ExitGateConfig | GateOnlyConfig | MaskedConfig
    | ClassifyConfig | ForwardForwardConfig | EdmConfig,
    Field(discriminator="name"),
    BeforeValidator(_current),
]  # fmt: skip
"""An objective section: ``{name: bptt, depth: {mean: 16}}``, or ``bptt`` alone."""

VARIANTS: tuple[type[BaseObjectiveConfig], ...] = get_args(get_args(ObjectiveConfig)[0])
"""The config classes of the union."""
_BY_NAME = {str(variant.model_fields["name"].default): variant for variant in VARIANTS}

objective_config: TypeAdapter[ObjectiveConfig] = TypeAdapter(ObjectiveConfig)
