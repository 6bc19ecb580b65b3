"""The shapes of the models, as frozen pydantic models. No tensors; what is trained with them is in
rdlm/config/checkpoint.py.

Every text model is a ``RecurrentConfig``: a layer layout and a loop topology. ``huginn``, ``llama`` and
``masked`` are short forms of it for the families that are trained here; their ``layout()`` gives the general
form.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from rdlm.config.base import Strict

TEXT_COMMANDS = (
    "rdlm serve --checkpoint THIS_FOLDER",
    "rdlm generate --checkpoint THIS_FOLDER --prompt TEXT",
    "rdlm eval nll --checkpoint THIS_FOLDER --data PREPARED_TEXT",
)


class TextShape:
    """What every config of a text model says."""

    is_image: ClassVar[bool] = False
    commands: ClassVar[tuple[str, ...]] = TEXT_COMMANDS
    """What to run with a checkpoint, for its card."""
    depends_on_num_steps: ClassVar[bool] = False
    """Whether the first steps of K are other ones than those of a smaller K."""
    vocab_size: int
    max_seq_len: int

    @property
    def has_exit_gate(self) -> bool:
        """Whether a trained gate says when a position may leave the loop over K."""
        return False

    @property
    def shape_description(self) -> str:
        """The shape in words, for the model card."""
        return f"vocabulary {self.vocab_size}, up to {self.max_seq_len} tokens"


PLAIN_STD = 0.02
"""Initial standard deviation of plain transformers (Radford et al. 2019)."""


class Llama3Scaling(Strict):
    """Slowed rotations of Llama 3.1: wavelengths above original_max_seq_len / low_freq_factor are ``factor``
    times as long."""

    factor: float = Field(ge=1)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_max_seq_len: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Llama3Scaling:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor ({self.low_freq_factor}) must be below high_freq_factor ({self.high_freq_factor})"
            )
        return self


class LinearScaling(Strict):
    """Positions divided by ``factor`` (Chen et al. 2023)."""

    factor: float = Field(gt=0)


class YarnScaling(Strict):
    """YaRN (Peng et al. 2023): a dimension that turns more than ``beta_fast`` times within original_max_seq_len
    is kept, one that turns less than ``beta_slow`` times is divided by ``factor``, those between are interpolated;
    queries and keys grow by ``attention_factor``."""

    factor: float = Field(gt=0)
    original_max_seq_len: int = Field(ge=1)
    attention_factor: float = Field(gt=0)
    beta_fast: float = Field(32.0, gt=0)
    beta_slow: float = Field(1.0, gt=0)
    truncate: bool = True
    """Whether the bounds of what is interpolated are whole dimensions."""


RopeScaling = Llama3Scaling | LinearScaling | YarnScaling


class RopeConfig(Strict):
    """Rotary positions of adjacent pairs; importers permute the weights of models that rotate split halves."""

    base: float = Field(gt=0)
    num_dims: int | None = Field(None, ge=2)
    """Leading dimensions of a head that are rotated; None: all."""
    scaling: RopeScaling | None = None


class LayerConfig(Strict):
    """One transformer layer. RMS norms; grouped heads: query head h reads key-value head h // (num_heads /
    num_kv_heads)."""

    norms: Literal["pre", "post", "sandwich_sum", "sandwich_branch"] = "pre"
    """Where the norms are: see rdlm/nn/layers.py."""
    norm_eps: float = Field(1e-6, gt=0)
    norm_weights: bool = True
    """Whether the norms have learned weights."""
    num_heads: int = Field(ge=1)
    num_kv_heads: int | None = Field(None, ge=1)
    """Key-value heads; None: as many as heads."""
    head_dim: int | None = Field(None, ge=1)
    """None: d_model / num_heads."""
    rope: RopeConfig | None = None
    """None: rows carry their positions themselves."""
    qk_norm: Literal["none", "full", "head", "head_unweighted"] = "none"
    """RMS norm of queries and keys before the rotation. full: over all heads at once (OLMo 2); head: over
    each, one weight (Qwen3); head_unweighted: over each, without a weight (Parcae)."""
    qk_norm_eps: float | None = Field(None, gt=0)
    """None: norm_eps."""
    bias: Literal["none", "qk", "qkv", "qkvo"] = "none"
    """Learned biases. qk: on queries and keys (Huginn); qkv: on all three (Qwen2); qkvo: on what attention gives
    too (Llama with ``attention_bias``)."""
    output_gate: bool = False
    """What attention gives is multiplied by a sigmoid of the layer's input (HRM-Text)."""
    mlp: Literal["swiglu", "relu2", "gelu"] = "swiglu"
    mlp_width: int = Field(ge=1)
    mlp_bias: bool = False
    """Whether both matrices of the feed-forward layer have biases."""
    mlp_scale: float = 1.0
    """Factor of what enters the last matrix of the feed-forward layer."""

    @model_validator(mode="after")
    def _heads(self) -> LayerConfig:
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.bias == "qk" and (self.num_kv_heads or self.num_heads) != self.num_heads:
            raise ValueError("bias 'qk' needs as many key-value heads as heads")
        return self

    def head_width(self, d_model: int) -> int:
        """Dimensions of a head."""
        return d_model // self.num_heads if self.head_dim is None else self.head_dim


