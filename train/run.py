"""One training process from a checked config to the exported model."""

from __future__ import annotations

import os
from typing import TextIO

from rdlm.config.model import ImageConfig, ModelConfig
from rdlm.errors import UserError
from rdlm.registry import build
from train.data import Corpus, build_corpus
from train.data.images import ImageCorpus
from train.process import StopSignal, environment, tune_cpu
from train.settings import TrainConfig


def check(config: TrainConfig, world: int) -> Corpus:
    """Everything that can be found wrong before a process is started or a weight allocated; raises UserError."""
    config.batch.accumulation(world)
    build(config.checkpoint_config, device="meta")
    corpus = build_corpus(config.data, config.fills_in)
    if config.resident is not None and config.resident.rest == "host" and not _on_gpu():
        raise UserError(
            "resident.rest", "host", "without GPUs blocks train in host memory", "set resident.rest=disk"
        )
    if isinstance(corpus, ImageCorpus):
        _check_images(config.model, corpus)
    elif corpus.vocab_size > config.model.vocab_size:
        problem = f"smaller than the data's vocabulary ({corpus.vocab_size})"
        raise UserError(
            "model.vocab_size", config.model.vocab_size, problem, f"set model.vocab_size={corpus.vocab_size}"
        )
    return corpus


def _check_images(model: ModelConfig, corpus: ImageCorpus) -> None:
    assert isinstance(model, ImageConfig)
    height, width = corpus.image_size
    found = {
        "image_size": (model.image_size,) * 2,
        "num_channels": model.num_channels,
        "num_classes": model.num_classes,
    }
    wanted = {"image_size": corpus.image_size, "num_channels": 3, "num_classes": corpus.vocab_size}
    for field, given in found.items():
        if given != wanted[field]:
            problem = f"the data's images are {width}x{height} in 3 channels and {corpus.vocab_size} classes"
            remedy = (
                f"set model.{field}={wanted[field]}"
                if field != "image_size"
                else "prepare the data with --size, or change it"
            )
            raise UserError(f"model.{field}", getattr(model, field), problem, remedy)


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def train(config: TrainConfig, stop: StopSignal, terminal: TextIO) -> bool:
    """Train, or go on training; export the model when the last step is done. False if ``stop`` came first. Raises UserError."""
    _, processes_here = environment()
    tune_cpu(processes_here)
    import torch

    on_gpu = _on_gpu()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    import deepspeed
    import torch.distributed as dist

    from train.export import export
    from train.trainer import Trainer

    # An all-reduce for inference that training never calls: compiling it costs the first run a minute and a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", verbose=False)
    try:
        corpus = check(config, dist.get_world_size())
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
        trainer = Trainer(config, corpus, device, terminal)
        finished = trainer.fit(lambda: stop.received)
        if finished:
            export(trainer)
        trainer.close()
        return finished
    finally:
        dist.destroy_process_group()
