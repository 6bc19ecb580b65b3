"""What an answer may be, as clients say it: ``response_format``, ``structured_outputs``, ``tools``, ``tool_choice``.

The forms are those of the openai client (chat and responses) and of vLLM. Everything is checked here except what
only the grammar library knows (serve/engine/grammar.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from serve.api.json_text import decode
from serve.api.tools import Tool, ToolChoice
from serve.engine.grammar import MAX_SOURCE, choice_grammar, json_grammar, json_rule, regex_grammar
from serve.errors import ApiError, invalid

MAX_TOOLS = 128
MAX_ENUM = 4096
"""Texts of a ``choice``."""
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Constraint:
    """What an answer may be. source: a grammar; rule: the same as a part of a rule, where it is JSON."""

    param: str
    source: str
    rule: str | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    """As the client sent it."""


def _wrong(param: str, problem: str) -> ApiError:
    return invalid(f"{param}: {problem}", param)


def _object(value: Any, param: str, known: set[str], needed: set[str]) -> dict[str, Any]:
    """``value`` without nulls. Raises ApiError for another type, unknown fields and missing ones."""
    if not isinstance(value, dict):
        raise _wrong(param, "it must be an object")
    for name in value:
        if name not in known:
            raise _wrong(
                f"{param}.{str(name)[:80]}", f"there is no such field; use {', '.join(sorted(known))}"
            )
    found = {name: given for name, given in value.items() if given is not None}
    for name in sorted(needed - found.keys()):
        raise _wrong(f"{param}.{name}", "it is missing")
    return found


def _typed(found: dict[str, Any], param: str, **types: type) -> None:
    words = {str: "a text", bool: "true or false", dict: "an object", list: "a list"}
    for name, kind in types.items():
        if name in found and not isinstance(found[name], kind):
            raise _wrong(f"{param}.{name}", f"it must be {words[kind]}")


def _json(schema: Any, param: str) -> Constraint:
    if not isinstance(schema, dict | bool):
        raise _wrong(param, "a JSON schema is an object")
    made = Constraint(param, json_grammar(schema), json_rule(schema))
    if len(made.source) > MAX_SOURCE:
        raise _wrong(param, f"the schema has more than {MAX_SOURCE} characters")
    return made


def response_format(value: Any, param: str = "response_format", is_flat: bool = False) -> Constraint | None:
    """``response_format`` of chat, or ``text.format`` of responses (is_flat). Raises ApiError."""
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise _wrong(
            f"{param}.type" if isinstance(value, dict) else param,
            "it must be text, json_object or json_schema",
        )
    if kind != "json_schema":
        _object(value, param, {"type"}, {"type"})
        return None if kind == "text" else replace(_json({"type": "object"}, param), given=value)
    known, given = {"name", "description", "schema", "strict"}, value
    if is_flat:
        found = _object(value, param, {"type", *known}, {"name", "schema"})
    else:
        outer = _object(value, param, {"type", "json_schema"}, {"json_schema"})
        param = f"{param}.json_schema"
        found = _object(outer["json_schema"], param, known, {"name", "schema"})
    _typed(found, param, name=str, description=str, strict=bool)
    if not _NAME.fullmatch(found["name"]):
        raise _wrong(f"{param}.name", "it has 1 to 64 letters, digits, _, - and .")
    return replace(_json(found["schema"], f"{param}.schema"), given=given)


def structured_outputs(value: Any) -> Constraint | None:
    """vLLM's field: exactly one of json, json_object, regex, choice, grammar (Lark). Raises ApiError."""
    param, kinds = "structured_outputs", ("json", "json_object", "regex", "choice", "grammar")
    if value is None:
        return None
    found = _object(value, param, set(kinds), set())
    if len(found) != 1:
        raise _wrong(param, f"it has exactly one of {', '.join(kinds)}")
    _typed(found, param, json_object=bool, regex=str, choice=list, grammar=str)
    ((kind, given),) = found.items()
    param = f"{param}.{kind}"
    if kind == "json_object":
        return _json({"type": "object"}, param) if given else None
    if kind == "json" and isinstance(given, str):
        given = decode(given, param)
    if kind == "json":
        return _json(given, param)
    if kind == "choice":
        if not 0 < len(given) <= MAX_ENUM or not all(isinstance(text, str) and text for text in given):
            raise _wrong(param, f"it is a list of 1 to {MAX_ENUM} texts")
        source = choice_grammar(given)
    else:
        source = regex_grammar(given) if kind == "regex" else given
    if not given or len(source) > MAX_SOURCE:
        raise _wrong(param, f"it must have 1 to {MAX_SOURCE} characters")
    return Constraint(param, source)