class LoopConfig(Strict):
    """e = prelude(embed(ids)); state = core(inject(state, e)) K times; hidden = norm(coda(readout(state)))."""

    num_prelude_layers: int = Field(0, ge=0)
    num_core_layers: int = Field(ge=1)
    num_coda_layers: int = Field(0, ge=0)
    iterates: bool = True
    """Whether the core may run K times, or once."""
    state: Literal["zero", "normal", "embedding"] = "zero"
    """State before the first step. normal: drawn with ``state_std``; embedding: e."""
    state_std: float | None = Field(None, ge=0)
    state_cut: float | None = Field(3.0, gt=0)
    """Standard deviations at which the normal distribution is cut; None: nowhere."""
    state_scale: float = 1.0
    """Factor of the draw."""
    state_hash: bool = False
    """Whether the draw at inference is a hash of seed and position (IFM LoopedLM)."""
    injection: Literal["none", "replace", "linear", "diagonal", "diagonal_orthogonal", "add"] = "none"
    """What a step begins with. none: the state. replace: e, whatever the state is. linear: a matrix on
    [state, e]. diagonal: a decayed state plus a matrix on e (Parcae); diagonal_orthogonal: its part along the
    injected vector is removed first. add: state + e."""
    injection_bias: bool = False
    injection_eps: float = Field(1e-6, gt=0)
    """diagonal_orthogonal: added to the squared length of what is injected."""
    injection_state_scale: float = 1.0
    """linear: factor of the state. A noised target has coordinates of size 1, an embedding of a plain
    transformer starts at 0.02."""
    input_norm: bool = False
    """Weighted norm of e behind the prelude."""
    boundary_norm: Literal["none", "weighted", "unweighted"] = "none"
    """Norm at the end of every step. weighted: the final norm, of which there is then no other application.
    """
    step_gate_width: int | None = Field(None, ge=1)
    """Inner width of the gate that decides, channel by channel, how far a step moves the state (LoopUS);
    None: no gate."""
    readout: Literal["direct", "norm", "linear"] = "direct"
    """What stands between the last step and the coda. norm: the final norm (Huginn); linear: a matrix
    (Parcae)."""
    final_norm: bool = True
    exit_gate: Literal["none", "linear", "norm_linear"] = "none"
    """Trained exit probability of each state: a linear map (Ouro), or one behind a LayerNorm (LoopUS)."""
    core_mlp_width: int | None = Field(None, ge=1)
    """None: as in the other layers."""

    @model_validator(mode="after")
    def _consistent(self) -> LoopConfig:
        if (self.state_std is not None) != (self.state == "normal"):
            raise ValueError("state_std belongs to state 'normal', which needs it")
        if self.state_hash and self.state != "normal":
            raise ValueError("state_hash belongs to state 'normal'")
        if self.injection_bias and self.injection != "linear":
            raise ValueError("injection_bias belongs to injection 'linear'")
        if self.boundary_norm == "weighted" and self.final_norm:
            raise ValueError("boundary_norm 'weighted' is the final norm: set final_norm to false")
        if not self.final_norm and self.readout != "norm" and self.boundary_norm != "weighted":
            raise ValueError(
                "a model needs one weighted norm: final_norm, readout 'norm' or boundary_norm 'weighted'"
            )
        return self

    @property
    def num_layers(self) -> int:
        return self.num_prelude_layers + self.num_core_layers + self.num_coda_layers


