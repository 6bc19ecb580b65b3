"""What every config shares: strict frozen models, and validation errors that name the field."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from rdlm.errors import UserError


class Strict(BaseModel):
    """Base of every config: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


C = TypeVar("C")


def parse(schema: type[C] | Any, data: Any, where: str) -> C:
    """Validate ``data`` against a config class; raises UserError that names the first bad field, its value and the remedy."""
    try:
        return TypeAdapter(schema).validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] in ("union_tag_invalid", "union_tag_not_found"):  # a name that no variant has
            context = first["ctx"]
            field, expected = context["discriminator"].strip("'"), context.get("expected_tags", "")
            path = ".".join([*_written(first["loc"], False, data), field])
            remedy = f"use {expected}" if expected else f"name it: {field}: ..."
            raise UserError(path, context.get("tag"), "there is no such choice", remedy) from None
        path = ".".join(_written(first["loc"], first["type"] == "missing", data)) or where
        remedy = (
            "remove it or correct its name"
            if first["type"] == "extra_forbidden"
            else f"correct it in {where}"
        )
        value = first["input"] if not isinstance(first["input"], dict) else "{...}"
        raise UserError(path, value, first["msg"].removeprefix("Value error, "), remedy) from None


def _written(loc: tuple[str | int, ...], missing: bool, data: Any) -> list[str]:
    """The place of an error as the user wrote it: pydantic puts in which member of a union was meant (a family, a kind)."""
    parts = []
    for i, part in enumerate(loc):
        if isinstance(data, dict) and part not in data and not (missing and i == len(loc) - 1):
            continue
        parts.append(str(part))
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            data = None
    return parts
