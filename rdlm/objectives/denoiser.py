"""A text model read as a denoiser of next-token embeddings. c_skip, c_out, c_in, c_noise and the evidence term live here.

Shapes: targets [...] int64; y, z [..., D] fp32; sigma [...] fp32 with the leading shape of z, or None: z = 0, read at sigma_max.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdlm.config.checkpoint import NoiseConfig, ObjectiveConfig
from rdlm.diffusion.noise import denoise_scalings
from rdlm.diffusion.partition import Block
from rdlm.models.base import Backbone
from rdlm.nn.attention import AttentionContext
from rdlm.nn.cross_entropy import linear_cross_entropy
from rdlm.nn.layers import Condition

EVIDENCE_FLOOR = 0.02
"""Smallest sigma^2 in the evidence term: below it a nearest-neighbour lookup already names the token and logits only grow."""


@dataclass(frozen=True)
class Prediction:
    """Logits over the vocabulary, fp32. ``prior`` is what the network says; ``evidence`` what z says (None without z).

    Temperature, top-p, penalties, bias and log-probabilities act on ``prior``: then they mean the same at every K.
    """

    prior: Tensor
    evidence: Tensor | None = None

    def logits(self) -> Tensor:
        """Unnormalised log posterior of the token, [..., V]."""
        return self.prior if self.evidence is None else self.prior + self.evidence


class Denoiser(nn.Module):
    """model + objective's read-out + noise coefficients. Runs single steps; loops live in rdlm/diffusion/samplers.py and serve/engine/engine.py.

    With clean context and unit targets, p(x | context, z, sigma) is proportional to p(x | context) exp(<y_x, z> / sigma^2):
    the ``evidence`` read-out gives the network this known term with a learned scale instead of making it learn to read z.
    """

    def __init__(
        self,
        model: Backbone,
        objective: ObjectiveConfig,
        noise: NoiseConfig,
        block: Block | None = None,
        targets: Callable[[torch.device], Tensor] | None = None,
    ) -> None:
        """block: the noise range it is trained on, None for all levels. targets: device -> frozen unit rows [V, D] that are noised
        (rdlm/diffusion/targets.py); None takes the input embedding."""
        super().__init__()
        self.model, self.objective, self.noise, self.block, self.targets = (
            model,
            objective,
            noise,
            block,
            targets,
        )
        # One element and not a scalar tensor: DeepSpeed 0.19.8 can neither broadcast nor partition a 0-d parameter.
        self.evidence_scale = nn.Parameter(torch.ones(1)) if objective.readout == "evidence" else None

    def at(self, sigma: float | None) -> Denoiser:
        """The denoiser of a level: this one, unless the network is cut into blocks (rdlm/diffusion/blockwise.py)."""
        return self

    @property
    def two_streams(self) -> bool:
        """Whether noised rows run beside the clean ones (DiffusionBlocks App. E.4): only a causal model's targets are its inputs, too."""
        return self.objective.name == "paper" and self.model.is_causal

    def clean(self, targets: Tensor) -> Tensor:
        """Unit-norm target rows of the ids, fp32 [..., D], detached: noise must not train the table to collapse."""
        if self.targets is not None:
            return self.unit_table()[targets]
        return self.model.wte(
            use=lambda weight: F.normalize(F.embedding(targets, weight.detach()).float(), dim=-1)
        )

    def unit_table(self) -> Tensor:
        """All unit-norm target rows, fp32 [V, D], detached."""
        if self.targets is not None:
            return self.targets(self.model.ln_f.weight.device)
        return self.model.wte(use=lambda weight: F.normalize(weight.detach().float(), dim=-1))

    def inject(self, z: Tensor, sigma: Tensor) -> Tensor:
        """c_in(sigma) z: the noised target in the place of the recurrent state, in the model's dtype."""
        c_in = denoise_scalings(sigma, self.noise.sigma_data).c_in
        return (c_in.unsqueeze(-1) * z).to(self.model.ln_f.weight.dtype)

    def condition(self, sigma: Tensor | None, like: Tensor) -> Condition | None:
        """What the core is told about levels sigma [B, T]; None means sigma_max for all rows. None if unconditioned.

        It does not depend on the core step: compute it once per level, not once per step.
        """
        if sigma is None:
            sigma = torch.full((1, 1), self.noise.sigma_max, device=like.device)
        return self.model.condition(denoise_scalings(sigma, self.noise.sigma_data).c_noise)

    def step(self, state: Tensor, e: Tensor, cond: Condition | None, ctx: AttentionContext) -> Tensor:
        """One core step. state, e [B, T, D] -> [B, T, D]."""
        return self.model.core(state, e, cond, ctx)

    def predict(self, hidden: Tensor, z: Tensor | None = None, sigma: Tensor | None = None) -> Prediction:
        """Read-out of ``hidden`` = model.decode(state, ctx), [..., D] -> logits [..., V] fp32."""
        if self.objective.readout == "edm":
            return Prediction(self.model.logits(self._denoised(hidden, z, sigma)))
        prior = self.model.logits(hidden)
        if z is None or sigma is None or self.evidence_scale is None:
            return Prediction(prior)
        evidence = self.evidence_scale.float() * F.linear(
            self._precision_weighted(z, sigma), self.unit_table()
        )
        return Prediction(prior, evidence)

    def loss(
        self,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        z: Tensor | None = None,
        sigma: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of cross-entropies and the unweighted ones: hidden [N, D], targets, weight [N] -> (scalar, [N]) fp32.

        The same logits as ``predict``, without ever holding [N, V] of them.
        """
        if self.objective.readout == "edm":
            hidden = self._denoised(hidden, z, sigma)
        evidence = None
        if z is not None and sigma is not None and self.evidence_scale is not None:
            noised = z.ne(0).any(-1)  # z = 0 says nothing: such rows need no second matmul
            u = self._precision_weighted(z[noised], sigma[noised]).to(hidden.dtype)
            evidence = (noised, u, self.unit_table().to(hidden.dtype), self.evidence_scale)
        return self.model.head(
            use=lambda table: linear_cross_entropy(hidden, table, targets, weight, evidence)
        )

    def _precision_weighted(self, z: Tensor, sigma: Tensor) -> Tensor:
        return z / sigma.square().clamp(min=EVIDENCE_FLOOR).unsqueeze(-1)

    def _denoised(self, hidden: Tensor, z: Tensor | None, sigma: Tensor | None) -> Tensor:
        """c_skip z + c_out F in fp32, returned in the network's dtype; z = 0 at sigma_max where absent."""
        if z is None or sigma is None:
            sigma_max = torch.tensor(self.noise.sigma_max, device=hidden.device)
            return hidden * denoise_scalings(sigma_max, self.noise.sigma_data).c_out.to(hidden.dtype)
        c = denoise_scalings(sigma, self.noise.sigma_data)
        return (c.c_skip.unsqueeze(-1) * z + c.c_out.unsqueeze(-1) * hidden.float()).to(hidden.dtype)


class Rowless(Denoiser):
    """A denoiser of what is not a row of a table: tokens that are hidden, pixels."""

    def clean(self, targets: Tensor) -> NoReturn:
        raise TypeError("this denoiser noises no rows")

    def unit_table(self) -> NoReturn:
        raise TypeError("this denoiser noises no rows")

    def inject(self, z: Tensor, sigma: Tensor) -> NoReturn:
        raise TypeError("this denoiser noises no rows")
