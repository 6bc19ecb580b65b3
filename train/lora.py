"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on linear layers, by the library peft: the
network around them does not move, and an exported model has them merged.

y = W x + alpha / rank B A x, with A drawn and B zero at the start.
"""

from __future__ import annotations

import math
from typing import Protocol

from torch import Tensor, nn

from rdlm.errors import UserError
from rdlm.objectives import Objective
from rdlm.random_streams import generator
from train.patterns import matches
from train.settings import LoraConfig

_INIT_KEY, _DROPOUT_KEY = 0x10BA, 0x10BB
_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."


class Weights(Protocol):
    """What a training checkpoint holds: see train.saved_state.SavedState."""

    shapes: dict[str, tuple[int, ...]]

    @property
    def moments(self) -> list[str]: ...

    def tensor(self, key: str, name: str) -> Tensor: ...


def add_adapters(network: Objective, lora: LoraConfig | None, seed: int) -> None:
    """Put adapters into ``network``, in place, drawn from ``seed``; nothing without ``lora``. UserError where
    peft is not installed or a target stands for no linear layer."""
    if lora is None:
        return
    try:
        import peft
    except ModuleNotFoundError:
        remedy = "pip install 'rdlm-stack[finetune]', or leave the section out"
        raise UserError("lora", lora.rank, "the package peft is not installed", remedy) from None
    names = target_names(network, lora)
    given = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names, init_lora_weights=False
    )  # fmt: skip
    on_meta = next(network.parameters()).is_meta
    peft.inject_adapter_in_model(given, network, low_cpu_mem_usage=on_meta)
    for number, (name, parameter) in enumerate(network.named_parameters()):
        parameter.requires_grad_(True)  # the library froze them; train/optim.py decides
        if on_meta or not is_adapter(name):
            continue
        if name.endswith(_A):  # as nn.Linear draws its weight, which is what LoRA's authors do
            bound = 1 / math.sqrt(parameter.shape[1])
            nn.init.uniform_(parameter, -bound, bound, generator=generator(seed, _INIT_KEY, number))
        else:
            nn.init.zeros_(parameter)


def target_names(network: nn.Module, lora: LoraConfig) -> list[str]:
    """The linear layers that get adapters. UserError for a pattern that stands for none."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    for pattern in lora.targets:
        if not any(matches(name, pattern) for name in linear):
            tops = ", ".join(dict.fromkeys(".".join(name.split(".")[:2]) for name in linear))
            problem = "matches no linear layer"
            raise UserError("lora.targets", pattern, problem, f"names of linear layers begin with {tops}")
    return [name for name in linear if any(matches(name, pattern) for pattern in lora.targets)]


def is_adapter(name: str) -> bool:
    return name.endswith((_A, _B))


def is_trained(name: str, lora: LoraConfig) -> bool:
    """Whether a parameter of a network with adapters moves."""
    return is_adapter(name) or any(matches(plain_name(name), pattern) for pattern in lora.also_train)


def plain_name(name: str) -> str:
    """The name that a weight has in the network without adapters."""
    return name.replace(_BASE, ".")


class Merged:
    """Weights that a training checkpoint holds, under their names in the network without adapters and with
    these added to them."""

    def __init__(self, saved: Weights, lora: LoraConfig) -> None:
        self._saved, self._scale = saved, lora.alpha / lora.rank
        self._names = {plain_name(name): name for name in saved.shapes if not is_adapter(name)}
        self.shapes = {plain: saved.shapes[name] for plain, name in self._names.items()}

    @property
    def moments(self) -> list[str]:
        return self._saved.moments

    def tensor(self, key: str, name: str) -> Tensor:
        """The whole fp32 weight, or average of it, flat."""
        own = self._names[name]
        weight = self._saved.tensor(key, own)
        stem = own.removesuffix(_BASE + "weight")
        if stem + _A not in self._saved.shapes:
            return weight
        down, up = (
            self._saved.tensor(key, stem + part).view(self._saved.shapes[stem + part]) for part in (_A, _B)
        )
        return weight + self._scale * (up @ down).flatten()


def dropout_seed(seed: int, step: int, rank: int, micro: int) -> int:
    """What dropout is drawn from in a micro-batch."""
    return generator(seed, _DROPOUT_KEY, step, rank, micro).initial_seed()
