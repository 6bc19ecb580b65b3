"""What every config shares: strict frozen models, and validation errors that name the field."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from rdlm.errors import UserError


class Strict(BaseModel):
    """Base of every config: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_values_for_numbers(cls, data: Any) -> Any:
        """YAML and JSON know ``true``; Python would take it for 1."""
        for name, value in data.items() if isinstance(data, dict) else ():
            values = value if isinstance(value, list | tuple) else [value]
            if isinstance(value, dict):
                values = list(value.values())
            if name in cls.model_fields and any(isinstance(one, bool) for one in values):
                types = _types(cls.model_fields[name].annotation)
                if bool not in types and types & {int, float}:
                    raise ValueError(f"{name} needs a number, not a truth value")
        return data


C = TypeVar("C")


def parse(schema: type[C] | Any, data: Any, where: str) -> C:
    """Validate ``data`` against a config class; raises UserError that names the first bad field, its value
    and the remedy."""
    try:
        return TypeAdapter(schema).validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] in ("union_tag_invalid", "union_tag_not_found"):  # a name that no variant has
            context = first["ctx"]
            field, expected = context["discriminator"].strip("'"), context.get("expected_tags", "")
            path = ".".join([*_written(first["loc"], False, data), field])
            if not expected:
                expected = ", ".join(map(repr, _choices(schema, first["loc"], field)))
            remedy = f"use one of {expected}"
            raise UserError(path, context.get("tag"), "there is no such choice", remedy) from None
        path = ".".join(_written(first["loc"], first["type"] == "missing", data)) or where
        problem, remedy = first["msg"].removeprefix("Value error, "), f"correct it in {where}"
        if first["type"] == "extra_forbidden":
            problem = "there is no such field"
            inside = [name for name in _inside(schema) if name != path]  # of another variant: not of this one
            remedy = _nearest(str(first["loc"][-1]), _names(schema, first["loc"][:-1]), inside)
        value = first["input"] if not isinstance(first["input"], dict) else "{...}"
        raise UserError(path, value, problem, remedy) from None


def _nearest(name: str, known: list[str], inside: list[str]) -> str:
    """What to do about an unknown name. inside: fields of sections, as section.field."""
    elsewhere = [path for path in inside if path.partition(".")[2] == name]
    typed = get_close_matches(name, known, n=1, cutoff=0.8)
    if found := typed or elsewhere or get_close_matches(name, known, n=1, cutoff=0.6):
        return f"did you mean {' or '.join(found)}?"
    return f"remove it, or use one of {', '.join(known)}" if known else "remove it"


def _types(annotation: Any) -> set[Any]:
    """The plain types that an annotation is made of."""
    inner = get_args(annotation)
    return {annotation} if not inner else {found for one in inner for found in _types(one)}


def _models(schema: Any) -> list[type[BaseModel]]:
    """The config classes that an annotation is made of."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return [schema]
    return [model for one in get_args(schema) for model in _models(one)]


def _models_at(schema: Any, loc: tuple[str | int, ...]) -> list[type[BaseModel]]:
    """The config classes at a place that pydantic reports: field names, and the names of the union's variants
    between them."""
    models = _models(schema)
    for part in loc:
        inner = [model.model_fields[str(part)].annotation for model in models if part in model.model_fields]
        variants = [m for m in models if any(part in get_args(f.annotation) for f in m.model_fields.values())]
        models = [model for one in inner for model in _models(one)] if inner else (variants or models)
    return models


def _names(schema: Any, loc: tuple[str | int, ...]) -> list[str]:
    """Fields that may stand at a place."""
    return sorted({name for model in _models_at(schema, loc) for name in model.model_fields})


def _inside(schema: Any) -> list[str]:
    """Fields of the sections, as section.field."""
    sections = [(name, f.annotation) for model in _models(schema) for name, f in model.model_fields.items()]
    return sorted({f"{name}.{field}" for name, kind in sections for field in _names(kind, ())})


def _choices(schema: Any, loc: tuple[str | int, ...], field: str) -> list[str]:
    """Values of the field that tells the variants at a place apart."""
    fields = [m.model_fields[field].annotation for m in _models_at(schema, loc) if field in m.model_fields]
    return sorted({str(value) for annotation in fields for value in get_args(annotation)})


def _written(loc: tuple[str | int, ...], missing: bool, data: Any) -> list[str]:
    """The place of an error as the user wrote it: pydantic puts in which member of a union was meant (a
    family, a kind)."""
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