class InitConfig(Strict):
    """How weights are drawn before training; see rdlm/models/recurrent.py."""

    std: float | None = Field(None, gt=0)
    """Standard deviation of matrices; None: sqrt(2 / (5 d_model)) (Takase et al. 2023)."""
    residual: Literal["scaled", "plain"] = "scaled"
    """scaled: output projections of attention and MLP start smaller by sqrt(2 * depth); plain: like every
    other matrix."""
    adapter: Literal["identity", "random"] = "identity"
    """Initial value of injection linear. identity: [0, I] (state first), so the embedding passes and the
    state starts silent."""


class RecurrentConfig(Strict, TextShape):
    """A recurrent-depth text model; a plain transformer is the one without prelude, coda and injection whose
    core runs once."""

    family: Literal["recurrent"] = "recurrent"
    origin: str | None = None
    """The published family that it was imported from."""
    vocab_size: int = Field(ge=2)
    d_model: int = Field(ge=1)
    max_seq_len: int = Field(ge=2)
    tie_embeddings: bool = True
    embed_scale: float = 1.0
    """Factor of the embedded tokens."""
    masked: bool = False
    """Bidirectional; the input knows one id more than the read-out, the mask (MD4, Shi et al. 2024)."""
    value_embeddings: tuple[int, ...] = ()
    """Layers (prelude first, then core, then coda) whose values have a gated embedding of the token added
    (Parcae)."""
    value_gate_width: int = Field(32, ge=1)
    """Leading channels of a layer's input that the gate reads."""
    layer: LayerConfig
    loop: LoopConfig
    init: InitConfig = InitConfig()
    noise_conditioning: bool = False
    """AdaLN on the core layers, zero-initialised. Set by the trainer from the objective."""
    noise_embed_dim: int = Field(64, ge=8)
    """Width of the noise-level embedding that drives AdaLN; small, so that a level per position costs a few
    per cent."""

    @model_validator(mode="after")
    def _consistent(self) -> RecurrentConfig:
        layer, loop = self.layer, self.loop
        if layer.head_dim is None and self.d_model % layer.num_heads:
            raise ValueError(f"d_model ({self.d_model}) must be a multiple of num_heads ({layer.num_heads})")
        rotated = 0 if layer.rope is None else layer.rope.num_dims or layer.head_width(self.d_model)
        if rotated % 2 or rotated > layer.head_width(self.d_model):
            raise ValueError(
                f"RoPE rotates pairs of the {layer.head_width(self.d_model)} dimensions of a head, got {rotated}"
            )
        if self.noise_conditioning and loop.injection == "replace":
            raise ValueError("injection 'replace' ignores the state, in whose place a noised target stands")
        if self.noise_conditioning and self.value_embeddings:
            raise ValueError(
                "a state with value_embeddings has more channels than a noised target: train without noise"
            )
        if any(not 0 <= i < loop.num_layers for i in self.value_embeddings):
            raise ValueError(
                f"value_embeddings must name layers 0 to {loop.num_layers - 1}, got {self.value_embeddings}"
            )
        return self

    def layout(self) -> RecurrentConfig:
        """The general form, which this is."""
        return self

    @property
    def task(self) -> str:
        """What the network computes: see HuginnConfig."""
        return "masked" if self.masked else "causal"

    @property
    def iterates(self) -> bool:
        """Whether its layers may run K times, or once."""
        return self.loop.iterates

    @property
    def has_exit_gate(self) -> bool:
        return self.loop.exit_gate != "none"

    @property
    def can_be_cut(self) -> bool:
        """A recurrent core is one denoiser of every level: there is nothing to cut into blocks."""
        return not self.loop.iterates and self.loop.num_layers == self.loop.num_core_layers

    @property
    def num_layers(self) -> int:
        return self.loop.num_layers

    def topology(self) -> str:
        """The loop in words."""
        loop = self.loop
        layers = f"{loop.num_prelude_layers} prelude, {loop.num_core_layers} core, {loop.num_coda_layers} coda layers"
        parts = [f"state {loop.state}", f"injection {loop.injection}", f"read-out {loop.readout}"]
        if loop.boundary_norm != "none":
            parts.append(f"boundary norm {loop.boundary_norm}")
        if loop.step_gate_width:
            parts.append("step gate")
        if loop.exit_gate != "none":
            parts.append("exit gate")
        return f"{layers}; {', '.join(parts)}"


