"""Device and precision: what ``auto`` means, that a GPU is named in one place, and what a GPU must compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rdlm.data.batch import Batch
from rdlm.device import usable_device, usable_dtype
from rdlm.errors import UserError
from rdlm.objectives import Objective
from rdlm.objectives.base import Keys
from serve.settings import EngineSettings


def test_auto_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The image for GPUs would otherwise serve on the CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert EngineSettings().device == "auto" and usable_device("auto") == torch.device("cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.empty", lambda *_, device, **__: None)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    assert usable_device("auto") == torch.device("cuda")
    assert usable_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert usable_dtype("auto", torch.device("cpu")) is torch.float32


@pytest.mark.parametrize(("name", "field"), [("cuda:99", "--device"), ("gpu", "device")])
def test_a_device_that_is_not_there_is_one_line(name: str, field: str) -> None:
    with pytest.raises(UserError, match=f"^{field}='{name}'") as error:
        usable_device(name, field)
    assert "\n" not in str(error.value) and "use auto" in str(error.value)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UserError, match="dtype='float8'"):
        usable_dtype("float8", torch.device("cpu"))


def test_the_cpu_suite_hides_gpus(repo: Path) -> None:
    """`make test` must pass on a machine with a GPU: its processes see none."""
    makefile = (repo / "Makefile").read_text()
    assert (
        "CPU := CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu" in makefile
        and "\t$(CPU) $(PY) -m pytest" in makefile
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["single_pass", "paper", "evidence", "onestep"])
def test_a_gpu_computes_the_losses_of_the_cpu(tiny: Callable[..., Objective], name: str) -> None:
    ids = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(4, 16, dtype=torch.bool))
    there = tiny("huginn", name).cuda().loss(batch.to("cuda"), Keys(0, 3)).total.cpu()
    torch.testing.assert_close(
        there, tiny("huginn", name).loss(batch, Keys(0, 3)).total, rtol=1e-4, atol=1e-4
    )
