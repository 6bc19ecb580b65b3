"""The objective and the sampler that docs/architecture.md writes work as it says, in a copy of the package; so does an
exit criterion of one class and a line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]

CRITERION = """
class Jump(StateCriterion):
    name, default_threshold = "jump", 0.5
    description = "largest change of a component of the state"

    @staticmethod
    def measure(before: Tensor, after: Tensor) -> Tensor:
        return (after.float() - before.float()).abs().amax(-1)
"""
USE = """
import torch
from rdlm.config.base import parse
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.objective import objective_config
from rdlm.data.batch import Batch
from rdlm.diffusion.samplers import SAMPLERS, Flow
from rdlm.objectives.base import Keys
from rdlm.registry import build
from rdlm.sampling_params import text_samplers
import rdlm

assert rdlm.__file__.startswith({folder!r}), rdlm.__file__
network = {{"family": "huginn", "vocab_size": 8, "d_model": 16, "num_heads": 2, "mlp_width": 16, "max_seq_len": 16}}
ids = torch.arange(12).view(2, 6) % 8
losses = {{}}
for objective in ("late", {{"name": "late", "first": 1.0}}, "onestep"):
    config = parse(CheckpointConfig, {{"name": "x", "model": network, "objective": objective}}, "test")
    denoiser = build(config, seed=0)
    batch = Batch(ids, ids.roll(-1, 1), torch.ones_like(ids, dtype=torch.bool))
    terms = denoiser.loss(batch, Keys(0, 0, 0, 0))
    terms.total.backward()
    losses[str(objective)] = float(terms.total.detach())
late, even, onestep = losses.values()
assert even == onestep and 0.5 * even < late < even, losses
assert "ancestral" in text_samplers()
z, x0 = torch.ones(3), torch.zeros(3)
flow = SAMPLERS["ancestral"].step(Flow(z), x0, 2.0, 1.0, lambda: torch.zeros(3))
assert torch.allclose(flow.z, z * 0.5**0.5 / 2)

from serve.api.schemas import ExitBody
from serve.engine.exits import default_thresholds

own = {{"exit_thresholds": {{"jump": 0.25}}}}
config = parse(CheckpointConfig, {{"name": "x", "model": network, "objective": "onestep", "recurrence": own}}, "test")
assert default_thresholds(config)["jump"] == 0.25
assert "jump" in ExitBody.model_json_schema()["properties"]["criterion"]["enum"]
"""


def test_the_written_objective_and_sampler_and_a_criterion_work(tmp_path: Path) -> None:
    page = (
        (REPO / "docs" / "architecture.md").read_text().split("### An objective and a sampler of your own")[1]
    )
    objective, settings, sampler = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[:3]
    shutil.copytree(REPO / "rdlm", tmp_path / "rdlm")
    (tmp_path / "rdlm" / "objectives" / "late.py").write_text(objective)
    for file, marks in {
        "config/objective.py": [("ObjectiveConfig = Annotated[\n", settings, "    LateConfig | ")],
        "diffusion/samplers.py": [
            ("SAMPLERS: dict[str, Sampler] = {\n", sampler, '    "ancestral": Ancestral(),\n')
        ],
        "exit_criteria.py": [
            ("class Cosine(StateCriterion):", CRITERION, ""),
            ("for criterion in (LatentDiff, ", "", "Jump, "),
        ],
    }.items():
        path = tmp_path / "rdlm" / file
        text = path.read_text()
        for mark, before, after in marks:
            assert text.count(mark) == 1
            text = text.replace(mark, before + "\n\n" + mark + after)
        path.write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", USE.format(folder=str(tmp_path))],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPO}"},
    )
    assert done.returncode == 0, done.stderr