class HrmConfig(Strict, TextShape):
    """Two coupled stacks: K times, the low one runs num_low_cycles times and the high one once (HRM-Text,
    arXiv 2605.20613)."""

    family: Literal["hrm"] = "hrm"
    task: ClassVar[str] = "causal"
    can_be_cut: ClassVar[bool] = False
    iterates: ClassVar[bool] = True
    tie_embeddings: ClassVar[bool] = False
    origin: str | None = None
    """The published family that it was imported from."""
    vocab_size: int = Field(ge=2)
    d_model: int = Field(ge=1)
    max_seq_len: int = Field(ge=2)
    embed_scale: float = 1.0
    num_stack_layers: int = Field(ge=1)
    """Layers of each of the two stacks."""
    num_low_cycles: int = Field(ge=1)
    """Runs of the low stack in a step."""
    prefix_lm: bool = False
    """Whether it was trained on prompts whose tokens see each other in both directions."""
    layer: LayerConfig
    noise_conditioning: Literal[False] = False

    @property
    def num_layers(self) -> int:
        return 2 * self.num_stack_layers

    def layout(self) -> HrmConfig:
        """The general form, which this is."""
        return self

    def topology(self) -> str:
        """The loop in words."""
        return (
            f"a step is {self.num_low_cycles} runs of a low stack and one of a high stack, "
            f"{self.num_stack_layers} layers each"
        )


class LoopFormerConfig(Strict, TextShape):
    """Plain layers that run K times, each step conditioned on its time k / K and its length 1 / K
    (LoopFormer, arXiv 2602.11451)."""

    family: Literal["loopformer"] = "loopformer"
    task: ClassVar[str] = "causal"
    depends_on_num_steps: ClassVar[bool] = True
    can_be_cut: ClassVar[bool] = False
    iterates: ClassVar[bool] = True
    origin: str | None = None
    """The published family that it was imported from."""
    vocab_size: int = Field(ge=2)
    d_model: int = Field(ge=1)
    max_seq_len: int = Field(ge=2)
    """Positions have learned embeddings: there are no more."""
    num_layers: int = Field(ge=1)
    tie_embeddings: bool = True
    layer: LayerConfig
    noise_conditioning: Literal[False] = False

    def layout(self) -> LoopFormerConfig:
        """The general form, which this is."""
        return self

    def topology(self) -> str:
        """The loop in words."""
        return f"{self.num_layers} layers, conditioned on time and length of the step; state embedding"


