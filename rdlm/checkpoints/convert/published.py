"""Checkpoints in the published layout of Ouro or of the retrofitted models: the way back of their importers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rdlm.checkpoints.convert.base import Fields, check_out, widest_dtype, write_published
from rdlm.checkpoints.convert.ouro import Ouro
from rdlm.checkpoints.convert.retrofit import Retrofit
from rdlm.checkpoints.convert.unroll import read_checkpoint
from rdlm.checkpoints.safetensors_io import Entry, to_bytes, to_tensor
from rdlm.config.model import RecurrentConfig
from rdlm.errors import UserError

LAYOUTS: dict[str, Ouro | Retrofit] = {"ouro": Ouro(), "retrofit": Retrofit()}
"""Name of the layout -> its importer, which knows both ways."""
CHANGES_NOTHING = {"origin", "init"}
"""Fields of a model that say where it comes from."""


def export_published(layout: str, folder: Path, out: Path, *, shard_bytes: int, force: bool = False) -> Path:
    """Write ``out`` in the published layout from a checkpoint folder -> ``out``.

    UserError, which names the setting, where the importer of that layout would not read the same model from it.
    """
    importer, remedy = LAYOUTS[layout], "use `rdlm export hf`, which brings its own modelling code"
    check_out(out, folder, force)
    config, found, tokenizer = read_checkpoint(folder, None, f"`rdlm export {layout}`")
    model = config.model
    if not isinstance(model, RecurrentConfig):
        raise UserError(
            "model.family", model.family, f"the layout of {importer.title} holds no such model", remedy
        )
    model, found = _without_state_scale(model, found)
    config = config.model_copy(update={"model": model})
    try:
        published, weights = importer.to_published(config), importer.published_weights(found, model)
    except KeyError as missing:
        problem = f"the layout of {importer.title} needs this weight, and the model has none"
        raise UserError("weight", missing.args[0], problem, remedy) from None
    shapes = {name: entry.shape for name, entry in weights.items()}
    try:
        again = importer.config(Fields(published, "config.json"), config.name, shapes)[0].model
    except UserError as error:
        problem = f"the layout of {importer.title} holds no such value"
        raise UserError(error.field, error.value, problem, remedy) from None
    ours, theirs = _flat(model.model_dump()), _flat(again.model_dump())
    ours["layer.num_kv_heads"] = model.layer.num_kv_heads or model.layer.num_heads
    ours["layer.head_dim"] = model.layer.head_width(model.d_model)
    for field, value in ours.items():
        if field.partition(".")[0] not in CHANGES_NOTHING and theirs.get(field) != value:
            problem = f"the layout of {importer.title} has {theirs.get(field)!r} there"
            raise UserError(f"model.{field}", value, problem, remedy)
    about = {"torch_dtype": widest_dtype(weights), "rdlm": config.model_dump(mode="json")}
    write_published(out, folder, {**published, **about}, weights, tokenizer, shard_bytes)
    return out


def _without_state_scale(
    model: RecurrentConfig, found: dict[str, Entry]
) -> tuple[RecurrentConfig, dict[str, Entry]]:
    """The same function, with the factor of the state in the adapter's weights: exact for a power of two."""
    loop, name = model.loop, "model.adapter.weight"
    if loop.injection != "linear" or loop.injection_state_scale == 1 or name not in found:
        return model, found
    entry = found[name]

    def scaled() -> Iterator[bytes]:
        weight = to_tensor(entry)
        weight[:, : model.d_model] *= loop.injection_state_scale
        yield to_bytes(weight)

    plain = loop.model_copy(update={"injection_state_scale": 1.0})
    return model.model_copy(update={"loop": plain}), {**found, name: replace(entry, read=scaled)}


def _flat(section: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Nested fields by dotted names."""
    found: dict[str, object] = {}
    for name, value in section.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
