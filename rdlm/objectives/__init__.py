"""Training objectives. To add one: a config class in rdlm/config/objective.py, a class in a file here, one
line in OBJECTIVES."""

from __future__ import annotations

from rdlm.objectives.base import Objective
from rdlm.objectives.edm import Edm
from rdlm.objectives.forward_forward import ForwardForward
from rdlm.objectives.masked import MaskedDiffusion
from rdlm.objectives.next_token import Bptt, Classify, Evidence, NextToken, OneStep, Paper, SinglePass

OBJECTIVES: dict[str, type[Objective]] = {
    "single_pass": SinglePass,
    "onestep": OneStep,
    "evidence": Evidence,
    "paper": Paper,
    "bptt": Bptt,
    "next_token": NextToken,
    "masked": MaskedDiffusion,
    "classify": Classify,
    "forward_forward": ForwardForward,
    "edm": Edm,
}
"""Objective classes by the name that a config gives them."""