class HuginnConfig(Strict, TextShape):
    """Prelude, core applied K times, coda: the shape of Geiping et al. 2025 (sandwich norms, RoPE, qk-bias,
    gated MLP)."""

    family: Literal["huginn"] = "huginn"
    task: ClassVar[str] = "causal"
    """What its networks compute: causal (the next token), masked (masked tokens), classify or denoise
    (images)."""
    can_be_cut: ClassVar[bool] = False
    iterates: ClassVar[bool] = True
    vocab_size: int = Field(ge=2)
    d_model: int = Field(ge=8)
    num_heads: int = Field(ge=1)
    mlp_width: int = Field(ge=8)
    """Width of the gated MLP (Huginn-0125: 17920 for d_model 5280)."""
    num_prelude_layers: int = Field(2, ge=0)
    num_core_layers: int = Field(4, ge=1)
    num_coda_layers: int = Field(2, ge=0)
    max_seq_len: int = Field(ge=2)
    rope_base: float = Field(50_000.0, gt=0)
    norm_eps: float = Field(1e-6, gt=0)
    qk_bias: bool = True
    tie_embeddings: bool = True
    noise_conditioning: bool = False
    """AdaLN on the core layers, zero-initialised. Set by the trainer from the objective."""
    noise_embed_dim: int = Field(64, ge=8)
    """Width of the noise-level embedding that drives AdaLN; small, so that a level per position costs a few
    per cent."""
    adapter_init: Literal["identity", "random"] = "identity"
    """identity: adapter = [0, I] (state first), so the injected embedding passes and the state starts silent.
    """
    residual_init: Literal["scaled", "plain"] = "scaled"
    """scaled: output projections of attention and MLP start smaller by sqrt(2 * depth); plain: like every
    other matrix."""
    state_init: Literal["zero", "normal"] = "zero"
    """Recurrent state before the first iteration; Huginn-0125 uses a truncated normal ("like-init")."""
    exit_gate: Literal["none", "linear", "norm_linear"] = "none"
    """A probability of stopping at each state, see LoopConfig; objectives exit_gate and gate_only train it."""

    @model_validator(mode="after")
    def _heads(self) -> HuginnConfig:
        _check_heads(self.d_model, self.num_heads)
        return self

    @property
    def has_exit_gate(self) -> bool:
        return self.exit_gate != "none"

    @property
    def num_layers(self) -> int:
        return self.num_prelude_layers + self.num_core_layers + self.num_coda_layers

    def layout(self) -> RecurrentConfig:
        """The general form."""
        drawn = self.state_init == "normal"
        return RecurrentConfig(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            max_seq_len=self.max_seq_len,
            tie_embeddings=self.tie_embeddings,
            embed_scale=math.sqrt(self.d_model),
            layer=LayerConfig(
                norms="sandwich_sum",
                norm_eps=self.norm_eps,
                num_heads=self.num_heads,
                rope=RopeConfig(base=self.rope_base),
                bias="qk" if self.qk_bias else "none",
                mlp_width=self.mlp_width,
            ),
            loop=LoopConfig(
                num_prelude_layers=self.num_prelude_layers,
                num_core_layers=self.num_core_layers,
                num_coda_layers=self.num_coda_layers,
                state=self.state_init,
                state_std=initial_std(self.d_model) if drawn else None,
                state_scale=math.sqrt(self.d_model) if drawn else 1.0,
                injection="linear",
                readout="norm",
                exit_gate=self.exit_gate,
            ),
            init=InitConfig(residual=self.residual_init, adapter=self.adapter_init),
            noise_conditioning=self.noise_conditioning,
            noise_embed_dim=self.noise_embed_dim,
        )


class PreNormConfig(Strict):
    """A stack of pre-norm transformer layers with gated MLPs; the layers are the core."""

    task: ClassVar[str]
    can_be_cut: ClassVar[bool] = True
    iterates: ClassVar[bool] = False
    family: str
    d_model: int = Field(ge=8)
    num_heads: int = Field(ge=1)
    mlp_width: int = Field(ge=8)
    num_layers: int = Field(ge=1)
    norm_eps: float = Field(1e-5, gt=0)
    noise_conditioning: bool = False
    noise_embed_dim: int = Field(64, ge=8)

    @model_validator(mode="after")
    def _heads(self) -> PreNormConfig:
        _check_heads(self.d_model, self.num_heads)
        return self


class TextConfig(PreNormConfig, TextShape):
    """A stack that reads rows of tokens, with RoPE."""

    vocab_size: int = Field(ge=2)
    max_seq_len: int = Field(ge=2)
    rope_base: float = Field(10_000.0, gt=0)
    tie_embeddings: bool = True

    def _plain(
        self, loop: LoopConfig, num_kv_heads: int | None = None, masked: bool = False
    ) -> RecurrentConfig:
        return RecurrentConfig(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            max_seq_len=self.max_seq_len,
            tie_embeddings=self.tie_embeddings,
            masked=masked,
            layer=LayerConfig(
                norm_eps=self.norm_eps,
                num_heads=self.num_heads,
                num_kv_heads=num_kv_heads,
                rope=RopeConfig(base=self.rope_base),
                mlp_width=self.mlp_width,
            ),
            loop=loop,
            init=InitConfig(std=PLAIN_STD),
            noise_conditioning=self.noise_conditioning,
            noise_embed_dim=self.noise_embed_dim,
        )


