"""Options of the commands and of the Python interface, which run the engine without a server, from the definitions
that the server reads: fields of requests (serve/api/schemas.py) and of EngineSettings. No torch, no HTTP.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Annotated, Any

import typer

from rdlm.errors import UserError
from rdlm.sampling_params import NUMBERS
from serve.api.schemas import SamplingBody
from serve.cli import CacheOption, DeviceOption, DtypeOption, KernelOption, WeightOption
from serve.engine.engine import Served
from serve.errors import ApiError

ENGINE: dict[str, tuple[Any, Any]] = {
    "device": (DeviceOption, "auto"),
    "dtype": (DtypeOption, "auto"),
    "kv_cache": (CacheOption, "shared"),
    "kernels": (KernelOption, "auto"),
    "weights": (WeightOption, "auto"),
}
"""Option -> its typer annotation and default, of those that are fields of EngineSettings."""
REQUEST: dict[str, str] = {
    **{name: name for name in NUMBERS},
    "stop": "stop",
    "stop_token_id": "stop_token_ids",
    "min_tokens": "min_tokens",
    "ignore_eos": "ignore_eos",
    "sampler": "sampler",
    "order": "order",
    "exit": "exit.criterion",
    "exit_threshold": "exit.threshold",
    "step_size": "step_sizes",
    "draft_steps": "speculation.draft_steps",
    "draft_tokens": "speculation.draft_tokens",
    "wavefront": "wavefront.positions",
    "inner_steps": "wavefront.inner_steps",
    "wavefront_threshold": "wavefront.threshold",
    "wavefront_noise": "wavefront.noise",
    "wavefront_average": "wavefront.average",
    "headway": "wavefront.headway",
}
"""Option -> the field of a request that it sets: one line makes a field an option, whose type and help are the
schema's."""
OPTIONS = {f"--{name.replace('_', '-')}": path for name, path in REQUEST.items()}
"""REQUEST as options are written."""
DEFAULTS: dict[str, float] = {"temperature": 0.8, "top_p": 0.95}
"""Where neither an option nor the checkpoint's generation_config.json names them: a server would sample from the
model as it is."""
SCHEMA = SamplingBody.model_json_schema()
TYPES: dict[str, type] = {"integer": int, "number": float, "boolean": bool, "string": str}


def takes_options(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters ``engine`` and ``request`` are all options of ENGINE, as settings, and those of
    REQUEST that are given, as fields of a request. What a request's parsing refuses is a UserError that names the
    option."""
    groups = {
        "engine": ENGINE,
        "request": {name: (_annotation(path), None) for name, path in REQUEST.items()},
    }
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name not in groups]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for options in groups.values()
        for name, (annotation, default) in options.items()
    ]
    signature = inspect.Signature([*own, *added])

    @wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        engine = {name: given.pop(name) for name in ENGINE}
        request = fields({path: given.pop(name) for name, path in REQUEST.items()})
        try:
            function(**given, engine=engine, request=request)
        except (ApiError, UserError) as error:
            raise as_user_error(error, given | engine | request) from None

    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return command


def unnamed_defaults(served: Served) -> dict[str, float]:
    """Fields of requests that name none of DEFAULTS, where the checkpoint does not either."""
    return {name: value for name, value in DEFAULTS.items() if name not in served.sampling_defaults}


def fields(values: dict[str, Any]) -> dict[str, Any]:
    """Values by path as a request's body, without those that are not given."""
    body: dict[str, Any] = {}
    for path, value in values.items():
        if value is None or value is False or value == []:
            continue
        outer, _, inner = path.rpartition(".")
        (body.setdefault(outer, {}) if outer else body)[inner] = value
    return body


def _annotation(path: str) -> Any:
    """What typer makes an option of, from the JSON schema of a field."""
    field = _schema(path)
    kinds = [*_kinds(field)]
    kind = next((k for k in kinds if k["type"] == "array"), kinds[0])
    is_list = kind["type"] == "array"
    known = TYPES[kind["items"]["type"] if is_list else kind["type"]]
    words = field.get("description") or kind.get("description", "")
    outer, _, _ = path.rpartition(".")
    if outer and path == next(field for field in REQUEST.values() if field.startswith(f"{outer}.")):
        words = f"{_resolved(_schema(outer))['description']} {words}"  # once: what its options are about
    if choices := kind.get("enum"):
        words += f" One of {', '.join(choices)}."
    if is_list:
        words += " May be repeated."
    if path in DEFAULTS:
        words += f" By default that of the checkpoint's generation_config.json, else {DEFAULTS[path]}."
    names = [f"--{path.replace('_', '-')}"] if known is bool else []  # no --no- form beside it
    made = typer.Option(*names, help=" ".join(words.split()), show_default=False)
    return Annotated[(list[known] if is_list else known) | None, made]  # type: ignore[valid-type]


def _schema(path: str) -> dict[str, Any]:
    """The JSON schema of a field, with its description."""
    found: dict[str, Any] = SCHEMA
    for part in path.split("."):
        found = _resolved(found)["properties"][part]
    return found


def _resolved(field: dict[str, Any]) -> dict[str, Any]:
    """The schema of the object that a field may have."""
    named = next((kind["$ref"] for kind in field.get("anyOf", ()) if "$ref" in kind), None)
    return field if named is None else SCHEMA["$defs"][named.rpartition("/")[2]]


def _kinds(field: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The types that a field may have, null aside."""
    for kind in field.get("anyOf", [field]):
        if kind.get("type") not in (None, "null"):
            yield kind


def as_user_error(
    error: ApiError | UserError,
    given: dict[str, Any],
    options: Mapping[str, str] = OPTIONS,
    remedy: str = "see --help for its values",
) -> UserError:
    """What was refused of a request, as a mistake in an option. given: the command's arguments and the request's
    fields, which the message quotes. options: their names -> the fields that they set. remedy: where the error has
    none."""

    def named(path: str) -> str | None:
        return next((name for name, to in options.items() if to == path or to.startswith(f"{path}.")), None)

    if isinstance(error, UserError):
        name = named(error.field)
        return error if name is None else UserError(name, error.value, error.problem, error.remedy)
    if error.param is None:
        return UserError("request", "...", error.message, remedy)
    value: Any = given
    parts = [part for part in error.param.split(".") if not part.isdecimal()]  # of a list the whole is quoted
    for part in parts:
        value = value.get(part) if isinstance(value, dict) else None
    name = named(".".join(parts)) or f"--{'.'.join(parts).replace('_', '-')}"
    problem, _, better = error.message.removeprefix(f"{error.param}: ").rpartition("; ")
    return UserError(name, value, problem or better, better if problem else remedy)
