"""Blocks that were trained alone, put together into the checkpoint of the whole network. Nothing is computed: weights are renamed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rdlm.checkpoints.folder import Loaded, load, save
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.diffusion.partition import partition_of
from rdlm.errors import UserError
from rdlm.registry import build


def merge(folders: Sequence[Path], out: Path) -> Path:
    """Write the merged checkpoint to ``out`` and return it. folders: runs (with ``model/``) or model folders, in any order.

    Raises UserError where they are not the blocks of one network, each exactly once.
    """
    parts = {folder: load(folder / "model" if (folder / "model").is_dir() else folder) for folder in folders}
    ordered = _in_order(parts)
    config = ordered[0].config.model_copy(
        update={"block": None, "step": sum(part.config.step for part in ordered)}
    )
    whole = build(config, device="meta")
    weights = {
        f"blocks.{b}.{n}": w for b, part in enumerate(ordered) for n, w in part.denoiser.state_dict().items()
    }
    whole.load_state_dict(weights, strict=True, assign=True)
    return save(out, whole, config, ordered[0].tokenizer, _card(config, ordered))


def _in_order(parts: dict[Path, Loaded]) -> list[Loaded]:
    """Block 0 first."""
    found: dict[int, Path] = {}
    first = next(iter(parts))
    for folder, part in parts.items():
        block = part.config.block
        if block is None:
            raise UserError(
                "RUN", str(folder), "holds no single block", "give runs of `rdlm train --block N`"
            )
        if block in found:
            raise UserError(
                "RUN", str(folder), f"is block {block}, as {found[block]} is", "give each block once"
            )
        found[block] = folder
        differing = _difference(parts[first].config, part.config)
        if differing is not None:
            raise UserError(
                "RUN", str(folder), f"has another {differing} than {first}", "give blocks of one network"
            )
        if _fingerprint(part) != _fingerprint(parts[first]):
            raise UserError(
                "RUN",
                str(folder),
                f"has another tokenizer than {first}",
                "give blocks trained on the same data",
            )
    count = partition_of(parts[first].config).num_blocks
    missing = sorted(set(range(count)) - found.keys())
    if missing:
        raise UserError(
            "RUN",
            len(found),
            f"of {count} blocks, {missing} are missing",
            "train them with `rdlm train --block N`",
        )
    return [parts[found[b]] for b in range(count)]


def _difference(one: CheckpointConfig, other: CheckpointConfig) -> str | None:
    """The first field in which two blocks of one network must not differ."""
    mine, theirs = one.model_dump(), other.model_dump()
    return next((name for name in mine if name not in ("block", "step") and mine[name] != theirs[name]), None)


def _fingerprint(part: Loaded) -> str | None:
    return None if part.tokenizer is None else part.tokenizer.fingerprint


def _card(config: CheckpointConfig, parts: Sequence[Loaded]) -> str:
    cut, masked = partition_of(config), not config.objective.left_to_right
    noised = "tokens are hidden" if masked else f"targets {config.blocks.targets if config.blocks else ''}"
    lines = ["## Blocks", "", f"Trained alone and merged; {noised}.", ""]
    for b, part in enumerate(parts):
        layers = cut.layers[b]
        owned = f"{'t' if masked else 'sigma'} in ({cut.edges[b + 1]:.4g}, {cut.edges[b]:.4g}]"
        lines.append(
            f"- Block {b}: {owned}, layers {layers[0]} to {layers[-1]}, {part.config.step:,} updates."
        )
    return "\n".join(lines)