class ImageConfig(PreNormConfig):
    """A stack that reads square images with a class each, cut into square patches."""

    is_image: ClassVar[bool] = True
    commands: ClassVar[tuple[str, ...]]
    instead_of_text: ClassVar[str]
    """Commands that take it where those of texts do not, for messages."""
    depends_on_num_steps: ClassVar[bool] = False
    has_exit_gate: ClassVar[bool] = False
    tie_embeddings: ClassVar[bool] = True

    image_size: int = Field(ge=2)
    """Pixels of a side."""
    patch_size: int = Field(ge=1)
    num_channels: int = Field(3, ge=1)
    num_classes: int = Field(ge=2)

    @model_validator(mode="after")
    def _patches(self) -> ImageConfig:
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size ({self.patch_size}) must divide image_size ({self.image_size})")
        return self

    @property
    def layer(self) -> LayerConfig:
        """Patches carry their positions themselves: no RoPE."""
        return LayerConfig(norm_eps=self.norm_eps, num_heads=self.num_heads, mlp_width=self.mlp_width)

    @property
    def shape_description(self) -> str:
        """The shape in words, for the model card."""
        size = f"{self.image_size}x{self.image_size} in patches of {self.patch_size}"
        return f"images of {size}, {self.num_classes} classes"

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def vocab_size(self) -> int:
        """What a class is one of."""
        return self.num_classes

    @property
    def max_seq_len(self) -> int:
        """Targets of an example: its class."""
        return 1


class LlamaConfig(TextConfig):
    """Autoregressive, with grouped-query attention (Touvron et al. 2023)."""

    family: Literal["llama"] = "llama"
    task = "causal"
    num_kv_heads: int | None = Field(None, ge=1)
    """Key-value heads; None means num_heads."""

    @model_validator(mode="after")
    def _groups(self) -> LlamaConfig:
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        return self

    def layout(self) -> RecurrentConfig:
        """The general form; with noise conditioning the noised target enters through an adapter on [z, e]."""
        noised = self.noise_conditioning
        loop = LoopConfig(
            num_core_layers=self.num_layers,
            iterates=False,
            injection="linear" if noised else "replace",
            injection_state_scale=PLAIN_STD if noised else 1.0,
        )
        return self._plain(loop, self.num_kv_heads)


class MaskedConfig(TextConfig):
    """Bidirectional: fills in masked tokens (MD4, Shi et al. 2024). The input knows one id more than the
    read-out, the mask."""

    family: Literal["masked"] = "masked"
    task = "masked"

    def layout(self) -> RecurrentConfig:
        """The general form."""
        loop = LoopConfig(num_core_layers=self.num_layers, iterates=False, state="embedding")
        return self._plain(loop, masked=True)


class VitConfig(ImageConfig):
    """Names the class of an image (Dosovitskiy et al. 2021): the noised class, if there is one, is a row
    behind the patches."""

    family: Literal["vit"] = "vit"
    task = "classify"
    commands = ("rdlm eval accuracy --checkpoint THIS_FOLDER --data PREPARED_IMAGES",)
    instead_of_text = "`rdlm eval accuracy`"


class DitConfig(ImageConfig):
    """Denoises images given their class (Peebles and Xie 2023)."""

    family: Literal["dit"] = "dit"
    task = "denoise"
    commands = (
        "rdlm images --checkpoint THIS_FOLDER --out samples.png",
        "rdlm eval fid --checkpoint THIS_FOLDER --reference IMAGES",
    )
    instead_of_text = "`rdlm images` or `rdlm eval fid`"
    noise_conditioning: bool = True
    noise_embed_dim: int = Field(256, ge=8)
    """Width of what drives AdaLN, level and class added up; one vector an image, so it may be wide."""


TextModelConfig = RecurrentConfig | HuginnConfig | LlamaConfig | MaskedConfig | HrmConfig | LoopFormerConfig
ModelConfig = Annotated[TextModelConfig | VitConfig | DitConfig, Field(discriminator="family")]


def initial_std(d_model: int) -> float:
    """sqrt(2 / (5 D)) (Takase et al. 2023): 0.0087 for Huginn-0125."""
    return math.sqrt(2 / (5 * d_model))


def _check_heads(d_model: int, num_heads: int) -> None:
    if d_model % num_heads or (d_model // num_heads) % 2:
        raise ValueError(
            f"d_model ({d_model}) must be an even multiple of num_heads ({num_heads}): RoPE rotates pairs"
        )