def tool_list(value: Any, is_flat: bool = False) -> tuple[Tool, ...]:
    """``tools`` of chat, or of responses (is_flat). Raises ApiError."""
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise _wrong("tools", f"it must be a list of at most {MAX_TOOLS} functions")
    tools = [_tool(given, f"tools.{i}", is_flat) for i, given in enumerate(value)]
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise _wrong("tools", f"{max(names, key=names.count)} appears twice")
    if sum(len(json.dumps(tool.given)) for tool in tools) > MAX_SOURCE:
        raise _wrong("tools", f"they have more than {MAX_SOURCE} characters")
    return tuple(tools)


def _tool(value: Any, param: str, is_flat: bool) -> Tool:
    if not isinstance(value, dict) or value.get("type") != "function":
        raise _wrong(param, 'only tools of type "function" can be called here')
    known = {"name", "description", "parameters", "strict"}
    if is_flat:
        found = _object(value, param, {"type", *known}, {"name"})
        found.pop("type")
    else:
        outer = _object(value, param, {"type", "function"}, {"function"})
        param = f"{param}.function"
        found = _object(outer["function"], param, known, {"name"})
    _typed(found, param, name=str, description=str, parameters=dict, strict=bool)
    if not _NAME.fullmatch(found["name"]):
        raise _wrong(f"{param}.name", "it has 1 to 64 letters, digits, _, - and .")
    parameters = found.get("parameters") or {"type": "object", "properties": {}}
    if parameters.get("type", "object") != "object":
        raise _wrong(f"{param}.parameters.type", 'arguments are an object: it must be "object"')
    shown = {**found, "parameters": parameters}
    given = {"type": "function", "function": shown}
    return Tool(found["name"], {**parameters, "type": "object"}, given, f"{param}.parameters")


def tool_choice(value: Any, tools: tuple[Tool, ...], is_flat: bool = False) -> ToolChoice:
    """``tool_choice`` of chat, or of responses (is_flat). Raises ApiError."""
    if value in ("none", "auto", "required") or value is None:
        if value == "required" and not tools:
            raise _wrong("tool_choice", "required needs tools")
        return ToolChoice("none" if not tools else value or "auto")
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "function":
        return ToolChoice("required", _named([value], "tool_choice", tools, is_flat))
    if kind == "allowed_tools":
        param = "tool_choice" if is_flat else "tool_choice.allowed_tools"
        inner = (
            value
            if is_flat
            else _object(value, "tool_choice", {"type", "allowed_tools"}, {"allowed_tools"})[kind]
        )
        found = _object(
            inner, param, {"type", "mode", "tools"} if is_flat else {"mode", "tools"}, {"mode", "tools"}
        )
        _typed(found, param, tools=list)
        if found["mode"] not in ("auto", "required"):
            raise _wrong(f"{param}.mode", "it must be auto or required")
        if not 0 < len(found["tools"]) <= MAX_TOOLS:
            raise _wrong(f"{param}.tools", "it must name at least one function")
        return ToolChoice(found["mode"], _named(found["tools"], f"{param}.tools", tools, is_flat))
    raise _wrong("tool_choice", "it must be none, auto, required, a function or allowed_tools")


def _named(values: list[Any], param: str, tools: tuple[Tool, ...], is_flat: bool) -> frozenset[str]:
    """Names of functions, each {"type": "function", "function": {"name": ...}} or flat. Raises ApiError."""
    names = set()
    for value in values:
        if is_flat:
            name = _object(value, param, {"type", "name"}, {"type", "name"})["name"]
        else:
            outer = _object(value, param, {"type", "function"}, {"type", "function"})
            name = _object(outer["function"], f"{param}.function", {"name"}, {"name"})["name"]
        if name not in [tool.name for tool in tools]:  # a list: what is sent may have no hash
            raise _wrong(param, f"{str(name)[:80]!r} is not among the tools")
        names.add(name)
    return frozenset(names)
