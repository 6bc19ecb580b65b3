"""Recomputed layers: the same gradients from less, also where a noise level is told at each position."""

from __future__ import annotations

import copy

import pytest
import torch

from rdlm.data.batch import Batch
from rdlm.objectives.base import Keys
from rdlm.registry import build
from train.memory_trace import trace
from train.trainer import recompute_layers


@pytest.mark.parametrize(
    ("family", "objective", "grad_steps"),
    [
        ("llama", "evidence", 1),
        ("huginn", "single_pass", 1),
        ("huginn", "single_pass", 2),
        ("huginn", "paper", 1),
    ],
)
def test_gradients_are_those_of_layers_that_keep_everything(
    tiny, family: str, objective: str, grad_steps: int
) -> None:
    """To the last bit; where several core steps share one modulation, the order of a sum differs."""
    depth = (
        {"distribution": "fixed", "mean": 3, "grad_steps": grad_steps} if objective == "single_pass" else {}
    )
    plain = tiny(family, {"name": objective, "depth": depth})
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if "modulation" in name:
                weight.normal_(0.0, 0.5)
    again = copy.deepcopy(plain)
    recompute_layers(again)
    ids = torch.randint(0, 64, (3, 13))
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(3, 12, dtype=torch.bool))
    for denoiser in (plain, again):
        denoiser.loss(batch, Keys(seed=0, step=0)).total.backward()
    for (name, kept), recomputed in zip(plain.named_parameters(), again.parameters(), strict=True):
        tolerance = 0.0 if grad_steps == 1 else 1e-5
        torch.testing.assert_close(recomputed.grad, kept.grad, rtol=tolerance, atol=tolerance, msg=name)
        assert float(kept.grad.abs().max()) > 0, name


@pytest.mark.parametrize("objective", ["next_token", "evidence"])
def test_a_recomputed_layer_keeps_its_input_alone(tiny_config, objective: str) -> None:
    """One width per position more for each layer more, whether or not the layers are told a level at each
    position."""

    def forward(layers: int) -> int:
        denoiser = build(tiny_config("llama", objective, num_layers=layers), device="meta")
        recompute_layers(denoiser)
        return trace(denoiser, 4, 32, torch.float32, 1).forward

    assert forward(5) - forward(2) == 3 * 4 * 32 * 32 * 4, "layers x rows x width x bytes"
