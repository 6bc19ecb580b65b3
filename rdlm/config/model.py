"""The shapes of the families, as frozen pydantic models. No tensors; what is trained with them is in rdlm/config/checkpoint.py."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from rdlm.config.base import Strict


class HuginnConfig(Strict):
    """Prelude, core applied K times, coda: the shape of Geiping et al. 2025 (sandwich norms, RoPE, qk-bias, gated MLP)."""

    family: Literal["huginn"] = "huginn"
    can_be_cut: ClassVar[bool] = False
    """A recurrent core is one denoiser of every level: there is nothing to cut into blocks."""
    iterates: ClassVar[bool] = True
    """Whether its layers may run K times, or once."""
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
    """Width of the noise-level embedding that drives AdaLN; small, so that a level per position costs a few per cent."""
    adapter_init: Literal["identity", "random"] = "identity"
    """identity: adapter = [0, I] (state first), so the injected embedding passes and the state starts silent."""
    residual_init: Literal["scaled", "plain"] = "scaled"
    """scaled: output projections of attention and MLP start smaller by sqrt(2 * depth); plain: like every other matrix."""
    state_init: Literal["zero", "normal"] = "zero"
    """Recurrent state before the first iteration; Huginn-0125 uses a truncated normal ("like-init")."""

    @model_validator(mode="after")
    def _heads(self) -> HuginnConfig:
        _check_heads(self.d_model, self.num_heads)
        return self

    @property
    def num_layers(self) -> int:
        return self.num_prelude_layers + self.num_core_layers + self.num_coda_layers


class PreNormConfig(Strict):
    """A stack of pre-norm transformer layers with gated MLPs; the layers are the core."""

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


class TextConfig(PreNormConfig):
    """Of rows of tokens, with RoPE."""

    vocab_size: int = Field(ge=2)
    max_seq_len: int = Field(ge=2)
    rope_base: float = Field(10_000.0, gt=0)
    tie_embeddings: bool = True


class ImageConfig(PreNormConfig):
    """Of square images with a class each, cut into square patches."""

    rope_base: ClassVar[None] = None
    """Patches carry their places themselves."""
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
    """Autoregressive, with grouped-query attention."""

    family: Literal["llama"] = "llama"
    num_kv_heads: int | None = Field(None, ge=1)
    """Key-value heads; None means num_heads."""

    @model_validator(mode="after")
    def _groups(self) -> LlamaConfig:
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        return self


class MaskedConfig(TextConfig):
    """Bidirectional: fills in hidden tokens (MD4, Shi et al. 2024). The input knows one id more than the read-out, the mask."""

    family: Literal["masked"] = "masked"


class VitConfig(ImageConfig):
    """Names the class of an image (Dosovitskiy et al. 2021): the noised class row, if there is one, is a row beside the patches."""

    family: Literal["vit"] = "vit"


class DitConfig(ImageConfig):
    """Denoises images given their class (Peebles and Xie 2023)."""

    family: Literal["dit"] = "dit"
    noise_conditioning: bool = True
    noise_embed_dim: int = Field(256, ge=8)
    """Width of what drives AdaLN, level and class added up; one vector an image, so it may be wide."""


ModelConfig = Annotated[
    HuginnConfig | LlamaConfig | MaskedConfig | VitConfig | DitConfig, Field(discriminator="family")
]


def _check_heads(d_model: int, num_heads: int) -> None:
    if d_model % num_heads or (d_model // num_heads) % 2:
        raise ValueError(
            f"d_model ({d_model}) must be an even multiple of num_heads ({num_heads}): RoPE rotates pairs"
        )
