"""Traces of a few updates by torch's profiler: the section ``profile`` of a config."""

from __future__ import annotations

from pathlib import Path

import torch

from train.settings import ProfileConfig

WARM_UP = 2
"""Updates under the profiler before those that are recorded: its own start is slow."""


class Profiler:
    """Records updates ``start`` .. ``start + steps - 1`` (0-based) into ``profile/rank0.json.gz``, which
    chrome://tracing and Perfetto read."""

    def __init__(self, config: ProfileConfig, output: Path, rank: int) -> None:
        self.config, self.file = config, output / "profile" / f"rank{rank}.json.gz"
        self._running: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Called before update ``step``."""
        if self._running is not None or step != max(0, self.config.start - WARM_UP):
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        schedule = torch.profiler.schedule(
            wait=0, warmup=self.config.start - step, active=self.config.steps, repeat=1
        )
        self._running = torch.profiler.profile(
            activities=activities, schedule=schedule, record_shapes=True, with_flops=True
        )
        self._running.start()

    def after(self, step: int) -> list[str]:
        """Called after update ``step`` -> lines for the terminal."""
        if self._running is None:
            return []
        if step + 1 < self.config.start + self.config.steps:
            self._running.step()
            return []
        self._running.stop()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._running.export_chrome_trace(str(self.file))
        self._running = None
        return [f"wrote a trace of {self.config.steps} updates to {self.file}"]
